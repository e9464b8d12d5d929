"""A run whose map was corrected: what was computed is taken over where it can be, and the cube is that of the map."""

from __future__ import annotations

import importlib
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

import recorder
from recorder.__main__ import main as recorder_main
from recorder.manifest import Manifest
from recorder.parameters import UnmappedParameterWarning
from recorder.pruned import prune
from recorder.runformat import Run
from recorder.segments import list_segments
from recorder.tensorfile import TensorFile
from reduce import cube
from reduce.__main__ import main as reduce_main
from replay import shards
from replay.gradients import LossSurface
from replay.settings import digest_of_table
from tests.replay.variants import one_thread

Command = Callable[..., int]
own_model: Any = importlib.import_module("examples.own_model")  # a module for users, not typed for us
Captured = pytest.CaptureFixture[str]

STEPS, CHUNK = 6, "2"
BOTH = ("batch", "probe:48")
OWN = own_model.MAP.read_text(encoding="utf-8")


def without(pattern: str, text: str = OWN) -> str:
    """The example's map without some of its rules or lines."""
    kept = re.sub(pattern, "", text, flags=re.MULTILINE | re.DOTALL)
    assert kept != text
    return kept


SCORES = without(r"^\[\[rule\]\][^\n]*\npattern = 'scores.*?\Z")
"""Without the embedding's second use."""
ROWS = without(r"^unit_axis = 1\n", SCORES)
"""With rows as the units of all weights: those of a run recorded without a map."""
WHOLE = without(r"^\[\[rule\]\][^\n]*\npattern = '\{layer\}\\\.mixing\\\.qkv.*?^\]\n", ROWS)
"""And without the tensor of several components."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The example's training, recorded without its map and with it."""
    folder = tmp_path_factory.mktemp("trained")
    own_model.UPDATES, updates = STEPS, own_model.UPDATES
    try:
        with one_thread(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UnmappedParameterWarning)
            own_model.train(str(folder / "plain"), with_map=False)
            own_model.train(str(folder / "mapped"))
    finally:
        own_model.UPDATES = updates
    return folder / "plain", folder / "mapped"


@pytest.fixture
def plain(trained: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained[0], tmp_path / "plain"))


@pytest.fixture
def correct(tmp_path: Path, capsys: Captured) -> Callable[[Path, str], str]:
    """Correct a run by the text of a map; gives what was said."""

    def command(run: Path, text: str) -> str:
        (tmp_path / "map.toml").write_text(text, encoding="utf-8")
        assert recorder_main(["map", str(run), "--map", str(tmp_path / "map.toml")]) == 0
        return capsys.readouterr().err

    return command


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by every evaluation of the gradient."""
    counted: list[int] = []
    evaluate = LossSurface.evaluate

    def counting(*arguments: Any, **more: Any) -> Any:
        counted.append(1)
        return evaluate(*arguments, **more)

    monkeypatch.setattr(LossSurface, "evaluate", counting)
    return counted


def cube_of(run: Path) -> xr.Dataset:
    assert reduce_main(["--run", str(run)]) == 0
    with cube.open_cube(run / cube.FILE_NAME) as opened:
        return opened.load()


def assert_same_cubes(left: xr.Dataset, right: xr.Dataset) -> None:
    assert set(left.variables) == set(right.variables)
    for name in left.variables:
        assert left[name].dims == right[name].dims
        np.testing.assert_array_equal(left[name].values, right[name].values, err_msg=str(name))


def numbers(run: Path) -> dict[tuple[str, int, str, str], Any]:
    """All that shards of the run's present table hold of its units."""
    return {
        (folder.settings.loss_data, start, quantity, name): values.tolist()
        for folder in shards.folders(run)
        if folder.settings.parameter_table == shards.marked_table(run)
        for start, stop in folder.finished()
        for quantity, of_quantity in folder.read(start, stop).per_unit.items()
        for name, values in of_quantity.items()
    }


def test_a_run_corrected_afterwards_has_the_cube_of_one_that_was_recorded_with_the_map(
    plain: Path, trained: tuple[Path, Path], tmp_path: Path, replay: Command, correct: Any, capsys: Captured
) -> None:
    mapped = Path(shutil.copytree(trained[1], tmp_path / "mapped"))
    asked = ("--chunk", CHUNK)
    assert replay(mapped, *asked, loss_data=BOTH) == 0
    assert replay(plain, *asked, loss_data=BOTH) == 0
    in_other = cube_of(plain)
    assert set(in_other["component"][(in_other["n_parameters"] > 0).any("layer")].values) == {"other"}

    said = correct(plain, OWN)
    assert "26 of 26 parameters are moved" in said
    assert "the units or the uses of 5 of them change, first 'symbols.weight'" in said
    capsys.readouterr()
    assert replay(plain, *asked, loss_data=BOTH) == 0
    said = capsys.readouterr().err
    for name in ("batch", "probe"):
        assert f"of steps 0-5 the shards on {name} were computed under another parameter table" in said
    assert "the units, or the uses, of 'scores.weight', 'trunk.0.mixing.merge.weight', " in said
    assert "6 steps to do in 3 shards" in said

    corrected = cube_of(plain)
    assert "of a former parameter table are passed over" in capsys.readouterr().err
    assert_same_cubes(corrected, cube_of(mapped))
    assert [row.to_dict() for row in Manifest.read(plain).parameters] == [
        row.to_dict() for row in Manifest.read(mapped).parameters
    ]
    # All but the embedding's second use was in `other` before; what was there is what the cells now hold.
    np.testing.assert_allclose(
        corrected["lca"].sum(("layer", "component")), in_other["lca"].sum(("layer", "component")), rtol=1e-9
    )


def test_what_was_computed_is_taken_over_where_units_stay_without_one_gradient(
    plain: Path, tmp_path: Path, replay: Command, correct: Any, evaluations: list[int], capsys: Captured
) -> None:
    asked = ("--chunk", CHUNK)
    fresh = Path(shutil.copytree(plain, tmp_path / "fresh"))
    assert replay(plain, *asked, loss_data=BOTH) == 0
    assert "no unit axis changes" in correct(plain, WHOLE)
    capsys.readouterr()
    evaluations.clear()
    assert replay(plain, *asked, "--dry-run", loss_data=BOTH) == 0
    said = capsys.readouterr().err
    assert "the shards on probe of steps 0-5 will be taken over, not computed" in said
    assert "0 steps to do in 0 shards" in said
    # Only one loss data is asked for: a cube is made of both, so both are taken over.
    assert replay(plain, *asked) == 0
    assert evaluations == []
    said = capsys.readouterr().err
    for name in ("batch", "probe"):
        assert f"{plain}: of steps 0-5 the shards on {name} are taken over under the present parameter table" in said
    assert "0 steps to do in 0 shards" in said
    assert len(shards.folders(plain)) == 2  # nothing is left in the former folders

    correct(fresh, WHOLE)
    assert replay(fresh, *asked, loss_data=BOTH) == 0
    assert evaluations != []
    assert numbers(plain) == numbers(fresh)
    assert_same_cubes(cube_of(plain), cube_of(fresh))
    assert replay(plain, *asked, loss_data=BOTH) == 0
    assert "taken over" not in capsys.readouterr().err


def test_a_corrected_table_taken_back_has_its_shards_back(
    plain: Path, replay: Command, correct: Any, evaluations: list[int]
) -> None:
    asked = ("--chunk", CHUNK, "--per-parameter", "0:3,3:6")
    assert replay(plain, *asked) == 0
    (folder,) = (path for path in (plain / "shards").iterdir() if path.is_dir())
    before = {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
    assert sum(name.startswith("entries-") for name in before) == 2
    correct(plain, WHOLE)
    evaluations.clear()
    assert replay(plain, *asked) == 0
    assert list(folder.glob("*.safetensors")) == []
    assert recorder_main(["map", str(plain), "--as-recorded"]) == 0
    assert replay(plain, *asked) == 0
    assert {file.name: file.read_bytes() for file in folder.glob("*.safetensors")} == before
    assert evaluations == []


def test_standard_errors_know_components_so_a_tensor_newly_cut_is_computed_again_on_drawn_examples(
    plain: Path, replay: Command, correct: Any, capsys: Captured
) -> None:
    asked = ("--chunk", CHUNK)
    assert replay(plain, *asked, loss_data=BOTH) == 0
    correct(plain, ROWS)
    assert replay(plain, *asked, loss_data=BOTH) == 0
    said = capsys.readouterr().err
    assert "the shards on batch are taken over" in said
    assert "the shards on probe were computed under another parameter table, and must be computed again" in said
    assert "the standard errors know other components of 'trunk.0.mixing.qkv.weight', " in said
    found = cube_of(plain)
    assert np.isfinite(found["lca_standard_error"].sel(data="probe", component="query", layer="decoder.0")).all()


def test_new_uses_of_a_tied_tensor_cost_nothing_where_they_are_not_told_apart(
    plain: Path, replay: Command, correct: Any, evaluations: list[int], capsys: Captured
) -> None:
    asked = ("--chunk", CHUNK, "--tied-weights", "whole")
    assert replay(plain, *asked) == 0
    correct(plain, f"{WHOLE}\n[[rule]]\npattern = 'scores.weight'\ncomponent = 'output'\n")
    assert Manifest.read(plain).parameters[1].uses
    evaluations.clear()
    assert replay(plain, *asked) == 0
    assert evaluations == []
    assert "of steps 0-5 the shards on batch are taken over" in capsys.readouterr().err


def test_the_unit_axis_of_one_weight_alone_has_everything_computed_again(
    plain: Path, replay: Command, correct: Any, evaluations: list[int], capsys: Captured
) -> None:
    asked = ("--chunk", CHUNK)
    assert replay(plain, *asked) == 0
    once = len(evaluations)
    axis = WHOLE.replace('component = "W2"\n', 'component = "W2"\nunit_axis = 1\n', 1)
    assert "the units or the uses of 2 of them change, first 'trunk.0.narrow.weight'" in correct(plain, axis)
    assert replay(plain, *asked) == 0
    assert len(evaluations) == 2 * once
    said = capsys.readouterr().err
    assert "the units, or the uses, of 'trunk.0.narrow.weight', 'trunk.1.narrow.weight' are others now" in said
    former, now = sorted(shards.folders(plain), key=lambda folder: folder.path.stat().st_mtime)
    assert f"The former ones stay in {former.path}" in said
    units = {folder: folder.read(0, 2).per_unit["sum"]["trunk.0.narrow.weight"] for folder in (former, now)}
    assert (units[former].shape, units[now].shape) == ((2, 32), (2, 64))
    np.testing.assert_allclose(units[former].sum(axis=1), units[now].sum(axis=1), rtol=1e-9)
    # The second time it is not told again: all is there.
    assert replay(plain, *asked) == 0
    assert "another parameter table" not in capsys.readouterr().err


def test_shards_of_pruned_steps_go_along(plain: Path, replay: Command, correct: Any, evaluations: list[int]) -> None:
    asked = ("--chunk", CHUNK)
    assert replay(plain, *asked) == 0
    correct(plain, WHOLE)
    prune(plain, list_segments(plain)[1:-1])
    evaluations.clear()
    assert replay(plain, *asked) == 0
    assert evaluations == []
    assert cube_of(plain).sizes["step"] == STEPS


@pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")  # of the map used here
def test_steps_that_a_restart_recorded_anew_do_not_go_along(
    plain: Path, replay: Command, correct: Any, capsys: Captured
) -> None:
    asked = ("--chunk", CHUNK, "--rule", "simpson", "--per-parameter", "0:4,4:6")
    assert replay(plain, *asked) == 0
    task, run = own_model.workload(), Run(plain)
    model = task.model()
    model.load_state_dict(run.parameters(4), strict=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    correct(plain, WHOLE)
    # The restart keeps the corrected table, and so need not be told of the map.
    workload = "examples.own_model:workload"
    with recorder.watch(model, optimizer, run=plain, workload=workload, first_step=4) as rec:
        for _ in range(2):
            batch = task.batch(range(8), split="train", epoch=1)
            rec.batch(range(8), batch)
            loss, predictions = task.loss(model, batch)
            (loss / predictions).backward()
            optimizer.step()
            optimizer.zero_grad()
    capsys.readouterr()
    assert replay(plain, *asked) == 0
    said = capsys.readouterr().err
    assert "of steps 0-3 the shards on batch are taken over" in said
    assert "2 steps to do in 1 shards" in said
    (folder,) = (f for f in shards.folders(plain) if f.settings.parameter_table == shards.marked_table(plain))
    assert folder.attempts(4, 6) == [(2, 4, 6)]
    sums = sorted(folder.path.glob("entries-*.safetensors"))
    assert [TensorFile(file).facts["attempts"] for file in sums] == [[[1, 0, 4]], [[2, 4, 6]]]


def test_reduce_takes_the_present_table_of_each_loss_data_and_says_what_it_passes_over(
    plain: Path, replay: Command, correct: Any, capsys: Captured
) -> None:
    asked = ("--chunk", CHUNK)
    assert replay(plain, *asked, loss_data=BOTH) == 0
    (former,) = (folder for folder in shards.folders(plain) if folder.settings.loss_data == "batch")
    correct(plain, OWN)
    assert replay(plain, *asked) == 0
    capsys.readouterr()
    # The probe examples were not replayed again: two tables do not make one cube.
    assert reduce_main(["--run", str(plain)]) == 1
    assert "python -m replay takes over what it can of a former table" in capsys.readouterr().err
    assert replay(plain, *asked, loss_data=BOTH) == 0
    capsys.readouterr()
    cube_of(plain)
    said = capsys.readouterr().err
    assert f"batch: the shards {former.settings.hash} of a former parameter table are passed over" in said
    assert shards.marked_table(plain) != digest_of_table(former.parameters) is not None
    # Asked for by their hash, the former ones are taken.
    hashes = [
        f.settings.hash for f in shards.folders(plain) if f.settings.parameter_table != shards.marked_table(plain)
    ]
    assert reduce_main(["--run", str(plain), "--settings", *hashes, "--out", str(plain / "former.nc")]) == 0


def test_a_mark_that_cannot_be_read_marks_nothing(plain: Path, replay: Command) -> None:
    assert shards.marked_table(plain) is None
    assert replay(plain, "--chunk", CHUNK) == 0
    assert shards.marked_table(plain) == shards.folders(plain)[0].settings.parameter_table
    (plain / "shards" / "table.json").write_text("[")
    assert shards.marked_table(plain) is None
