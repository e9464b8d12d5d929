"""Checkpoints every 20 updates beside the recorded run of the same training: totals agree, all says its path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recorder.__main__ import main as recorder_main
from recorder.chordrun import open_run
from recorder.manifest import CHORD
from recorder.tensorfile import TensorFile
from reduce import open_cube
from reduce.__main__ import main as reduce_main
from replay import lossdata, quadrature
from replay.__main__ import main
from replay.quadrature import CHORD_PIECES
from replay.shards import ShardFolder, folders
from tests import cases, checkpoints
from tests.replay.variants import one_thread

UPDATES, EVERY = 40, 20


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> checkpoints.Training:
    folder = tmp_path_factory.mktemp("chord")
    with one_thread():
        return checkpoints.train(folder / "recorded", updates=UPDATES, every=EVERY)


def imported(training: checkpoints.Training, folder: Path) -> Path:
    source = checkpoints.as_huggingface(folder / "source", training.states)
    run = folder / "chord"
    assert recorder_main(["import", str(source), "--run", str(run), "--workload", checkpoints.WORKLOAD]) == 0
    return run


@pytest.fixture(scope="module")
def both(training: checkpoints.Training, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The recorded run and that of checkpoints, both replayed on the same probe and reduced."""
    chord = imported(training, tmp_path_factory.mktemp("both"))
    with one_thread():
        for run in (training.run, chord):
            arguments = ["--run", str(run), "--workload", "recorded", "--workers", "1", "--loss-data", "probe:48"]
            assert main(arguments) == 0
            assert reduce_main(["--run", str(run)]) == 0
    return training.run, chord


@pytest.fixture
def run(training: checkpoints.Training, tmp_path: Path) -> Path:
    return imported(training, tmp_path)


@pytest.fixture
def replay_(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def command(run: Path, *arguments: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["--run", str(run), "--workload", "recorded", "--workers", "1", *arguments])
        return code, capsys.readouterr().err

    return command


def test_the_totals_of_each_interval_are_those_of_its_recorded_steps(both: tuple[Path, Path]) -> None:
    with open_cube(both[0] / "lca.nc") as recorded, open_cube(both[1] / "lca.nc") as chord:
        assert chord["step"].values.tolist() == [0, 20]
        assert chord["step_end"].values.tolist() == [20, 40]
        assert (recorded["step_end"] == recorded["step"] + 1).all()
        assert recorded["step"].values.tolist() == list(range(UPDATES))
        for start, stop in ((0, 20), (20, 40)):
            steps = recorded.sel(data="probe", step=slice(start, stop - 1))
            interval = chord.sel(data="probe", step=start)
            assert len(steps["step"]) == EVERY
            # The same loss at the same two θ, over the same 48 examples in micro-batches of another size.
            np.testing.assert_allclose(interval["loss_start"], steps["loss_start"][0], rtol=1e-6)
            np.testing.assert_allclose(interval["loss_end"], steps["loss_end"][-1], rtol=1e-6)
            difference = float(interval["lca"].sum() - steps["lca"].sum())
            residuals = float(abs(interval["residual"]) + abs(steps["residual"]).sum())
            assert abs(difference) <= residuals + 1e-5
            assert int(interval["status"]) == 0
            # What the path decides is the split, and it does differ.
            by_component = interval["lca"].sum("layer") - steps["lca"].sum(["step", "layer"])
            assert float(abs(by_component).max()) > 10 * abs(difference)


def test_everything_says_the_path(both: tuple[Path, Path]) -> None:
    (folder,) = folders(both[1])
    assert folder.settings.path == CHORD
    assert folder.updates(0, 2).tolist() == [[0, 20], [20, 40]]
    assert TensorFile(folder.file(0, 2)).array("updates").dtype == np.int64
    (of_recorded,) = folders(both[0])
    assert of_recorded.settings.path == "recorded"
    # Shards of a recorded run are what they were before there were chords.
    assert not any("updates" in TensorFile(of_recorded.file(*part)).names for part in of_recorded.finished())
    with open_cube(both[1] / "lca.nc") as cube:
        assert cube.attrs["path"] == CHORD
        assert json.loads(cube.attrs["provenance"])["run"]["checkpoints"] == [0, 20, 40]
        assert np.isnan(cube["lr"]).all()


def _uses(folder: ShardFolder, name: str) -> list[str]:
    return [row.name for row in folder.trained if name in (row.name, row.tied_to)]


def test_a_chord_is_brute_force_in_float64(
    training: checkpoints.Training, run: Path, replay_: Callable[..., tuple[int, str]]
) -> None:
    # The middles of many equal pieces, by autograd alone.
    replay_(run, "--loss-data", "probe:48", "--dtype", "float64", "--rtol", "1e-7", "--steps", ":20", "--chunk", "1")
    task = cases.workload_float64()
    model = task.model()
    names = dict(model.named_parameters())
    batch = task.batch(list(task.indices("train")), split="train", epoch=1)
    start, end = ({name: training.states[t][name].double() for name in names} for t in (0, EVERY))
    lca = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    pieces = 256
    for piece in range(pieces):
        with torch.no_grad():
            for name, parameter in names.items():
                parameter.copy_(start[name] + (end[name] - start[name]) * (piece + 0.5) / pieces)
        loss, predictions = task.loss(model, batch)
        gradients = torch.autograd.grad(loss / predictions, list(names.values()))
        for name, gradient in zip(names, gradients, strict=True):
            lca[name] += gradient * (end[name] - start[name]) / pieces
    (folder,) = folders(run)
    shard = folder.read(0, 1)
    for name, expected in lca.items():
        row = next(row for row in folder.trained if row.name == name)
        others = [axis for axis in range(len(row.shape)) if axis != row.unit_axis]
        found = sum(shard.per_unit["sum"][use][0] for use in _uses(folder, name))
        np.testing.assert_allclose(found, expected.sum(others) if others else expected, atol=1e-5)


def test_the_default_loss_data_is_a_probe_and_the_self_check_says_what_it_cannot_do(
    run: Path, replay_: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lossdata, "DEFAULT_OF_CHORD", ("probe:32",))
    code, said = replay_(run)
    assert code == 0
    assert (
        f"{run}: path chord, 3 checkpoints from update 0 to 40; loss data probe; adaptive rule; 2 intervals to do"
        in said
    )
    assert "self-check: no update lies between two checkpoints by itself: none was done again; " in said
    assert "two passes over the checkpoint after 0 updates on probe agree bit for bit" in said
    assert "replay: 2 of 2 intervals" in said
    assert "probe: 2 intervals (2 converged)" in said
    assert "nat at the one from update" in said


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ("--loss-data", "batch"),
            "--loss-data batch: {run} is of path chord: of the updates between two checkpoints no",
        ),
        (("--dropout", "recorded"), "--dropout recorded: {run} is of path chord: no random states of the training"),
        (("--follow",), "--follow: {run} is of path chord: checkpoints are imported, not recorded"),
        (("--prune",), "--prune: {run} is of path chord: the checkpoints of a run are kept"),
        (
            ("--per-parameter", "0:30"),
            "--per-parameter: update 30 is no checkpoint of {run}, and what lies between two",
        ),
    ],
)
def test_what_only_a_recorded_run_has_is_refused_in_one_line(
    arguments: tuple[str, ...], complaint: str, run: Path, replay_: Callable[..., tuple[int, str]]
) -> None:
    code, said = replay_(run, *arguments)
    assert (code, said.count("\n")) == (2, 1)
    assert complaint.format(run=run) in said


def test_steps_are_updates_and_windows_are_named_by_them(run: Path, replay_: Callable[..., tuple[int, str]]) -> None:
    arguments = ("--loss-data", "probe:32", "--chunk", "1", "--per-parameter", "20:40")
    _, said = replay_(run, *arguments, "--steps", "25:30")
    assert "1 intervals to do in 1 shards" in said
    (folder,) = folders(run)
    assert folder.finished() == [(1, 2)]
    everything = (*arguments[:-1], "all")
    _, said = replay_(run, *everything, "--steps", "25:30", "--overwrite")
    assert "probe: entries of steps 0:40 are there for 1 of 2 chunks; replay the others too" in said
    _, said = replay_(run, *arguments)
    assert "1 intervals to do in 1 shards" in said
    assert folder.finished() == [(0, 1), (1, 2)]
    entries = folder.path / "entries-00000001-00000002.safetensors"
    shard = folder.read(1, 2)
    with_entries = TensorFile(entries)
    for name in (row.name for row in folder.trained if row.tied_to is None):
        total = sum(float(shard.per_unit["sum"][use].sum()) for use in _uses(folder, name))
        assert float(with_entries.tensor(name).sum()) == pytest.approx(total, abs=1e-9)


def test_a_gap_in_the_cube_is_told_in_updates(
    run: Path, replay_: Callable[..., tuple[int, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    replay_(run, "--loss-data", "probe:32", "--chunk", "1")
    replay_(run, "--loss-data", "valid:8", "--chunk", "1", "--steps", "0:20")
    capsys.readouterr()
    assert reduce_main(["--run", str(run)]) == 0
    said = capsys.readouterr().err
    assert "valid: not replayed: steps 20-39; NaN there, with status missing" in said
    assert "probe: 2 intervals, Σ LCA" in said
    with open_cube(run / "lca.nc") as cube:
        assert cube["status"].sel(data="valid").values.tolist() == [0, 4]


def test_a_dry_run_counts_checkpoints(run: Path, replay_: Callable[..., tuple[int, str]]) -> None:
    code, said = replay_(run, "--loss-data", "probe:32", "--dry-run")
    assert code == 0
    size = sum(tensor.numel() for tensor in cases.workload().model().parameters()) * 4
    assert f"to read                  {3 * size / 1000:.1f} kB of checkpoints" in said
    assert "intervals to do          2 in 1 chunks" in said
    assert "2 intervals, 0, 20: " in said


def test_an_interval_is_refined_further_than_a_step(run: Path, replay_: Callable[..., tuple[int, str]]) -> None:
    # Down to the rounding of the loss.
    replay_(run, "--loss-data", "probe:32", "--rtol", "0")
    (folder,) = folders(run)
    evaluations = folder.read(0, 2).per_step["evaluations"]
    assert 33 < evaluations.max() <= 2 * CHORD_PIECES + 1  # a recorded step has 33 at most


def test_where_refining_is_not_enough_the_status_says_so(
    run: Path, replay_: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quadrature, "CHORD_PIECES", 2)
    code, said = replay_(run, "--loss-data", "probe:32", "--rtol", "0")
    (folder,) = folders(run)
    shard = folder.read(0, 2)
    assert code == 3
    assert (shard.per_step["status"] == 1).all()
    assert shard.per_step["evaluations"].tolist() == [5, 4]
    assert "probe: 2 intervals (2 tolerance_not_met)" in said


def test_checkpoints_added_later_cost_their_own_intervals_alone(
    training: checkpoints.Training, tmp_path: Path, replay_: Callable[..., tuple[int, str]]
) -> None:
    states = dict(training.states)
    first: dict[int, Any] = {t: states[t] for t in (0, 20)}
    source, run = checkpoints.as_huggingface(tmp_path / "source", first), tmp_path / "run"
    command = ["import", str(source), "--run", str(run), "--workload", checkpoints.WORKLOAD]
    recorder_main(command)
    replay_(run, "--loss-data", "probe:32", "--chunk", "1")
    (folder,) = folders(run)
    before = folder.file(0, 1).read_bytes()
    checkpoints.as_huggingface(source, {40: states[40]})
    recorder_main(command)
    _, said = replay_(run, "--loss-data", "probe:32", "--chunk", "1")
    assert "1 intervals to do in 1 shards" in said
    (folder,) = folders(run)
    assert folder.file(0, 1).read_bytes() == before
    assert folder.finished() == [(0, 1), (1, 2)]


def test_a_damaged_checkpoint_is_named_and_the_other_intervals_are_done(
    run: Path, replay_: Callable[..., tuple[int, str]]
) -> None:
    last = run / "checkpoints" / "00000040"
    shutil.copy(last / "model.safetensors", last / "copy")
    content = bytearray((last / "copy").read_bytes())
    content[-1] ^= 1
    (last / "model.safetensors").unlink()
    (last / "model.safetensors").write_bytes(content)
    code, said = replay_(run, "--loss-data", "probe:32", "--chunk", "1")
    assert code == 1
    assert "is not the one that was imported: expected CRC-32" in said
    assert "missing: updates 20 to 40" in said
    (folder,) = folders(run)
    assert folder.finished() == [(0, 1)]


def test_identical_neighbours_have_an_lca_of_exactly_zero(
    training: checkpoints.Training, tmp_path: Path, replay_: Callable[..., tuple[int, str]]
) -> None:
    states = {**training.states, 30: training.states[20]}
    run = imported(checkpoints.Training(run=training.run, states=dict(sorted(states.items()))), tmp_path)
    assert replay_(run, "--loss-data", "probe:32")[0] == 0
    (folder,) = folders(run)
    shard = folder.read(0, 3)
    assert folder.updates(0, 3).tolist() == [[0, 20], [20, 30], [30, 40]]
    assert all((sums[1] == 0).all() for sums in shard.per_unit["sum"].values())
    assert (shard.per_step["residual"][1], shard.per_step["status"][1]) == (0, 0)


def test_fresh_examples_are_those_of_the_recorded_run_at_the_same_update(
    training: checkpoints.Training, run: Path
) -> None:
    recorded, chord = open_run(training.run), open_run(run)
    data: list[Any] = [
        lossdata.build(lossdata.parse("fresh:4"), cases.workload(), opened.step(opened.steps[0]), torch.device("cpu"))[
            0
        ]
        for opened in (recorded, chord)
    ]
    (of_recorded,) = data[0].micro_batches(recorded.step(20))
    (of_chord,) = data[1].micro_batches(chord.step(1))
    assert torch.equal(of_recorded["tokens"], of_chord["tokens"])


def test_golden_shards_of_version_1_still_open() -> None:
    golden = Path(__file__).parents[1] / "golden" / "shards-v1" / "run"
    (folder,) = folders(golden)
    assert isinstance(folder, ShardFolder)
    assert folder.updates(0, 3).tolist() == [[0, 1], [1, 2], [2, 3]]
    shard = folder.read(0, 3)
    assert shard.updates is None
    assert shard.before(2).updates is None
    total = sum(sums.sum() for sums in shard.per_unit["sum"].values())
    change = (shard.per_step["loss_end"] - shard.per_step["loss_start"]).sum()
    assert total - change == pytest.approx(shard.per_step["residual"].sum(), abs=1e-12)
