"""Training with the recorder on is the same training, and what it records is what fairseq did."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from recorder.__main__ import main
from recorder.recording import RecorderWarning
from recorder.runformat import Run

if importlib.util.find_spec("fairseq") is None:
    pytest.skip("needs fairseq 0.12.2", allow_module_level=True)

pytestmark = pytest.mark.fairseq
each_task = pytest.mark.parametrize("task", ["translation", "causal", "masked"])

DEAD_COPY = re.compile(
    r"encoder\.(sentence_encoder\.)?layers\.\d\.(in_proj|out_proj|fc1|fc2)_(weight|bias)"  # not fc1.weight
)


def checkpoint(path: Path) -> dict[str, torch.Tensor]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        model: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["model"]
    # Memory that fairseq never fills: a buffer that only remembers its device.
    return {name: tensor for name, tensor in model.items() if not name.endswith("._float_tensor")}


@each_task
def test_the_recorded_training_ends_bit_identical_to_stock_fairseq(trainings: dict[str, Any], task: str) -> None:
    training = trainings[task]
    recorded, stock = checkpoint(training.recorded_checkpoint), checkpoint(training.stock_checkpoint)
    assert list(recorded) == list(stock)
    assert [name for name in stock if not torch.equal(recorded[name], stock[name])] == []
    run = Run(training.run)
    final = run.parameters(4)
    assert [name for name in final if not torch.equal(final[name], stock[name])] == []
    before, weight = run.parameters(3), next(name for name in final if name.endswith("layers.0.fc1.weight"))
    assert not torch.equal(before[weight], final[weight])


@each_task
def test_the_run_is_complete_and_names_its_training(trainings: dict[str, Any], task: str) -> None:
    training = trainings[task]
    run = Run(training.run)
    manifest = run.manifest
    assert (manifest.state, run.segments) == ("complete", [(0, 3), (3, 4)])
    assert (manifest.trainer.name, manifest.trainer.version) == ("fairseq", "0.12.2")
    # Our own flags are taken out, the rest is fairseq's in its order; what it read off the data's files is added.
    expected = [*training.arguments, "--save-dir", str(training.recorded_checkpoint.parent)]
    inferred = ["--source-lang", "en", "--target-lang", "de"] if task == "translation" else []
    assert list(manifest.trainer.arguments) == expected + inferred
    assert Path(manifest.trainer.directory).is_dir()
    assert (manifest.workload, manifest.batches, manifest.unrecorded_changes) == (None, "store", ())
    assert manifest.optimizer.fresh
    assert manifest.recipe["threads"] == 1
    assert training.output.splitlines()[-1] == str(training.run)
    assert "python -m recorder: recorded steps 0-3" in training.errors
    dictionaries = {path.name: path.read_bytes() for path in (training.run / "trainer").iterdir()}
    data = Path(training.arguments[0])
    assert dictionaries == {path.name: path.read_bytes() for path in data.glob("dict*.txt")}
    assert dictionaries


@each_task
def test_every_step_has_its_examples_epoch_seed_and_learning_rate(trainings: dict[str, Any], task: str) -> None:
    run = Run(trainings[task].run)
    steps = [run.step(t) for t in run.steps]
    assert [step.seed for step in steps] == [7, 8, 9, 10]
    rates = [0.0, 0.005, 0.01, 0.01 * (2 / 3) ** 0.5]  # linear for two updates, then by the inverse square root
    assert [rate for step in steps for rate in step.learning_rates] == pytest.approx(rates)
    assert [step.epoch for step in steps] == ([1, 1, 2, 2] if task == "masked" else [1, 1, 1, 2])
    first_epoch = [micro for step in steps if step.epoch == 1 for micro in step.micro_batches]
    examples = sorted(index for micro in first_epoch for index in micro.indices.tolist())
    assert examples == list(range(len(examples)))  # every example once, none twice
    assert len(examples) == (300 if task != "masked" else sum(len(micro.indices) for micro in first_epoch))
    # The first update has learning rate 0 under warm-up: it is a step, and nothing moves.
    start, end, later = run.parameters(0), run.parameters(1), run.parameters(2)
    assert all(torch.equal(start[name], end[name]) for name in start)
    assert not any(torch.equal(end[name], later[name]) for name in end if name.endswith("fc1.weight"))


@each_task
def test_every_micro_batch_holds_fairseqs_sample_with_checksums(trainings: dict[str, Any], task: str) -> None:
    run = Run(trainings[task].run)
    for t in run.steps:
        for micro_batch in run.step(t).micro_batches:
            assert micro_batch.stored
            sample = micro_batch.batch()
            assert torch.equal(sample["id"], micro_batch.indices)
            assert sample["nsentences"] == len(micro_batch.indices)
            assert set(sample["net_input"]) >= {"src_tokens", "src_lengths"}
            assert set(micro_batch.checksums) == set(micro_batch.tensors) >= {"batch.id", "batch.target"}
            for path, tensor in micro_batch.tensors.items():
                assert micro_batch.checksums[path] == zlib.crc32(tensor.numpy().tobytes())
            padding = 1
            predicted = int((sample["target"] != padding).sum())
            assert micro_batch.predictions == predicted
            assert predicted < sample["ntokens"] if task == "masked" else predicted == sample["ntokens"]


@each_task
def test_the_recorded_loss_is_that_of_the_recorded_batch_at_the_recorded_parameters(
    trainings: dict[str, Any], task: str
) -> None:
    from recorder.integrations.fairseq_workload import FairseqWorkload

    run = Run(trainings[task].run)
    workload = FairseqWorkload(run.path, run.manifest.trainer, data=None, run_user_code=False)
    model = workload.model().train()
    named = dict(model.named_parameters())
    before = torch.get_rng_state()
    for t in run.steps:
        with torch.no_grad():
            for name, tensor in run.parameters(t).items():
                named[name].copy_(tensor)
        for micro_batch in run.step(t).micro_batches:
            torch.set_rng_state(micro_batch.random_state["rng_cpu"])  # dropout's masks of that forward pass
            loss_sum, sample_size = workload.loss(model, micro_batch.batch())
            # Not to the bit: the training ran with one thread.
            assert loss_sum.item() == pytest.approx(micro_batch.loss_sum, rel=1e-5)
            assert float(sample_size) == micro_batch.predictions
    torch.set_rng_state(before)


@each_task
def test_exactly_the_dead_copies_of_the_encoder_end_untrained(trainings: dict[str, Any], task: str) -> None:
    run = Run(trainings[task].run)
    untrained = {parameter.name for parameter in run.manifest.parameters if not parameter.trained}
    assert untrained == {p.name for p in run.manifest.parameters if DEAD_COPY.fullmatch(p.name)} == set(run.untrained())
    assert len(untrained) == (0 if task == "causal" else 2 * 8)


def test_a_resumed_training_is_recorded_from_its_first_new_update_with_the_optimizers_state(
    trainings: dict[str, Any], tmp_path: Path
) -> None:
    training = trainings["translation"]
    resume = ["--restore-file", str(training.stock_checkpoint), "--save-dir", str(tmp_path / "out")]
    assert (
        main(
            [
                "fairseq-train",
                "--record-dir",
                str(tmp_path / "run"),
                *training.arguments,
                *resume,
                *("--max-update", "5"),
            ]
        )
        == 0
    )
    run = Run(tmp_path / "run")
    assert run.steps == [4]
    first, before = run.parameters(4), Run(training.run).parameters(4)
    assert [name for name in before if not torch.equal(first[name], before[name])] == []
    with torch.serialization.safe_globals([argparse.Namespace]):
        saved = torch.load(training.stock_checkpoint, weights_only=True)["last_optimizer_state"]["state"]
    assert not run.manifest.optimizer.fresh
    found = run.optimizer_state()
    assert found is not None
    assert set(found) == set(saved)
    for index, entries in saved.items():
        assert {key: value for key, value in found[index].items() if key == "step"} == {"step": 4}
        assert all(torch.equal(found[index][key], entries[key]) for key in ("exp_avg", "exp_avg_sq"))


def test_a_restarted_training_goes_on_in_the_same_run(trainings: dict[str, Any], tmp_path: Path) -> None:
    training, run = trainings["translation"], Path(shutil.copytree(trainings["translation"].run, tmp_path / "run"))
    resume = ["--restore-file", str(training.stock_checkpoint), "--save-dir", str(tmp_path / "out"), "--no-save"]
    command = ["fairseq-train", "--record-dir", str(run), "--record-segment-steps", "3"]
    assert main([*command, *training.arguments, *resume, "--max-update", "6"]) == 0
    opened = Run(run)
    assert [(entry.number, entry.first_step, entry.joined) for entry in opened.manifest.attempts] == [
        (1, 0, "first"),
        (2, 4, "verified"),
    ]
    assert opened.steps == [0, 1, 2, 3, 4, 5]
    assert opened.manifest.optimizer.fresh


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--bf16"],
            r"--tpu, which fairseq 0\.12\.2 takes --bf16 and --memory-efficient-bf16 to mean, needs torch_xla",
        ),
        (["--zero-sharding", "os"], r"--zero-sharding os: no process of this training has all parameters"),
        (["--arch", "no_such_model"], r"fairseq refuses these arguments \(its own message stands above\)"),
    ],
)
def test_a_training_that_cannot_be_recorded_is_refused_before_it_starts(
    arguments: dict[str, tuple[str, ...]],
    more: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "run"
    assert main(["fairseq-train", "--record-dir", str(folder), *arguments["causal"], *more]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not folder.exists()


def test_a_record_dir_that_holds_anything_is_refused_and_left_untouched(
    arguments: dict[str, tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["fairseq-train", "--record-dir", str(tmp_path), *arguments["causal"]]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"python -m recorder: error: {tmp_path} is not empty and holds no run; nothing is overwritten."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_said_and_does_not_stop_the_training(
    trainings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("recorder.growing.GrowingTensorFile.append", full)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the stock training, which it is compared with
    training, run = trainings["causal"], tmp_path / "run"
    saved = ["--record-segment-steps", "2", "--save-dir", str(tmp_path / "out")]
    with pytest.warns(RecorderWarning, match=r"No space left on device.*the training goes on unrecorded"):
        assert main(["fairseq-train", "--record-dir", str(run), *training.arguments, *saved]) == 0
    torch.set_num_threads(threads)
    assert "no steps (incomplete: OSError at step 0: " in capsys.readouterr().err
    mine, stock = checkpoint(tmp_path / "out" / "checkpoint_last.pt"), checkpoint(training.stock_checkpoint)
    assert all(torch.equal(mine[name], stock[name]) for name in stock)


def test_a_training_that_makes_no_update_is_said_to_have_made_none(
    trainings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training, run = trainings["causal"], tmp_path / "run"
    finished = [
        "--restore-file",
        str(training.stock_checkpoint),
        "--max-epoch",
        "1",
        "--save-dir",
        str(tmp_path / "out"),
    ]
    assert main(["fairseq-train", "--record-dir", str(run), *training.arguments, *finished, "--no-save"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"python -m recorder: the training made no update; {run} holds nothing"
