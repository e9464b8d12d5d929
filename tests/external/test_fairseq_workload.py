"""A fairseq run is rebuilt from its manifest: nothing of the user's is imported, moved data is asked for."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from recorder import batches, tensorfile
from recorder.__main__ import main
from recorder.errors import MismatchError, UsageError
from recorder.loading import load_workload
from recorder.runformat import Run
from recorder.workload import HalvesBatches, RepeatsUpdates, Workload

if importlib.util.find_spec("fairseq") is None:
    pytest.skip("needs fairseq 0.12.2", allow_module_level=True)

pytestmark = pytest.mark.fairseq
each_task = pytest.mark.parametrize("task", ["translation", "causal", "masked"])


@each_task
def test_batches_collated_again_from_their_indices_are_the_recorded_tensors(
    trainings: dict[str, Any], task: str, tmp_path: Path
) -> None:
    training = trainings[task]
    command = ["fairseq-train", "--record-dir", str(tmp_path / "run"), "--record-batches", "indices"]
    assert main([*command, *training.arguments, "--save-dir", str(tmp_path / "out")]) == 0
    run, with_tensors = Run(tmp_path / "run"), Run(training.run)
    assert run.manifest.batches == "indices"
    workload = load_workload(run.path, run.manifest, None, None)
    epochs = set()
    for t in run.steps:
        step = run.step(t)
        epochs.add(step.epoch)
        for micro_batch, other in zip(step.micro_batches, with_tensors.step(t).micro_batches, strict=True):
            assert not micro_batch.stored
            assert micro_batch.checksums == other.checksums  # the training is the same in either mode
            sample = workload.batch(micro_batch.indices.tolist(), split="train", epoch=step.epoch)
            _, collated = batches.take_apart(sample)
            found = {path: tensorfile.checksum(tensor) for path, tensor in collated.items()}
            assert found == micro_batch.checksums
    assert epochs == {1, 2}


@each_task
def test_the_rows_of_a_batch_come_in_the_order_asked_for(trainings: dict[str, Any], task: str) -> None:
    run = Run(trainings[task].run)
    workload = load_workload(run.path, run.manifest, None, None)
    one_way = workload.batch([9, 2, 30, 17], split="train", epoch=1)
    other_way = workload.batch([30, 17, 9, 2], split="train", epoch=1)
    assert one_way["id"].tolist() == [9, 2, 30, 17]
    assert other_way["id"].tolist() == [30, 17, 9, 2]
    for name in ("src_tokens", "src_lengths"):
        assert torch.equal(one_way["net_input"][name][[2, 3, 0, 1]], other_way["net_input"][name])
    assert torch.equal(one_way["target"][[2, 3, 0, 1]], other_way["target"])


@each_task
def test_the_halves_of_a_sample_add_up_to_it(trainings: dict[str, Any], task: str) -> None:
    run = Run(trainings[task].run)
    workload = load_workload(run.path, run.manifest, None, None)
    assert isinstance(workload, HalvesBatches)
    model = workload.model().eval()
    sample = workload.batch([9, 2, 30, 17, 4], split="train", epoch=1)
    halves = workload.halve(sample)
    assert [half["nsentences"] for half in halves] == [3, 2]
    assert torch.cat([half["id"] for half in halves]).tolist() == [9, 2, 30, 17, 4]
    assert sum(half["ntokens"] for half in halves) == sample["ntokens"]
    with torch.no_grad():
        loss, count = workload.loss(model, sample)
        parts = [workload.loss(model, half) for half in halves]
    assert sum(float(of_half) for _, of_half in parts) == float(count)
    assert sum(float(of_half) for of_half, _ in parts) == pytest.approx(float(loss), rel=1e-5)
    with pytest.raises(UsageError, match="a single sentence does not fit into memory"):
        workload.halve(workload.batch([9], split="train", epoch=1))
    with pytest.raises(MismatchError, match="cannot be cut in two: expected its 7 tokens in the target or the source"):
        workload.halve({**sample, "ntokens": 7})


@each_task
def test_the_workload_offers_all_examples_of_either_split(trainings: dict[str, Any], task: str) -> None:
    run = Run(trainings[task].run)
    workload = load_workload(run.path, run.manifest, None, None)
    assert isinstance(workload, Workload)
    assert isinstance(workload, RepeatsUpdates)
    recorded = {index for t in run.steps for micro in run.step(t).micro_batches for index in micro.indices.tolist()}
    train = list(workload.indices("train"))
    assert sorted(train) == list(range(len(train)))
    assert set(train) == recorded
    assert len(workload.indices("valid")) == (30 if task != "masked" else len(set(workload.indices("valid"))))
    assert workload.indices("train") == train
    with pytest.raises(UsageError, match="does not hold the split 'nonsense' of this training's binarised data"):
        workload.indices("nonsense")


def test_moved_data_is_asked_for_with_the_flag_and_model_and_recorded_batches_do_without(
    trainings: dict[str, Any],
) -> None:
    training = trainings["translation"]
    run = Run(training.run)
    moved = dataclasses.replace(
        run.manifest,
        trainer=dataclasses.replace(run.manifest.trainer, arguments=("/moved", *run.manifest.trainer.arguments[1:])),
    )
    workload = load_workload(run.path, moved, None, None)
    model = workload.model()
    assert [name for name, _ in model.named_parameters()] == [row.name for row in moved.parameters]
    workload.loss(model, run.step(0).micro_batches[0].batch())
    with pytest.raises(UsageError, match=r"the binarised data of this training is not at /moved; pass --data FOLDER"):
        workload.indices("train")
    found = load_workload(run.path, moved, None, training.arguments[0])
    assert len(found.indices("train")) == 300


def test_a_relative_data_folder_starts_where_the_training_ran(trainings: dict[str, Any]) -> None:
    training = trainings["causal"]
    data = Path(training.arguments[0])
    run = Run(training.run)
    trainer = dataclasses.replace(
        run.manifest.trainer, arguments=(data.name, *run.manifest.trainer.arguments[1:]), directory=str(data.parent)
    )
    workload = load_workload(run.path, dataclasses.replace(run.manifest, trainer=trainer), None, None)
    assert len(workload.indices("train")) == 300


def test_a_recorded_user_dir_is_imported_only_when_the_user_says_so(trainings: dict[str, Any], tmp_path: Path) -> None:
    plugin = tmp_path / "lossledger_test_plugin"
    plugin.mkdir()
    marker = tmp_path / "imported"
    (plugin / "__init__.py").write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    run = Run(trainings["causal"].run)
    trainer = dataclasses.replace(
        run.manifest.trainer,
        arguments=(*run.manifest.trainer.arguments, "--user-dir", plugin.name),
        directory=str(tmp_path),
    )
    manifest = dataclasses.replace(run.manifest, trainer=trainer)
    with pytest.raises(UsageError, match=r"used --user-dir lossledger_test_plugin.*pass --workload recorded"):
        load_workload(run.path, manifest, None, None)
    assert not marker.exists()
    load_workload(run.path, manifest, "recorded", None)
    assert marker.exists()


def test_the_encoders_fused_path_that_reads_dead_copies_is_off(trainings: dict[str, Any]) -> None:
    run = Run(trainings["masked"].run)
    workload = load_workload(run.path, run.manifest, None, None)
    model = workload.model().eval()
    batch = run.step(0).micro_batches[0].batch()
    with torch.no_grad():
        loss = workload.loss(model, batch)[0]
        for name, tensor in model.named_parameters():
            if name.rpartition(".")[2] in {"in_proj_weight", "out_proj_weight", "fc1_weight", "fc2_weight"}:
                tensor.fill_(float("nan"))
        assert torch.equal(workload.loss(model, batch)[0], loss)
