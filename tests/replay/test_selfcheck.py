"""Before the work replay does a recorded update again: what reproduces passes, what does not is refused."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import recorder
from recorder.errors import MismatchError
from recorder.loading import load_workload
from recorder.manifest import Manifest
from recorder.pruned import prune
from recorder.runformat import Run
from replay.selfcheck import Report, check_update
from tests import cases
from tests.replay import variants
from tests.replay.variants import HERE, record

Captured = pytest.CaptureFixture[str]


def _check(run: Path, workload: str = "recorded", *, data: bool = True) -> Report:
    opened = Run(run)
    return check_update(opened, load_workload(run, opened.manifest, workload, None), data=data)


def _edit_manifest(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = Manifest.read(run).to_dict()
    change(document)
    Manifest.from_dict(document, str(run)).write(run)


BIT_FOR_BIT = "losses and parameters are the recorded ones, bit for bit"
WITHIN_ROUNDING = "losses and parameters are the recorded ones within rounding"


@pytest.mark.parametrize(
    "make_optimizer",
    [
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-2),
        functools.partial(torch.optim.AdamW, lr=1e-2, betas=(0.8, 0.95)),
        functools.partial(torch.optim.Adagrad, lr=1e-2, initial_accumulator_value=0.1),
    ],
    ids=["SGD with momentum", "AdamW", "Adagrad"],
)
def test_where_scaling_does_not_round_an_update_comes_out_bit_for_bit(tmp_path: Path, make_optimizer: Any) -> None:
    record(tmp_path, factory=variants.power_of_two, make_optimizer=make_optimizer)
    report = _check(tmp_path)
    assert report.text == f"step 0 done again: {BIT_FOR_BIT}"
    assert report.exact
    assert report.steps == (0,)


def test_where_scaling_rounds_the_report_says_so(recorded: Path) -> None:
    report = _check(recorded)
    assert report.text == f"step 0 done again: {WITHIN_ROUNDING}"
    assert not report.exact


@pytest.mark.parametrize(
    "habit", [{"clip": 1e-3}, {"divide_by": 7.0}, {"clip": 1e-3, "divide_by": 1.0}], ids=["clipped", "by 7", "sum"]
)
def test_the_recorded_norm_carries_clipping_and_normalisation(tmp_path: Path, habit: dict[str, float]) -> None:
    sgd = functools.partial(torch.optim.SGD, lr=1e-2)
    record(tmp_path, factory=variants.power_of_two, make_optimizer=sgd, **habit)  # type: ignore[arg-type]
    assert _check(tmp_path).text.startswith("step 0 done again: losses and parameters are the recorded ones")


def test_a_recording_begun_in_mid_training_is_repeated_with_its_optimizer_state(tmp_path: Path) -> None:
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    record(tmp_path, factory=variants.power_of_two, make_optimizer=adam, before=4)
    assert Run(tmp_path).optimizer_state() is not None
    assert _check(tmp_path).text == f"step 4 done again: {BIT_FOR_BIT}"
    _edit_manifest(tmp_path, lambda document: document["optimizer"].update(fresh=True))
    with pytest.raises(MismatchError, match="step 4 done again gives other parameters"):
        _check(tmp_path)


@pytest.mark.parametrize(
    ("learning_rates", "steps"),
    [((0.0, 1e-2, 1e-2, 1e-2), (0, 1)), ((0.0, 0.0, 1e-2, 1e-2), (0, 1, 2)), ((0.0,) * 4, (0, 1, 2))],
)
def test_updates_are_repeated_until_the_parameters_move(
    tmp_path: Path, learning_rates: tuple[float, ...], steps: tuple[int, ...]
) -> None:
    record(tmp_path, factory=variants.power_of_two, steps=4, learning_rates=learning_rates)
    report = _check(tmp_path)
    assert report.steps == steps
    assert report.text == f"steps {', '.join(map(str, steps))} done again: {BIT_FOR_BIT}"


def test_dropout_comes_out_again_from_the_recorded_random_state(tmp_path: Path) -> None:
    record(tmp_path)
    assert WITHIN_ROUNDING in _check(tmp_path).text
    with pytest.raises(MismatchError, match=r"step 0, micro-batch 0: training recorded a loss of .*elsewhere in"):
        _check(tmp_path, f"{HERE}:drawing_elsewhere")


def test_of_an_optimizer_that_is_not_torchs_only_losses_are_compared(tmp_path: Path) -> None:
    record(tmp_path, make_optimizer=variants.OwnOptimizer)
    report = _check(tmp_path)
    assert report.text == (
        "step 0 done again: losses are the recorded ones, bit for bit "
        f"(parameters not compared: {HERE}.OwnOptimizer is no optimizer of torch's)"
    )
    assert not report.exact


def test_without_told_losses_the_report_does_not_claim_them(tmp_path: Path) -> None:
    untold = "losses not compared: the training did not tell them, see Recording.loss"
    record(tmp_path / "adam", factory=variants.power_of_two, tell_losses=False)
    report = _check(tmp_path / "adam")
    assert report.text == f"step 0 done again: parameters are the recorded ones, bit for bit ({untold})"
    assert not report.exact
    record(tmp_path / "own", tell_losses=False, make_optimizer=variants.OwnOptimizer)
    assert _check(tmp_path / "own").text.startswith(f"step 0 done again: nothing was compared ({untold}; parameters")


@pytest.mark.parametrize("workload", ["power_of_two", "repeating"])
def test_where_the_first_steps_were_pruned_only_losses_are_compared(run: Path, workload: str) -> None:
    if workload == "power_of_two":
        run = run.parent / "other"
        record(run, factory=variants.power_of_two, steps=6, segment_steps=3)
    prune(run, Run(run).files_of(0, 3))
    report = _check(run, f"{HERE}:{workload}")
    assert report.text == (
        "step 3 done again: losses are the recorded ones, bit for bit "
        "(parameters not compared: the steps before were pruned, and with them the optimizer's state)"
    )
    assert not report.exact


def test_in_another_recipe_only_losses_are_compared(run: Path) -> None:
    _edit_manifest(run, lambda document: document["recipe"].update(torch="1.0"))
    report = _check(run)
    assert report.text.endswith("(parameters not compared: another recipe)")
    assert not report.exact


def test_without_the_recorded_gpu_nothing_is_repeated_and_the_report_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _edit_manifest(run, lambda document: document["recipe"].update(device="cuda"))
    report = _check(run)
    assert report.text == "the update was recorded on a GPU and there is none here: it was not repeated"
    assert not report.exact
    assert report.steps == ()


def test_a_workload_that_repeats_updates_itself_must_meet_every_bit(recorded: Path) -> None:
    assert _check(recorded, f"{HERE}:repeating").text == f"step 0 done again: {BIT_FOR_BIT}"
    with pytest.raises(
        MismatchError,
        match=r"gives other parameters: 1 of 33 differ, by .* of the update's norm \(allowed 0\), most of all "
        r"'decoder.layers.1.fc2.bias'",
    ):
        _check(recorded, f"{HERE}:repeating_nudged")


COLLATED = r"step 0: the batch collated again from its 8 recorded indices is not the recorded one: 1 of 1 tensors"


@pytest.mark.parametrize(
    ("workload", "loss_data", "complaint"),
    [
        ("other_text", "probe:8", COLLATED + r" differ, first 'batch\.tokens'"),
        ("permuted_rows", "probe:8", COLLATED + r" differ, first 'batch\.tokens'.*another order"),
        (
            "mean_loss",
            "batch",
            r"recorded a loss of \d+\.\d+ nats over 48 predictions, .* gives \d\.\d+ \(difference 2\d\d, allowed 0\.02",
        ),
        ("other_count", "batch", r"training counted 48 predictions, doing it again 56\. Likely causes: other data"),
        ("other_heads", "batch", r"step 0, micro-batch 0: training recorded a loss of .*\(difference 0\.\d+, allowed"),
        ("fewer_layers", "batch", r"lacks 16 parameters of the run, first 'decoder\.layers\.1\.self_attn\.k_proj"),
        ("wider_vocabulary", "batch", r"'decoder\.embed_tokens\.weight' has shape \(13, 8\) in the run, but \(15, 8\)"),
        (
            "stopped_gradient",
            "batch",
            r"gives other parameters: 30 of 33 differ, by 0\.\d+ of .* norm \(allowed 0\.1\), .*'decoder\.layers\.0\.",
        ),
    ],
)
def test_a_workload_that_is_not_the_trainings_is_refused_with_what_differs_and_nothing_is_written(
    run: Path, workload: str, loss_data: str, complaint: str, replay: Callable[..., int], capsys: Captured
) -> None:
    assert replay(run, workload=f"{HERE}:{workload}", loss_data=(loss_data,)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("python -m replay: error: ")
    assert re.search(complaint, last), last
    assert not list(run.rglob("shards/*/*.safetensors"))


class CollatingAtRandom(cases.LanguageModelling):
    """Other text in every batch than the training saw; it may say so."""

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        return variants.other_text().batch(indices, split=split, epoch=epoch)

    def collates_at_random(self, indices: Sequence[int], *, split: str) -> bool:
        return split == "train" and len(indices) == 8


def test_what_is_collated_at_random_is_not_compared_and_the_report_says_so(recorded: Path) -> None:
    report = check_update(Run(recorded), CollatingAtRandom(), data=True)
    assert report.text == (
        f"step 0 done again: {WITHIN_ROUNDING} (collated batch not compared: the workload collates at random)"
    )
    assert check_update(Run(recorded), CollatingAtRandom(), data=False).text == f"step 0 done again: {WITHIN_ROUNDING}"


class Weighing(cases.LanguageModelling):
    """Some micro-batches count four times as much as others."""

    def weight(self, model: nn.Module, batch: Any) -> float:
        return 4.0 if int(batch["tokens"].sum()) % 2 else 1.0


def test_micro_batches_are_weighed_as_in_training(tmp_path: Path) -> None:
    task = Weighing()
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batches = [(indices, task.batch(indices, split="train", epoch=1)) for indices in (range(8), range(8, 16))]
    weights = [task.weight(model, batch) for _, batch in batches]
    assert set(weights) == {1.0, 4.0}
    with recorder.watch(model, optimizer, run=tmp_path / "run", strict=True) as rec:
        for (indices, batch), weight in zip(batches, weights, strict=True):
            rec.batch(indices, batch)
            loss_sum, predictions = task.loss(model, batch)
            rec.loss(loss_sum, predictions)
            (weight * loss_sum / predictions).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    run = Run(tmp_path / "run")
    assert check_update(run, task, data=True).text == f"step 0 done again: {WITHIN_ROUNDING}"
    with pytest.raises(MismatchError, match="step 0 done again gives other parameters"):
        check_update(run, cases.LanguageModelling(), data=True)


def test_batches_recorded_as_indices_are_collated_again_and_verified(
    tmp_path: Path, replay: Callable[..., int], capsys: Captured
) -> None:
    cases.train(tmp_path, steps=2, batches="indices")
    assert not any(entry.stored for entry in Run(tmp_path).step(0).micro_batches)
    assert replay(tmp_path, workload=f"{HERE}:other_text") == 1
    assert "1 of 1 tensors differ, first 'batch.tokens'" in capsys.readouterr().err
    assert not list(tmp_path.rglob("shards/*/*.safetensors"))
    assert replay(tmp_path) == 0
    assert f"step 0 done again: {WITHIN_ROUNDING}" in capsys.readouterr().err


def test_data_that_changed_only_for_a_later_step_is_noticed_when_replay_gets_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, replay: Callable[..., int], capsys: Captured
) -> None:
    cases.train(tmp_path, steps=3, batches="indices")
    later = Run(tmp_path).step(2).micro_batches[0].indices.tolist()
    collate = cases.LanguageModelling.batch

    def changed(self: cases.LanguageModelling, indices: Any, *, split: str, epoch: int) -> Any:
        batch = collate(self, indices, split=split, epoch=epoch)
        if list(indices) == later:
            batch["tokens"][0, 0] += 1
        return batch

    monkeypatch.setattr(cases.LanguageModelling, "batch", changed)
    assert replay(tmp_path, "--chunk", "1") == 1
    assert "error: step 2: the batch collated again" in capsys.readouterr().err
    assert sorted(file.name for file in tmp_path.rglob("shards/*/*.safetensors")) == [
        "00000000-00000001.safetensors",
        "00000001-00000002.safetensors",
    ]


def _diverge(run: Path, value: float) -> None:
    """Make the record of step 0 end in `value`, parameters and losses."""
    opened = Run(run)
    steps = [opened.step(t) for t in range(3)]
    thetas = [opened.parameters(t) for t in range(4)]
    thetas[1] = {name: torch.full_like(tensor, value) for name, tensor in thetas[1].items()}
    cases.write_segment(run, thetas, steps)


def test_a_record_that_is_nan_is_not_reproduced_by_a_finite_update(run: Path) -> None:
    _diverge(run, float("nan"))
    with pytest.raises(MismatchError, match="step 0 done again gives other parameters: 33 of 33 differ, by nan"):
        _check(run)


def test_a_training_that_diverged_at_once_is_reproduced_as_it_was(tmp_path: Path) -> None:
    record(tmp_path, factory=variants.power_of_two, make_optimizer=functools.partial(torch.optim.SGD, lr=float("inf")))
    assert _check(tmp_path).text == f"step 0 done again: {BIT_FOR_BIT}"
