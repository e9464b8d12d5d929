"""fairseq in 16 bit: the record holds what its optimizer updates, and replay does the update again in 16 bit."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from recorder.__main__ import main
from recorder.errors import MismatchError
from recorder.loading import load_workload
from recorder.runformat import Run
from replay import shards
from replay.__main__ import main as replay
from replay.selfcheck import check_update
from replay.work import replayer

if importlib.util.find_spec("fairseq") is None:
    pytest.skip("needs fairseq 0.12.2", allow_module_level=True)

pytestmark = pytest.mark.fairseq

SCALE = ["--fp16-init-scale", "4096"]  # the first updates overflow
FLAGS = {
    "masters": ["--fp16", "--fp16-no-flatten-grads", *SCALE],
    "flat masters": ["--fp16", *SCALE],
    "no masters": ["--memory-efficient-fp16", *SCALE],
    "amp": ["--amp"],
}
IN_16_BIT = ["masters", "flat masters", "no masters"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
    """A recorded training, and what its own optimizer held."""

    path: Path
    checkpoint: Path
    thetas: list[dict[str, torch.Tensor]]
    """The tensors that the optimizer updates: before the first update, and after each one."""
    batches: list[list[list[int]]]
    """Of each update the examples of its micro-batches."""
    overflows: int

    @property
    def run(self) -> Run:
        return Run(self.path)


@contextmanager
def _on_the_cpu() -> Iterator[pytest.MonkeyPatch]:
    # fairseq asks for a GPU where it logs an overflow, and where it makes flat masters; neither needs one.
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cuda", lambda self: self)
        patch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a device that is no GPU
        torch.set_num_threads(1)
        replayer.cache_clear()
        yield patch
    replayer.cache_clear()
    torch.set_num_threads(threads)
    torch.set_rng_state(state)


@pytest.fixture(autouse=True)
def on_the_cpu() -> Iterator[None]:
    with _on_the_cpu():
        yield


def _train(folder: Path, *arguments: str) -> Trained:
    """Record a training in this process, and look at fairseq's own optimizer before and after every update."""
    importlib.import_module("recorder.integrations.fairseq_import")
    trainer_class = importlib.import_module("fairseq.trainer").Trainer
    thetas: list[dict[str, torch.Tensor]] = []
    batches: list[list[list[int]]] = []
    overflows = 0
    stock = trainer_class.train_step

    def train_step(trainer: Any, samples: Any, raise_oom: bool = False) -> Any:
        nonlocal overflows
        if not thetas:
            thetas.append(_what_fairseq_updates(trainer))
        before = trainer.get_num_updates()
        result = stock(trainer, samples, raise_oom)
        if trainer.get_num_updates() == before:
            overflows += 1
        else:
            thetas.append(_what_fairseq_updates(trainer))
            batches.append([sample["id"].tolist() for sample in samples])
        return result

    with _on_the_cpu() as patch:
        patch.setattr(trainer_class, "train_step", train_step)
        record = ["--record-dir", str(folder / "run")]
        assert main(["fairseq-train", *record, *arguments, "--save-dir", str(folder / "checkpoints")]) == 0
    checkpoint = folder / "checkpoints" / "checkpoint_last.pt"
    return Trained(path=folder / "run", checkpoint=checkpoint, thetas=thetas, batches=batches, overflows=overflows)


@pytest.fixture(scope="module")
def small_steps(arguments: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    """A translation whose steps are so small that the quadrature's error is none to speak of."""
    return (*arguments["translation"], "--lr", "0.001")


@pytest.fixture(scope="module")
def trained(small_steps: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("fairseq-fp16")
    return {kind: _train(folder / kind, *small_steps, *flags) for kind, flags in FLAGS.items()}


def _what_fairseq_updates(trainer: Any) -> dict[str, torch.Tensor]:
    # Not by the names that the recorder finds: by fairseq's own lists.
    named = {id(parameter): name for name, parameter in trainer.get_model().named_parameters()}
    masters = getattr(trainer.optimizer, "fp32_params", None)
    if masters is None:
        return {name: tensor.detach().clone() for name, tensor in trainer.get_model().named_parameters()}
    of_model = trainer.optimizer.fp16_params
    if isinstance(masters, dict):
        (flat,) = masters.values()
        masters = flat.detach().split([parameter.numel() for parameter in of_model])
    return {
        named[id(parameter)]: master.detach().clone().view(parameter.shape)
        for parameter, master in zip(of_model, masters, strict=True)
    }


@pytest.mark.parametrize("kind", list(FLAGS))
def test_every_step_holds_what_fairseqs_optimizer_updates_bit_for_bit(trained: dict[str, Trained], kind: str) -> None:
    training = trained[kind]
    run = training.run
    assert (run.manifest.state, run.steps, run.manifest.unrecorded_changes) == ("complete", [0, 1, 2, 3], ())
    assert len(training.thetas) == 5
    for t, expected in enumerate(training.thetas):
        theta = run.parameters(t)
        assert [name for name in theta if not torch.equal(theta[name], expected[name])] == []
        assert all(theta[name].dtype == expected[name].dtype for name in theta)
    assert not torch.equal(run.parameters(1)["decoder.layers.0.fc1.weight"], theta["decoder.layers.0.fc1.weight"])
    rows = run.manifest.parameters
    dtypes = {"masters": ("float32", "float16"), "no masters": ("float16", None), "amp": ("float32", None)}
    assert {(row.dtype, row.model_dtype) for row in rows} == {dtypes[kind.removeprefix("flat ")]}
    # The encoder's dead copies have a gradient of zeros in the masters, and are no part of the ledger.
    assert sum(not row.trained for row in rows) == 2 * 8
    assert run.manifest.optimizer.groups[0]["parameters"] == [row.name for row in rows]


@pytest.mark.parametrize("kind", IN_16_BIT)
def test_the_batches_of_an_update_that_overflowed_belong_to_no_step(trained: dict[str, Trained], kind: str) -> None:
    training, run = trained[kind], trained[kind].run
    assert training.overflows > 0
    for t in run.steps:
        assert [micro.indices.tolist() for micro in run.step(t).micro_batches] == training.batches[t]


@pytest.mark.parametrize("kind", list(FLAGS))
def test_the_update_comes_out_again_in_the_trainings_own_precision(trained: dict[str, Trained], kind: str) -> None:
    run = trained[kind].run
    report = check_update(run, load_workload(run.path, run.manifest, None, None), data=True)
    assert report.text == "steps 0, 1 done again: losses and parameters are the recorded ones, bit for bit"


@pytest.mark.parametrize("kind", IN_16_BIT)
def test_a_training_taken_up_again_is_repeated_with_its_float32_state(
    trained: dict[str, Trained], small_steps: tuple[str, ...], tmp_path: Path, kind: str
) -> None:
    resumed = ["--restore-file", str(trained[kind].checkpoint), "--max-update", "5"]
    run = _train(tmp_path, *small_steps, *FLAGS[kind], *resumed).run
    assert run.steps == [4]
    # fairseq keeps the 16-bit model in its checkpoint and makes new masters of it.
    before = {name: tensor.half() for name, tensor in trained[kind].run.parameters(4).items()}
    assert [
        name for name, tensor in run.parameters(4).items() if not torch.equal(tensor, before[name].to(tensor))
    ] == []
    state = run.optimizer_state()
    assert state is not None
    assert {entry["exp_avg_sq"].dtype for entry in state.values()} == {torch.float32}
    report = check_update(run, load_workload(run.path, run.manifest, None, None), data=False)
    assert report.text.startswith("step 4 done again: losses and parameters are the recorded ones")


def test_another_loss_scale_is_told_as_rounding_and_a_wrong_update_is_refused(trained: dict[str, Trained]) -> None:
    run = trained["masters"].run
    workload: Any = load_workload(run.path, run.manifest, None, None)
    workload._config.common.fp16_init_scale = 1
    report = check_update(run, workload, data=False)
    assert (
        report.text == "steps 0, 1 done again: losses and parameters are the recorded ones within rounding of float16"
    )
    assert not report.exact
    workload = load_workload(run.path, run.manifest, None, None)
    workload._config.optimizer.adam_betas = "(0.0,0.98)"
    with pytest.raises(MismatchError, match=r"step 1 done again gives other parameters.*\(allowed 0\.2\)"):
        check_update(run, workload, data=False)


@pytest.mark.parametrize("kind", IN_16_BIT)
def test_replay_computes_in_float32_and_the_books_balance(
    trained: dict[str, Trained], kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained[kind].path, tmp_path / "run"))
    assert replay(["--run", str(run), "--workers", "1", "--loss-data", "batch", "--loss-data", "probe:32"]) == 0
    assert "done again: losses and parameters are the recorded ones, bit for bit" in capsys.readouterr().err
    found = 0
    for folder in shards.folders(run):
        for start, stop in folder.finished():
            per_step = folder.read(start, stop).per_step
            change = per_step["loss_end"] - per_step["loss_start"]
            # The first update has learning rate 0.
            moving = per_step["lr"] > 0
            found += int(moving.sum())
            assert (abs(change[moving]) > 1e-3).all()
            assert (abs(per_step["residual"][moving]) < 5e-3 * abs(change[moving])).all()
    assert found == 2 * 3
