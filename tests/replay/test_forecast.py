"""A trial of three steps, and the time that it foretells."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from replay import work
from replay.forecast import forecast, shared_out
from replay.gradients import LossSurface
from replay.job import Job, Task
from replay.readcost import Reading
from replay.trial import Pace, Trial, spread_over, try_steps

Jobs = Callable[..., Job]


@pytest.mark.parametrize(
    ("ranges", "steps"),
    [
        ([(0, 9)], (0, 4, 8)),
        ([(0, 1), (8, 16)], (0, 11, 15)),
        ([(2, 5)], (2, 3, 4)),
        ([(2, 3), (7, 8)], (2, 7)),
        ([(7, 8)], (7,)),
    ],
)
def test_a_trial_takes_the_first_the_middle_and_the_last_step(
    ranges: list[tuple[int, int]], steps: tuple[int, ...]
) -> None:
    assert spread_over([Task(start=start, stop=stop, loss_data=("batch",)) for start, stop in ranges]) == steps


def test_a_trial_times_each_loss_data_by_itself_after_an_untimed_step(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: Jobs
) -> None:
    (tmp_path / "ids.csv").write_text("group,index\nverbs,5\nnouns,3\nverbs,11\n")
    now, asked = 0.0, Counter[str]()
    evaluate, loss = LossSurface.evaluate, LossSurface.loss

    def evaluating(*given: Any, **options: Any) -> Any:
        nonlocal now
        asked["gradients"] += 1
        # The first of each loss data, of what is not timed, is slow.
        now += 1000 if asked["gradients"] <= 2 * 3 else 4
        return evaluate(*given, **options)

    def measuring(*given: Any, **options: Any) -> Any:
        nonlocal now
        now += 1
        return loss(*given, **options)

    monkeypatch.setattr(LossSurface, "evaluate", evaluating)
    monkeypatch.setattr(LossSurface, "loss", measuring)
    opened = work.Replayer(
        job(run, rule="gauss2", loss_data=("batch", f"words=file:{tmp_path / 'ids.csv'}"), check_every=8)
    )
    trial = try_steps(opened, [Task(start=1, stop=6, loss_data=("batch", "words"))], lambda: now)
    assert trial.steps == (1, 3, 5)
    own = Pace(evaluations=2, evaluation_seconds=4, pass_seconds=1, rest_seconds=0)
    put_together = Pace(evaluations=0, evaluation_seconds=0, pass_seconds=0, rest_seconds=0)
    assert trial.paces == {"batch": own, "words/nouns": own, "words/verbs": own, "words": put_together}
    assert asked["gradients"] == 4 * 3 * 2


def _paces(**evaluations: float) -> dict[str, Pace]:
    return {
        name: Pace(evaluations=number, evaluation_seconds=2, pass_seconds=1, rest_seconds=0.25)
        for name, number in evaluations.items()
    }


def test_the_expected_time_is_that_of_evaluations_passes_sums_and_reading_shared_out_to_workers(
    run: Path, job: Jobs
) -> None:
    tasks = [Task(start=start, stop=stop, loss_data=("batch", "probe")) for start, stop in ((0, 2), (2, 4), (4, 6))]
    to_read = [Reading(bytes=0, states=states) for states in (3, 5, 3)]
    opened = work.Replayer(job(run, rule="adaptive"))
    opened.seconds_to_open = 10.0
    trial = Trial(steps=(0, 2, 5), reading_seconds=0.5, paces=_paces(batch=3, probe=5))
    # A chunk: 2 steps of 3 evaluations, 2 of 5 of which one is shared; sums on two loss data; θ decoded.
    of_chunks = [2 * (6 + 9) + 2 * 2 * 0.25 + 0.5 * states for states in (3, 5, 3)]
    for workers, seconds in ((1, sum(of_chunks)), (2, of_chunks[0] + of_chunks[2]), (3, of_chunks[1])):
        expected = forecast(opened, tasks, to_read, trial, workers)
        assert expected.expected_seconds == pytest.approx(10 + seconds)
        assert expected.work_seconds == pytest.approx(sum(of_chunks))
        assert (expected.gradient_evaluations, expected.evaluation_seconds) == (45, 2)
        assert expected.step_seconds == pytest.approx(sum(of_chunks) / 6)
        assert expected.evaluations_per_second == pytest.approx(45 / (10 + seconds))
    unknown = forecast(opened, tasks, to_read, trial, None)
    assert unknown.expected_seconds is None
    assert unknown.evaluations_per_second == pytest.approx(45 / sum(of_chunks))


def test_forward_passes_take_their_time_at_the_checked_steps_alone(run: Path, job: Jobs) -> None:
    trial = Trial(steps=(0,), reading_seconds=0, paces=_paces(batch=2))
    opened = work.Replayer(job(run, rule="gauss2", loss_data=("batch",), check_every=4))
    task = Task(start=0, stop=6, loss_data=("batch",))  # of which 0 and 4 are checked
    expected = forecast(opened, [task], [Reading(bytes=0, states=7)], trial, 1)
    assert expected.work_seconds == pytest.approx(6 * 2 * 2 + 2 * 2 * 1 + 6 * 0.25)


def test_what_is_read_beside_the_computing_takes_time_only_where_it_takes_longer(
    run: Path, monkeypatch: pytest.MonkeyPatch, job: Jobs
) -> None:
    opened = work.Replayer(job(run, rule="euler", loss_data=("batch",), check_every=100))
    monkeypatch.setattr("replay.reading.WORTH_A_THREAD", 0)
    task, to_read = Task(start=1, stop=3, loss_data=("batch",)), [Reading(bytes=0, states=4)]
    for reading, seconds in ((1.0, 2 * 1 + 2 * 2.25), (3.0, 2 * 3 + 2 * 3.0)):
        trial = Trial(steps=(1,), reading_seconds=reading, paces=_paces(batch=1))
        assert forecast(opened, [task], to_read, trial, 1).work_seconds == pytest.approx(seconds)


def test_more_workers_than_chunks_are_no_faster() -> None:
    assert shared_out([3.0, 1.0], 2) == shared_out([3.0, 1.0], 20) == 3.0
