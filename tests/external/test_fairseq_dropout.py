"""With dropout as recorded, the gradient at the start of a step is the one that fairseq's optimizer got."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from recorder.__main__ import main
from recorder.loading import load_workload
from recorder.runformat import Run
from replay.__main__ import main as replay_main
from replay.gradients import LossSurface
from replay.precision import PRECISIONS
from replay.shards import folders
from replay.work import replayer
from tests.external.conftest import TASKS

if importlib.util.find_spec("fairseq") is None:
    pytest.skip("needs fairseq 0.12.2", allow_module_level=True)

pytestmark = pytest.mark.fairseq


@pytest.mark.parametrize("task", TASKS)
def test_the_gradient_at_the_start_of_every_step_is_the_trainings_bit_for_bit(
    arguments: dict[str, tuple[str, ...]], task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.import_module("recorder.integrations.fairseq_import")
    optimizer_class = importlib.import_module("fairseq.optim.fairseq_optimizer").FairseqOptimizer
    summed: list[list[torch.Tensor | None]] = []
    factors: list[float] = []
    multiply = optimizer_class.multiply_grads

    def noting(self: Any, factor: Any) -> None:
        # The sum over the micro-batches, which fairseq now normalises, and then clips.
        summed.append([None if tensor.grad is None else tensor.grad.clone() for tensor in self.params])
        factors.append(float(factor))
        multiply(self, factor)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(optimizer_class, "multiply_grads", noting)
            command = ["fairseq-train", "--record-dir", str(tmp_path / "run")]
            assert main([*command, *arguments[task], "--save-dir", str(tmp_path / "out")]) == 0
        run = Run(tmp_path / "run")
        workload = load_workload(run.path, run.manifest, None, None)
        names = [name for name, _ in workload.model().named_parameters()]
        trained = [row.name for row in run.manifest.trained]
        surface = LossSurface(workload, trained, run.untrained(), torch.device("cpu"), PRECISIONS["float32"])
        assert run.steps == [0, 1, 2, 3]
        assert len(run.step(0).micro_batches) == 2
        for t in run.steps:
            step = run.step(t)
            found = surface.evaluate(
                run.parameters(t),
                [micro_batch.batch() for micro_batch in step.micro_batches],
                states=[micro_batch.random_state for micro_batch in step.micro_batches],
            )
            got = {name: entry for name, entry in zip(names, summed[t], strict=True) if entry is not None}
            assert found.gradient.keys() == set(trained) <= got.keys()
            for name, gradient in found.gradient.items():
                assert torch.equal(gradient, got[name] / step.predictions), name
                # fairseq multiplies by the rounded reciprocal where we divide: at most two units in the last place.
                torch.testing.assert_close(gradient, got[name] * factors[t], rtol=2.4e-7, atol=0)
            assert factors[t] == pytest.approx(1 / step.predictions, rel=1e-7)
        replayer.cache_clear()
        shared = ["--run", str(run.path), "--loss-data", "batch", "--workers", "1", "--rule", "simpson", "--rtol", "1"]
        assert replay_main([*shared, "--dropout", "recorded"]) == 0
        (folder,) = folders(run.path)
        loss_start = folder.read(0, 4).per_step["loss_start"]
        for t in run.steps:
            measured = sum(float(micro_batch.loss_sum or 0) for micro_batch in run.step(t).micro_batches)
            assert loss_start[t] == measured / run.step(t).predictions
    finally:
        torch.set_num_threads(threads)
        replayer.cache_clear()
