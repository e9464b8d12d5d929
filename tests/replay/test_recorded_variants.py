"""Runs that hold more, or less, than every step of a plain training: buffers, gaps, attempts, a kill."""

from __future__ import annotations

import atexit
import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import recorder
from recorder.manifest import Manifest
from recorder.recording import RecorderWarning, Recording
from recorder.runformat import Run
from reduce import cube
from reduce.__main__ import main as reduce_main
from replay import shards
from replay.shards import ShardFolder, Status
from replay.work import replayer
from tests import cases

Command = Callable[..., int]
Find = Callable[[Path, str], ShardFolder]
Captured = pytest.CaptureFixture[str]


class Normalised(nn.Module):
    """A classifier with batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.last(functional.gelu(self.norm(self.first(x))))
        return out


class Classification:
    def _examples(self) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(3)
        return torch.randn(32, 4, generator=generator) * 2 + 1, torch.randint(3, (32,), generator=generator)

    def model(self) -> nn.Module:
        return Normalised()

    def indices(self, split: str) -> Sequence[int]:
        return range(32)

    def batch(self, indices: Sequence[int], *, split: str, epoch: int) -> Any:
        inputs, labels = self._examples()
        return {"x": inputs[list(indices)], "y": labels[list(indices)]}

    def loss(self, model: nn.Module, batch: Any) -> tuple[torch.Tensor, torch.Tensor | float]:
        return functional.cross_entropy(model(batch["x"]), batch["y"], reduction="sum"), len(batch["y"])


def classification() -> Classification:
    """What ``--workload tests.replay.test_recorded_variants:classification`` names."""
    return Classification()


def record_normalised(run: Path, steps: int = 4) -> list[dict[str, torch.Tensor]]:
    """Train with batch normalisation; return the model's state before every forward pass and after the last step."""
    torch.manual_seed(0)
    task, model = classification(), Normalised()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    with recorder.watch(
        model, optimizer, run=run, workload="tests.replay.test_recorded_variants:classification", strict=True
    ) as rec:
        for step in range(steps):
            indices = list(range(step * 8, step * 8 + 8))
            batch = task.batch(indices, split="train", epoch=1)
            seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
            rec.batch(indices, batch)
            loss_sum, count = task.loss(model, batch)
            rec.loss(loss_sum, count)
            (loss_sum / count).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return seen


@pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")
def test_buffers_are_held_at_those_of_the_steps_start_and_the_cube_says_so(
    tmp_path: Path, replay: Command, folder: Find
) -> None:
    seen = record_normalised(tmp_path / "run")
    assert replay(tmp_path / "run", loss_data=("batch", "probe:8")) == 0
    probe = folder(tmp_path / "run", "probe")
    read = [probe.read(start, stop).per_step for start, stop in probe.finished()]
    start, end = (np.concatenate([rows[name] for rows in read]) for name in ("loss_start", "loss_end"))
    # The loss of both ends by a model that shares nothing with the engine.
    task = classification()
    drawn = np.random.default_rng(0).choice(32, size=8, replace=False).tolist()
    batch = task.batch(drawn, split="train", epoch=1)
    for step in range(4):
        for found, theta in ((start[step], seen[step]), (end[step], seen[step + 1])):
            model = Normalised()
            buffers = {name: seen[step][name] for name, _ in model.named_buffers()}
            model.load_state_dict({**theta, **buffers})
            loss_sum, count = task.loss(model.eval(), batch)
            assert found == pytest.approx(loss_sum.item() / float(count), rel=1e-6)
    assert (end[:-1] != start[1:]).all()
    assert np.concatenate([rows["evaluations"] for rows in read]).tolist() == [3] * 4
    assert reduce_main(["--run", str(tmp_path / "run")]) == 0
    with cube.open_cube(tmp_path / "run" / "lca.nc") as ds:
        assert ds.attrs["buffers"] == (
            "held along every step at their values before it: norm.running_mean, norm.running_var, "
            "norm.num_batches_tracked"
        )


def test_a_strided_run_is_replayed_at_its_steps_alone(tmp_path: Path, replay: Command, folder: Find) -> None:
    cases.train(tmp_path / "run", steps=9, steps_to_record="1:9:3", segment_steps=2)
    assert Run(tmp_path / "run").consecutive == [(1, 2), (4, 5), (7, 8)]
    assert replay(tmp_path / "run") == 0
    assert folder(tmp_path / "run", "batch").finished() == [(1, 2), (4, 5), (7, 8)]
    cases.train(tmp_path / "whole", steps=9)
    assert replay(tmp_path / "whole") == 0
    strided, whole = (_sums(folder(tmp_path / name, "batch")) for name in ("run", "whole"))
    assert sorted(strided) == [1, 4, 7]
    assert all((strided[step] == whole[step]).all() for step in strided)


def _sums(found: ShardFolder) -> dict[int, Any]:
    sums = {}
    for start, stop in found.finished():
        shard = found.read(start, stop)
        assert (shard.per_step["status"] == Status.CONVERGED).all()
        for row in range(stop - start):
            sums[start + row] = np.concatenate([array[row] for array in shard.per_unit["sum"].values()])
    return sums


def restarted(run: Path, first: int, steps: int) -> None:
    """Go on with the recorded training from step `first`, on other batches than before."""
    torch.manual_seed(1)
    task = cases.workload()
    model = task.model()
    model.load_state_dict(Run(run).parameters(first), strict=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    with recorder.watch(
        model, optimizer, run=run, workload="tests.cases:workload", first_step=first, strict=True
    ) as rec:
        for step in range(steps):
            indices = list(range(step, step + 8))
            batch = task.batch(indices, split="train", epoch=1)
            rec.batch(indices, batch)
            loss_sum, count = task.loss(model, batch)
            rec.loss(loss_sum, count)
            (loss_sum / count).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()


def test_shards_of_steps_that_a_restarted_training_redid_are_replaced_and_the_others_kept(
    run: Path, replay: Command, folder: Find, capsys: Captured
) -> None:
    assert replay(run, "--chunk", "2") == 0
    found = folder(run, "batch")
    kept = found.file(0, 2).stat().st_mtime_ns
    before = _sums(found)
    restarted(run, first=3, steps=2)
    assert Run(run).steps == [0, 1, 2, 3, 4]
    capsys.readouterr()
    replayer.cache_clear()  # another process would replay it
    assert replay(run, "--chunk", "2") == 0
    assert f"{run}: 2 shards of steps that were recorded anew are removed" in capsys.readouterr().err
    assert found.finished() == [(0, 2), (2, 4), (4, 5)]
    assert found.file(0, 2).stat().st_mtime_ns == kept
    after = _sums(found)
    assert (after[2] == before[2]).all()
    assert (after[3] != before[3]).any()


def test_what_a_killed_training_left_in_the_making_is_recovered_and_replayed(
    tmp_path: Path, replay: Command, folder: Find, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def killed(recording: Recording, *_: object) -> None:
        recording.flush()
        assert recording._folder is not None
        recording._folder.release()  # what the system does for a process that dies
        atexit.unregister(recording._close_at_exit)

    monkeypatch.setattr(Recording, "__exit__", killed)
    cases.train(run, steps=5, segment_steps=3)
    assert Run(run).steps == [0, 1, 2]
    assert replay(run) == 0
    assert f"{run}: recovered steps 3-4, which a killed training left in the making" in capsys.readouterr().err
    assert Manifest.read(run).state == "incomplete: the training was killed"
    assert sorted(_sums(folder(run, "batch"))) == [0, 1, 2, 3, 4]


def test_cells_of_parameters_that_were_left_out_are_not_a_number_and_counted(tmp_path: Path, replay: Command) -> None:
    run = tmp_path / "run"
    cases.train(run, frozen="decoder.layers.1.fc1", parameters=["!decoder.layers.1.fc1.*"])
    assert replay(run) == 0
    assert reduce_main(["--run", str(run)]) == 0
    with cube.open_cube(run / "lca.nc") as ds:
        left_out, kept = (ds.sel(layer=layer, component="W1") for layer in ("decoder.1", "decoder.0"))
        assert left_out.lca.isnull().all()
        assert (int(left_out.n_parameters), int(left_out.n_not_recorded)) == (0, 8 * 16 + 16)
        assert kept.lca.notnull().all()
        assert (int(kept.n_parameters), int(kept.n_not_recorded)) == (8 * 16 + 16, 0)


def test_parameters_that_were_left_out_but_move_are_refused(tmp_path: Path, replay: Command, capsys: Captured) -> None:
    run = tmp_path / "run"
    with pytest.warns(RecorderWarning, match=r"decoder\.layers\.1\.fc1\.bias, decoder\.layers\.1\.fc1\.weight change"):
        cases.train(run, parameters=["!decoder.layers.1.fc1.*"])
    assert replay(run) == 2
    assert "decoder.layers.1.fc1.weight changed in training although no step records them" in capsys.readouterr().err


def test_shards_tell_which_attempts_recorded_their_steps(run: Path, replay: Command, folder: Find) -> None:
    restarted(run, first=3, steps=2)
    assert replay(run) == 0
    found = folder(run, "batch")
    (entry,) = found.finished()
    raw = found.file(*entry).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    facts = json.loads(json.loads(raw[8 : 8 + length])["__metadata__"]["facts"])
    assert facts["attempts"] == [[1, 0, 3], [2, 3, 5]]
    assert shards.VERSION == 1
    assert dataclasses.asdict(Manifest.read(run).attempts[1])["joined"] == "verified"
