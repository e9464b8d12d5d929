"""The callback for Lightning's Trainer: what it records, that it changes nothing, and what it refuses."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from recorder import RecordedBatchSampler
from recorder.errors import UsageError
from recorder.integrations.lightning_callback import RecorderCallback
from recorder.recording import RecorderWarning
from recorder.recovery import recover
from recorder.runformat import Run
from tests.external.whole_way import ROOT, go_the_whole_way

pytestmark = [
    # Which component a parameter belongs to is another matter.
    pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning"),
    # Lightning itself uses what torch deprecates, and gives advice.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:Found `dataloader_iter` argument:UserWarning"),
]

EXAMPLES = 12


class Examples(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return EXAMPLES

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": index, "x": torch.randn(4, generator=torch.Generator().manual_seed(index))}


class Stream(IterableDataset[dict[str, Any]]):
    """Without a length: Lightning fetches one batch ahead."""

    def __iter__(self) -> Any:
        return iter([Examples()[index] for index in range(EXAMPLES)])


class Module(pl.LightningModule):  # type: ignore[misc]
    def __init__(self, overflowing: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 2))
        self.overflowing = overflowing
        self.trained_on: list[list[int]] = []
        self.thetas = [self.theta()]

    def theta(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self.named_parameters()}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.trained_on.append(batch["id"].tolist())
        loss: torch.Tensor = self.net(batch["x"]).float().square().mean()
        return loss * float("inf") if batch_idx in self.overflowing else loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.thetas.append(self.theta())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch["x"])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def fit(
    module: Any, *callbacks: Any, data: Any = None, ckpt_path: Any = None, validate: bool = False, **settings: Any
) -> Any:
    data = DataLoader(Examples(), batch_size=2, shuffle=True) if data is None else data
    plain = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        callbacks=list(callbacks), **plain | {"enable_checkpointing": False, "max_epochs": 1} | settings
    )
    torch.manual_seed(5)
    valid = DataLoader(Examples(), batch_size=4) if validate else None
    trainer.fit(module, data, valid, ckpt_path=ckpt_path)
    return trainer


def indices(run: Path) -> list[list[list[int]]]:
    opened = Run(run)
    return [[entry.indices.tolist() for entry in opened.step(t).micro_batches] for t in opened.steps]


def test_the_example_goes_the_whole_way_with_balanced_books(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    go_the_whole_way("lightning_trainer.py", "runs/lightning", tmp_path / "run", capsys, steps=24)
    assert Run(tmp_path / "run").manifest.trainer.name == "lightning"


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate_grad_batches": 4, "gradient_clip_val": 0.01, "validate": True, "val_check_interval": 2},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
    ],
    ids=["plain", "accumulated, clipped, validated", "bf16-mixed", "bf16-true"],
)
def test_training_is_the_same_to_the_bit_and_recorded_as_the_module_saw_it(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    without, module = Module(), Module()
    fit(without, max_epochs=2, **settings)
    fit(module, RecorderCallback(tmp_path / "run", indices="id", strict=True), max_epochs=2, **settings)
    for one, other in zip(module.thetas, without.thetas, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    run = Run(tmp_path / "run")
    assert run.manifest.state == "complete"
    # The last update of an epoch takes what batches are left: six, in fours.
    group = [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11]] if len(settings) > 1 else [[k] for k in range(12)]
    assert indices(tmp_path / "run") == [[module.trained_on[k] for k in positions] for positions in group]
    assert [run.step(t).epoch for t in run.steps] == [1] * (len(group) // 2) + [2] * (len(group) // 2)
    for t, positions in enumerate(group):
        recorded = run.parameters(t + 1)
        assert all(torch.equal(recorded[name], tensor) for name, tensor in module.thetas[positions[-1] + 1].items())
    assert run.manifest.recipe.get("autocast") == ("bfloat16" if settings.get("precision") == "bf16-mixed" else None)


@pytest.mark.parametrize("scaled", [False, True])
def test_losses_are_told_as_the_sum_that_the_mean_was_made_of(tmp_path: Path, scaled: bool) -> None:
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=64.0))] if scaled else []
    callback = RecorderCallback(
        tmp_path / "run", indices="id", predictions=lambda batch: 2 * len(batch["x"]), strict=True
    )
    module = Module()
    module.net[2] = nn.Identity()
    fit(module, callback, plugins=plugins, accumulate_grad_batches=2, limit_train_batches=2)
    (step,) = [Run(tmp_path / "run").step(0)]
    module.load_state_dict(module.thetas[0])
    for micro_batch in step.micro_batches:
        with torch.autocast("cpu", torch.float16, enabled=scaled):
            expected = module.net(micro_batch.batch()["x"]).float().square().sum()
        assert micro_batch.loss_sum == pytest.approx(float(expected.detach()), rel=1e-6)
        assert micro_batch.predictions == 4


def by_function(batch: Any) -> Any:
    return batch["id"]


@pytest.mark.parametrize("steps", ["all", "1:3"])
@pytest.mark.parametrize("where", ["id", by_function, None], ids=["key", "function", "sampler"])
def test_indices_come_from_the_batch_or_the_sampler(tmp_path: Path, where: Any, steps: str) -> None:
    sampler = RecordedBatchSampler(BatchSampler(RandomSampler(Examples()), batch_size=2, drop_last=False))
    loader = DataLoader(Examples(), batch_sampler=sampler) if where is None else DataLoader(Examples(), batch_size=2)
    module = Module()
    callback = RecorderCallback(tmp_path / "run", indices=where, steps=steps, strict=True)
    fit(module, callback, data=loader, max_epochs=2)
    kept = range(12) if steps == "all" else range(1, 3)
    assert indices(tmp_path / "run") == [[module.trained_on[t]] for t in kept]


@pytest.mark.filterwarnings("ignore:train_dataloader yielded None:UserWarning")
def test_a_batch_that_is_none_takes_its_indices_with_it(tmp_path: Path) -> None:
    def collate(examples: list[dict[str, Any]]) -> Any:
        batch = torch.utils.data.default_collate(examples)
        return None if {0, 6} & set(batch["id"].tolist()) else batch

    sampler = RecordedBatchSampler(BatchSampler(SequentialSampler(Examples()), batch_size=2, drop_last=False))
    module = Module()
    callback = RecorderCallback(tmp_path / "run", strict=True)
    fit(module, callback, data=DataLoader(Examples(), batch_sampler=sampler, collate_fn=collate), max_epochs=2)
    assert indices(tmp_path / "run") == [[[2, 3]], [[4, 5]], [[8, 9]], [[10, 11]]] * 2


def test_a_batch_that_was_prefetched_is_announced_when_it_is_trained_on(tmp_path: Path) -> None:
    module = Module()
    callback = RecorderCallback(tmp_path / "run", indices="id", strict=True)
    fit(module, callback, data=DataLoader(Stream(), batch_size=2), max_epochs=1)
    assert indices(tmp_path / "run") == [[[2 * k, 2 * k + 1]] for k in range(6)] == [[k] for k in module.trained_on]


def test_without_indices_it_says_so_and_records_the_batches(tmp_path: Path) -> None:
    with pytest.warns(RecorderWarning, match="without the data set indices of their examples: pass indices=KEY"):
        fit(Module(), RecorderCallback(tmp_path / "run"), limit_train_batches=1)
    assert Run(tmp_path / "run").step(0).micro_batches[0].stored


def test_a_batch_that_a_hook_skips_and_the_epoch_with_it_belong_to_no_step(tmp_path: Path) -> None:
    class Leaves(Module):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
            return -1 if batch_idx == 3 else None

    module = Leaves()
    callback = RecorderCallback(tmp_path / "run", indices="id", strict=True)
    fit(module, callback, accumulate_grad_batches=2, max_epochs=2)
    trained = module.trained_on
    assert indices(tmp_path / "run") == [[trained[0], trained[1]], [trained[3], trained[4]]]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks:UserWarning")
def test_checkpoints_follow_what_is_on_the_disk_and_resuming_goes_on_in_the_same_run(tmp_path: Path) -> None:
    class Killed(pl.Callback):  # type: ignore[misc]
        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
            shutil.copytree(tmp_path / "run", tmp_path / "killed", dirs_exist_ok=True)

    keeps = pl.callbacks.ModelCheckpoint(tmp_path / "kept", every_n_train_steps=4, save_top_k=-1)
    whole = Module()
    loader = DataLoader(Examples(), batch_size=2)
    fit(
        whole, RecorderCallback(tmp_path / "run", indices="id", strict=True), Killed(), keeps,
        data=loader, enable_checkpointing=True, max_steps=6, max_epochs=-1,
    )  # fmt: skip
    recover(tmp_path / "killed")
    assert Run(tmp_path / "killed").steps == [0, 1, 2, 3]
    again = Module()
    (checkpoint,) = (tmp_path / "kept").glob("*step=4.ckpt")
    fit(
        again, RecorderCallback(tmp_path / "run", indices="id", strict=True),
        data=loader, ckpt_path=checkpoint, max_steps=8, max_epochs=-1,
    )  # fmt: skip
    run = Run(tmp_path / "run")
    assert run.steps == list(range(8))
    assert [attempt.joined for attempt in run.manifest.attempts] == ["first", "verified"]
    assert [attempt.first_step for attempt in run.manifest.attempts] == [0, 4]
    assert all(torch.equal(run.parameters(8)[name], tensor) for name, tensor in again.theta().items())


def test_updates_that_the_scaler_skips_are_no_steps_and_resuming_knows_of_them(tmp_path: Path) -> None:
    def plugins() -> list[Any]:
        return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))]

    loader = DataLoader(Examples(), batch_size=2)
    module = Module(overflowing=(1, 2))
    trainer = fit(
        module, RecorderCallback(tmp_path / "run", indices="id", strict=True),
        data=loader, plugins=plugins(), accumulate_grad_batches=2,
    )  # fmt: skip
    assert trainer.global_step == 3
    assert indices(tmp_path / "run") == [[[8, 9], [10, 11]]]
    assert Run(tmp_path / "run").manifest.recipe["autocast"] == "float16"
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    fit(
        Module(), RecorderCallback(tmp_path / "run", indices="id", strict=True),
        data=loader, plugins=plugins(), accumulate_grad_batches=2, ckpt_path=tmp_path / "last.ckpt", max_epochs=2,
    )  # fmt: skip
    run = Run(tmp_path / "run")
    assert run.steps == [0, 1, 2, 3]
    assert [(entry.first_step, entry.joined) for entry in run.manifest.attempts] == [(0, "first"), (1, "verified")]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """After Ctrl-C Lightning leaves its process deaf to another, and every child of it."""
    handler = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_training_keeps_its_steps_and_says_why(tmp_path: Path, error: type[BaseException]) -> None:
    class Ends(Module):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                raise error

    callback = RecorderCallback(tmp_path / "run", indices="id", strict=True)
    with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
        fit(Ends(), callback)
    run = Run(tmp_path / "run")
    assert run.steps == [0, 1, 2]
    assert run.manifest.state == f"incomplete: training ended with {error.__name__}"
    assert callback.recording is None


_TWO_PROCESSES = """
import sys
from tests.external.test_lightning import Module, RecorderCallback, fit
callback = RecorderCallback(sys.argv[1], indices="id", strict=True)
fit(Module(), callback, strategy="ddp_fork", devices=2, accumulate_grad_batches=2)
"""


def test_of_two_processes_each_records_its_own_micro_batches(tmp_path: Path) -> None:
    # In a process of its own: this one has threads, and is not to be forked.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, "-W", "ignore", "-c", _TWO_PROCESSES, str(tmp_path / "run")]
    ended = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    run = Run(tmp_path / "run")
    assert run.steps == [0, 1]
    assert run.manifest.state == "complete"
    found = [[(entry.rank, entry.indices.tolist()) for entry in run.step(t).micro_batches] for t in run.steps]
    assert [[rank for rank, _ in step] for step in found] == [[0, 0, 1, 1], [0, 1]]
    assert sorted(index for step in found for _, entry in step for index in entry) == list(range(EXAMPLES))


def test_a_submodule_is_recorded_under_its_own_names(tmp_path: Path) -> None:
    module = Module()
    fit(module, RecorderCallback(tmp_path / "run", indices="id", model="net", strict=True))
    recorded = Run(tmp_path / "run").parameters(6)
    assert recorded.keys() == dict(module.net.named_parameters()).keys()
    assert all(torch.equal(recorded[name], tensor) for name, tensor in module.net.named_parameters())


def test_manual_optimization_is_recorded_too(tmp_path: Path) -> None:
    class Manual(Module):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
            loss = super().training_step(batch, batch_idx)
            optimizer = self.optimizers()
            self.manual_backward(loss)
            if batch_idx % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()

    module = Manual()
    fit(module, RecorderCallback(tmp_path / "run", indices="id", predictions=len, strict=True))
    assert indices(tmp_path / "run") == [module.trained_on[:3], module.trained_on[3:]]


class Several(Module):
    automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[3])]


class FetchesItself(Module):
    def training_step(self, dataloader_iter: Any) -> None:  # type: ignore[override]
        next(dataloader_iter)


@pytest.mark.parametrize(
    ("make", "settings", "told"),
    [
        (Several, {}, r"one torch optimizer .* found 2 \(SGD, SGD\).* several parameter groups"),
        (FetchesItself, {}, r"write training_step\(batch, batch_idx\)"),
        (Module, {"model": "head"}, r"model='head': Module has no such submodule; its submodules are net"),
        (Module, {"quota": 0}, "quota is at least 1"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_it_trains(
    tmp_path: Path, make: Callable[[], Any], settings: dict[str, Any], told: str
) -> None:
    module = make()
    with pytest.raises(UsageError, match=told):
        fit(module, RecorderCallback(tmp_path / "run", indices="id", **settings))
    assert not module.trained_on
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_strategy_that_spreads_parameters_is_refused(tmp_path: Path) -> None:
    class FSDPStrategy:
        pass

    trainer = type("Trainer", (), {"optimizers": [torch.optim.SGD([nn.Parameter(torch.ones(1))])]})()
    trainer.strategy = FSDPStrategy()
    with pytest.raises(UsageError, match=r"FSDPStrategy: .* on one device or with strategy='ddp'"):
        RecorderCallback(tmp_path / "run").on_train_start(trainer, Module())


@pytest.mark.filterwarnings("ignore::lightning_fabric.utilities.warnings.PossibleUserWarning")
def test_the_trainer_of_pytorch_lightning_takes_it_too(tmp_path: Path) -> None:
    class Own(pytorch_lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 2)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.net(batch["x"]).square().mean()
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    pytorch_lightning.Trainer(
        callbacks=[RecorderCallback(tmp_path / "run", indices="id", strict=True)],
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    ).fit(Own(), DataLoader(Examples(), batch_size=2))  # fmt: skip
    assert indices(tmp_path / "run") == [[[0, 1]], [[2, 3]]]
