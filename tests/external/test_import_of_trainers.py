"""Checkpoints as the trainers themselves write them, imported and replayed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from recorder.__main__ import main as recorder_main
from recorder.chordrun import open_run
from replay.__main__ import main as replay_main
from tests.external import checkpoint_workloads, conftest

# Tiny models of other families need no naming rule here, and the trainers warn of their own deprecations.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def replayed(source: Path, run: Path, workload: str, states: Mapping[int, Mapping[str, torch.Tensor]]) -> int:
    """Import and replay; the parameters must be those of the training."""
    name = f"tests.external.checkpoint_workloads:{workload}"
    assert recorder_main(["import", str(source), "--run", str(run), "--workload", name]) == 0
    opened = open_run(run)
    assert opened.manifest.checkpoints == tuple(states)
    for k, state in enumerate(states.values()):
        assert opened.manifest.trained
        for parameter, tensor in opened.parameters(k).items():
            assert torch.equal(tensor, state[parameter])
    arguments = ["--run", str(run), "--workload", name, "--workers", "1", "--loss-data", "probe:16"]
    return replay_main(arguments)


def trained(workload: Any, updates: int) -> Any:
    """Yield a model before the first update and after each."""
    torch.manual_seed(0)
    model = workload.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for done in range(updates + 1):
        yield done, model
        loss_sum, predictions = workload.loss(model, workload.batch(workload.indices("train"), split="train", epoch=1))
        (loss_sum / predictions).backward()
        optimizer.step()
        optimizer.zero_grad()


def copied(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("shard", ["1GB", "3KB"])
def test_transformers_save_pretrained(shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    states = {}
    for done, model in trained(checkpoint_workloads.gpt2(), 4):
        if done % 2 == 0:
            model.save_pretrained(tmp_path / "out" / f"checkpoint-{done}", max_shard_size=shard)
            states[done] = copied(model)
    files = list((tmp_path / "out" / "checkpoint-2").glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "3KB")
    assert replayed(tmp_path / "out", tmp_path / "run", "gpt2", states) == 0
    # The weight that is tied stands once.
    (embedding,) = (row for row in open_run(tmp_path / "run").manifest.parameters if row.aliases)
    assert embedding.aliases == ("lm_head.weight",)
    linked = next((tmp_path / "run" / "checkpoints" / "00000002").glob("*.safetensors"))
    assert linked.stat().st_ino in {file.stat().st_ino for file in files}


def test_transformers_base_model_is_found_behind_the_prefix_of_its_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    states = {}
    for done, model in trained(checkpoint_workloads.gpt2(), 2):
        transformers.GPT2Model.save_pretrained(model.transformer, tmp_path / "out" / f"checkpoint-{done}")
        states[done] = copied(model)
    # Their names lack the model's "transformer.".
    assert replayed(tmp_path / "out", tmp_path / "run", "gpt2", states) == 0


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    workload = checkpoint_workloads.plain()
    states: dict[int, dict[str, torch.Tensor]] = {}

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self, width: int = 8) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = workload.model()

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss_sum, predictions = workload.loss(self.net, workload.batch(batch.tolist(), split="train", epoch=1))
            return loss_sum / predictions

        def on_train_batch_end(self, *_: Any) -> None:
            states[self.trainer.global_step] = copied(self.net)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    checkpoint = lightning.callbacks.ModelCheckpoint(
        dirpath=tmp_path / "checkpoints", every_n_train_steps=2, save_top_k=-1, save_last=True
    )
    trainer = lightning.Trainer(
        max_steps=6,
        accelerator="cpu",
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    torch.manual_seed(0)
    loader = torch.utils.data.DataLoader(workload.indices("train"), batch_size=8)  # type: ignore[arg-type, var-annotated]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on this loader, and torch's to Lightning
        trainer.fit(Module(), loader)
    wanted = {t: states[t] for t in (2, 4, 6)}
    assert replayed(tmp_path, tmp_path / "run", "plain", wanted) == 0


@pytest.mark.fairseq
def test_fairseq(
    trainings: dict[str, conftest.Training],
    arguments: dict[str, tuple[str, ...]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    training = trainings["causal"]
    monkeypatch.setenv(checkpoint_workloads.FAIRSEQ_ARGUMENTS, json.dumps(arguments["causal"]))
    own = [argument for argument in arguments["causal"] if argument != "--no-epoch-checkpoints"]
    saved = tmp_path / "saved"
    conftest._wait(
        conftest._call(
            ["-c", conftest._STOCK, json.dumps([[*own, "--save-interval-updates", "1", "--save-dir", str(saved)]])]
        )
    )
    assert len(list(saved.glob("checkpoint*.pt"))) > 4
    # The recorded run of the same training knows the truth.
    recorded = open_run(training.run)
    states = {t: recorded.parameters(t) for t in (1, 2, 3, 4)}
    capsys.readouterr()
    assert replayed(saved, tmp_path / "run", "fairseq", states) == 0
    said = capsys.readouterr().err
    assert "checkpoint_last.pt is a copy of" in said
    # One of fairseq's buffers is memory that nobody sets; it is held at what the checkpoint says.
    assert set(open_run(tmp_path / "run").manifest.buffers) <= {"decoder.embed_positions._float_tensor"}
    assert [open_run(tmp_path / "run").step(k).epoch for k in range(3)] == [1, 1, 2]
