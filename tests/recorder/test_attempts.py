from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import recorder
from recorder.__main__ import main
from recorder.errors import JoinError, UsageError
from recorder.manifest import Attempt, Manifest, Trainer
from recorder.runformat import Run
from recorder.segments import SegmentName, list_segments, segment_file
from recorder.timeline import Part, timeline

# The small models below have names that no naming rule knows.
pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")

Theta = dict[str, torch.Tensor]


class Training:
    """A training that can be set back to a checkpoint."""

    def __init__(self, model: nn.Module | None = None) -> None:
        torch.manual_seed(3)
        self.model = model or nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
        self.optimizer = Adam(self.model.parameters(), lr=0.1)
        self.seen: dict[int, Theta] = {}

    def checkpoint(self) -> dict[str, Any]:
        return copy.deepcopy({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()})

    def restore(self, checkpoint: dict[str, Any]) -> None:
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])

    def train(self, first: int, stop: int, run: Path | None = None, *, data: int = 0, **watch_arguments: Any) -> None:
        """Do the steps first <= t < stop, on data of one's choice; keep in `seen` what the parameters were."""
        rec = None
        if run is not None:
            rec = recorder.watch(
                self.model, self.optimizer, run=run, **{"first_step": first, "segment_steps": 2, **watch_arguments}
            )
        try:
            for t in range(first, stop):
                self.seen[t] = self.theta()
                if rec is not None:
                    rec.batch([t])
                batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(1000 * data + t))
                self.model(batch).square().sum().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.seen[stop] = self.theta()
        finally:
            if rec is not None:
                rec.close()

    def theta(self) -> Theta:
        return {name: tensor.detach().clone() for name, tensor in self.model.named_parameters()}


def assert_holds(run: Run, seen: dict[int, Theta]) -> None:
    for t, theta in seen.items():
        found = run.parameters(t)
        assert list(found) == list(theta)
        assert all(torch.equal(found[name], tensor) for name, tensor in theta.items())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


# --- Going on -------------------------------------------------------------------------------------------------------


def test_a_training_that_goes_on_appends_its_steps(run: Path) -> None:
    training = Training()
    training.train(0, 3, run)
    training.train(3, 8, run)
    opened = Run(run)
    assert opened.consecutive == [(0, 8)]
    assert opened.attempts == [(1, 0, 3), (2, 3, 8)]
    assert_holds(opened, training.seen)
    assert [opened.step(t).micro_batches[0].indices.tolist() for t in range(8)] == [[t] for t in range(8)]
    first, second = opened.manifest.attempts
    assert (first.number, first.first_step, first.joined, first.state, first.stop) == (1, 0, "first", "complete", 3)
    assert (second.number, second.first_step, second.joined, second.stop) == (2, 3, "verified", 8)


def test_steps_redone_from_a_checkpoint_replace_the_old_ones_which_are_kept(run: Path) -> None:
    training = Training()
    training.train(0, 3, run)
    checkpoint = training.checkpoint()
    training.train(3, 7, run)
    old = dict(training.seen)
    files = list_segments(run)

    training.restore(checkpoint)
    training.train(3, 5, run, data=1)
    assert not torch.equal(training.seen[5]["0.weight"], old[5]["0.weight"])
    now = Run(run)
    assert now.consecutive == [(0, 5)]
    assert now.attempts == [(1, 0, 3), (3, 3, 5)]
    assert_holds(now, {t: training.seen[t] for t in range(6)})
    assert set(files) <= set(list_segments(run))
    before = Run(run, attempt=2)
    assert before.consecutive == [(0, 7)]
    assert_holds(before, old)
    assert Run(run, attempt=1).consecutive == [(0, 3)]
    with pytest.raises(UsageError, match="has no attempt 4; it has 1, 2, 3"):
        Run(run, attempt=4)


def test_a_checkpoint_within_a_segment_cuts_it(run: Path) -> None:
    first, redone = Training(), Training()
    first.train(0, 6, run, segment_steps=64)
    redone.train(0, 3)
    redone.train(3, 5, run, data=1)
    assert Run(run).segments == [(0, 3), (3, 5)]
    assert_holds(Run(run), redone.seen)
    assert_holds(Run(run, attempt=1), first.seen)


def test_info_shows_both_attempts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = Training()
    training.train(0, 4, run)
    checkpoint = training.checkpoint()
    training.train(4, 6, run)
    training.restore(checkpoint)
    training.train(4, 7, run, data=1)
    assert main(["info", str(run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["steps"] == "steps 0-6"
    assert [(entry["recorded"], entry["in_use"]) for entry in facts["attempts"]] == [
        ("steps 0-3", "steps 0-3"),
        ("steps 4-5", "no steps"),
        ("steps 4-6", "steps 4-6"),
    ]
    assert main(["info", str(run)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("attempt")]
    assert [line.split(maxsplit=2)[2] for line in lines] == [
        "from step 0, complete; joined: first; recorded steps 0-3, of which count steps 0-3",
        "from step 4, complete; joined: verified; recorded steps 4-5, of which count no steps",
        "from step 4, complete; joined: verified; recorded steps 4-6, of which count steps 4-6",
    ]


def test_steps_that_were_lost_are_a_gap_and_the_join_is_not_called_verified(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = Training()
    training.train(0, 4, run)
    training.train(4, 6)
    training.train(6, 8, run)
    opened = Run(run)
    assert opened.consecutive == [(0, 4), (6, 8)]
    assert_holds(opened, {t: theta for t, theta in training.seen.items() if t != 5})
    with pytest.raises(UsageError, match="step 5 is not recorded; recorded are steps 0-3, 6-7"):
        opened.parameters(5)
    assert main(["info", str(run), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["steps"] == "steps 0-3, 6-7"
    expected = "not verified: the run holds no parameters of step 6, it holds steps 0-3"
    assert facts["attempts"][1]["joined"] == expected


def test_a_restart_between_the_selected_steps_is_not_called_verified(run: Path) -> None:
    training = Training()
    training.train(0, 5, run, steps="0::3")
    training.train(5, 8, run, steps="0::3")
    opened = Run(run)
    assert opened.steps == [0, 3, 6]
    assert opened.manifest.attempt.joined.startswith("not verified: step 5, where the training went on")
    assert_holds(opened, {t: training.seen[t] for t in (0, 1, 3, 4, 6, 7)})


def test_a_resumed_optimizers_state_is_that_of_the_attempt_that_the_run_begins_with(run: Path) -> None:
    training = Training()
    training.train(0, 2)
    checkpoint = training.checkpoint()
    training.train(2, 4, run)
    training.restore(checkpoint)
    training.optimizer.param_groups[0]["lr"] = 0.05
    for entry in training.optimizer.state.values():
        entry["exp_avg"].mul_(2)
    expected = copy.deepcopy(training.optimizer.state_dict()["state"])
    training.train(2, 3, run)
    for attempt, factor in ((None, 1.0), (1, 0.5)):
        found: dict[Any, Any] | None = Run(run, attempt).optimizer_state()
        assert found is not None
        assert torch.equal(found[0]["exp_avg"], factor * expected[0]["exp_avg"])
    assert Run(run).manifest.optimizer.groups[0]["lr"] == 0.05


class LateBranch(nn.Module):
    """A branch that joins when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.late = nn.Linear(4, 3), nn.Linear(3, 3)
        self.joined = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.trunk(x)
        out: torch.Tensor = self.late(x) if self.joined else x
        return out


def test_a_parameter_that_an_attempt_found_to_be_trained_stays_in_the_ledger(run: Path) -> None:
    model = LateBranch()
    training = Training(model)
    training.train(0, 2, run)
    checkpoint = training.checkpoint()
    model.joined = True
    training.train(2, 4, run)
    assert len(Run(run).manifest.trained) == 4
    model.joined = False
    training.restore(checkpoint)
    model.zero_grad()
    training.train(2, 3, run)
    opened = Run(run)
    assert len(opened.manifest.trained) == 4
    assert_holds(opened, {t: training.seen[t] for t in range(4)})


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_step", [0, 2, 4])
def test_parameters_that_are_not_those_of_the_run_are_an_error_of_the_training(run: Path, first_step: int) -> None:
    training = Training()
    training.train(0, 4, run)
    other = Training()
    other.train(0, 3)  # the checkpoint of step 3
    before = Manifest.read(run)
    with pytest.raises(JoinError, match=rf"does not go on where the run was at step {first_step}: 4 of 4 .*first_step"):
        other.train(first_step, first_step + 2, run)
    assert Manifest.read(run) == before
    assert_holds(Run(run), training.seen)
    other.train(3, 5, run)  # with its right number it is taken
    assert Run(run).consecutive == [(0, 5)]


def test_one_changed_bit_is_enough_to_be_refused_and_is_named(run: Path) -> None:
    training = Training()
    training.train(0, 4, run)
    with torch.no_grad():
        training.model.get_parameter("2.bias").view(torch.int32)[0] ^= 1
    with pytest.raises(JoinError, match=r"1 of 4 parameters differ from the recorded ones, first '2\.bias'"):
        training.train(4, 5, run)


def test_another_model_is_refused(run: Path) -> None:
    Training().train(0, 2, run)
    with pytest.raises(JoinError, match="the model's parameters have other names, shapes or dtypes"):
        Training(nn.Sequential(nn.Linear(4, 3))).train(0, 2, run)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batches": "indices"}, "batches was 'store' and is now 'indices'"),
        ({"steps": "0::10"}, "steps was 'all' and is now '0::10'"),
        ({"workload": "mine:workload"}, "workload was None and is now 'mine:workload'"),
        ({"trainer": Trainer(name="fairseq", version="1")}, "trainer was 'torch' and is now 'fairseq'"),
    ],
)
def test_other_settings_than_the_runs_are_refused(run: Path, settings: dict[str, Any], message: str) -> None:
    training = Training()
    training.train(0, 2, run)
    before = Manifest.read(run)
    with pytest.raises(UsageError, match=f"recorded otherwise: {message}"):
        training.train(2, 3, run, **settings)
    assert Manifest.read(run) == before
    training.train(2, 3, run)


def test_a_run_that_is_being_recorded_into_is_refused_to_a_second_recorder(run: Path) -> None:
    model = nn.Linear(2, 1)
    optimizer = SGD(model.parameters(), lr=0.1)
    with recorder.watch(model, optimizer, run=run), pytest.raises(UsageError, match="is being recorded into"):
        recorder.watch(model, optimizer, run=run)
    recorder.watch(model, optimizer, run=run).close()


# --- After a kill ---------------------------------------------------------------------------------------------------

PROGRAM = """
import os, sys, torch, recorder
torch.manual_seed(3)
model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
rec = recorder.watch(model, optimizer, run=sys.argv[1], segment_steps=2)
for t in range(5):
    rec.batch([t])
    model(torch.randn(5, 4, generator=torch.Generator().manual_seed(t))).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
{end}
"""


def run_program(run: Path, end: str) -> int:
    program = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(end=end), str(run)]
    return subprocess.run(program, check=False).returncode


def test_a_killed_training_is_taken_up_again_with_every_step_that_was_flushed(run: Path) -> None:
    assert run_program(run, "rec.flush(); os.kill(os.getpid(), 9)") == -9
    assert Run(run).consecutive == [(0, 4)]
    assert Run(run).manifest.state == "recording"
    training = Training()
    training.train(0, 5)
    training.train(5, 7, run)
    opened = Run(run)
    assert opened.attempts == [(1, 0, 5), (2, 5, 7)]
    assert_holds(opened, training.seen)
    killed, last = opened.manifest.attempts
    assert (killed.state, killed.stop) == ("incomplete: the training was killed", 5)
    assert (last.joined, last.state) == ("verified", "complete")
    assert list((run / "segments").glob(".*")) == []


def test_a_program_that_ends_without_closing_loses_no_step(run: Path) -> None:
    assert run_program(run, "") == 0
    opened = Run(run)
    assert opened.consecutive == [(0, 5)]
    assert opened.manifest.state == "incomplete: the program ended without closing the recording"
    assert not (run / ".ballast").exists()


def test_a_program_that_ends_with_an_error_loses_no_step(run: Path) -> None:
    assert run_program(run, "sys.exit(3)") == 3
    assert Run(run).consecutive == [(0, 5)]


# --- The timeline by itself -----------------------------------------------------------------------------------------


def attempt(number: int, first_step: int, processes: int = 1) -> Attempt:
    return Attempt(number=number, first_step=first_step, joined="", state="", processes=processes)


def test_an_attempt_without_a_segment_replaces_nothing() -> None:
    files = [SegmentName(1, 0, 4)]
    assert timeline(files, [attempt(1, 0), attempt(2, 2)]) == [Part(0, 4, files[0])]


def test_a_step_counts_once_every_process_has_left_it() -> None:
    files = [SegmentName(1, 0, 4), SegmentName(1, 4, 8), SegmentName(1, 0, 4, 1), SegmentName(1, 4, 6, 1)]
    assert timeline(files, [attempt(1, 0, processes=2)]) == [Part(0, 4, files[0]), Part(4, 6, files[1])]
    assert timeline(files[:2], [attempt(1, 0, processes=2)]) == []


def test_a_segment_of_the_run_in_another_run_is_refused(run: Path) -> None:
    training = Training()
    training.train(0, 2, run)
    training.train(2, 4, run.with_name("other"))
    segment_file(run.with_name("other"), 2, 4).rename(segment_file(run, 2, 4))
    with pytest.raises(ValueError, match=f"expected a segment of run {Manifest.read(run).run_id}, found one of"):
        Run(run).step(3)
