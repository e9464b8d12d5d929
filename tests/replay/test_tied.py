"""Tied weights, the LCA of every use told apart; and tensors of several components, their spread told apart."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from recorder.runformat import Run
from recorder.table import Parameter, Part
from reduce import open_cube
from reduce.__main__ import main as reduce_main
from replay.adoption import take_over
from replay.blocks import BLOCK
from replay.cost import bytes_in_memory
from replay.job import Job, Task
from replay.products import Projection
from replay.settings import digest_of_table
from replay.shards import ShardFolder, folders
from replay.work import Replayer
from tests.replay import tied
from tests.replay.tied import EMBEDDING, FUSED, OUTPUT, TOKENS, VOCABULARY, WIDTH

Command = Callable[..., int]
Find = Callable[[Path, str], ShardFolder]

TARGET = 1e-9
FLOOR = 1e-15
"""Of the step's Σ|entry|: the absolute error allowed to what is zero in theory."""


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three short steps in float64; not to be changed."""
    adam = functools.partial(torch.optim.Adam, lr=3e-5)
    run = tmp_path_factory.mktemp("exact") / "run"
    return tied.record(run, tied.workload_float64, steps=3, make_optimizer=adam)


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in float32; not to be changed."""
    return tied.record(tmp_path_factory.mktemp("tied") / "run", steps=4)


@pytest.fixture
def run(in_float32: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(in_float32, tmp_path / "run"))


@pytest.fixture
def run_in_float64(exact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exact, tmp_path / "run64"))


@pytest.mark.parametrize("loss_data", ["batch", "probe"])
def test_every_unit_of_every_use_agrees_with_autograd_on_a_model_without_ties(
    run_in_float64: Path, loss_data: str, replay: Command, folder: Find
) -> None:
    assert replay(run_in_float64, loss_data=("probe:16" if loss_data == "probe" else "batch",)) == 0
    shard = folder(run_in_float64, loss_data).read(0, 3)
    assert (shard.per_step["status"] == 0).all()
    for t, truth in enumerate(tied.brute_force(run_in_float64, loss_data)):
        assert truth.keys() == shard.per_unit["sum"].keys()
        floor = FLOOR * sum(float(entries.abs().sum()) for entries in truth.values())
        for name, entries in truth.items():
            of_units = entries.flatten(1) if entries.dim() > 1 else entries[:, None]
            for quantity, expected in (
                ("sum", of_units.sum(dim=1)),
                ("positive_sum", of_units.clamp(min=0).sum(dim=1)),
            ):
                found = torch.tensor(shard.per_unit[quantity][name][t])
                error = (found - expected).abs() / expected.abs().clamp(min=floor / TARGET)
                assert float(error.max()) < TARGET, (t, name, quantity)


def test_tokens_that_do_not_occur_have_lca_in_the_output_alone(run: Path, replay: Command, folder: Find) -> None:
    assert replay(run) == 0
    shard = folder(run, "batch").read(0, 4)
    absent = slice(TOKENS, VOCABULARY)
    # Their logits are pushed down, so the tensor moves there; looked up they never are.
    assert (shard.per_unit["zero_count"][EMBEDDING][:, absent] == WIDTH).all()
    assert (shard.per_unit["sum"][EMBEDDING][:, absent] == 0).all()
    assert (shard.per_unit["sum"][OUTPUT][:, absent] != 0).all()
    assert (shard.per_unit["sum"][EMBEDDING][:, :TOKENS] != 0).any(axis=0).all()
    # One update, two gradients.
    np.testing.assert_array_equal(
        shard.per_parameter["update_norm"][EMBEDDING], shard.per_parameter["update_norm"][OUTPUT]
    )
    assert (shard.per_parameter["gradient_norm"][EMBEDDING] != shard.per_parameter["gradient_norm"][OUTPUT]).all()


def test_the_uses_sum_to_the_whole(run_in_float64: Path, replay: Command, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_in_float64
    assert replay(run, loss_data=("batch", "probe:20")) == 0
    said = capsys.readouterr().err
    assert f"; tied weights {EMBEDDING!r} told apart: embedding, output; two passes over" in said
    assert "losses and parameters are the recorded ones, bit for bit" in said
    assert replay(run, "--tied-weights", "whole", loss_data=("batch", "probe:20")) == 0
    assert "tied weights" not in capsys.readouterr().err
    for loss_data in ("batch", "probe"):
        found = [entry for entry in folders(run) if entry.settings.loss_data == loss_data]
        by_use, whole = sorted(found, key=lambda entry: len(entry.parameters), reverse=True)
        assert by_use.settings == dataclasses.replace(whole.settings, parameter_table=by_use.settings.parameter_table)
        names = [row.name for row in by_use.parameters]
        assert names.index(OUTPUT) == names.index(EMBEDDING) + 1
        assert [row.name for row in whole.parameters] == [name for name in names if name != OUTPUT]
        assert not any(row.uses for row in (*by_use.parameters, *whole.parameters))
        left, right = by_use.read(0, 3), whole.read(0, 3)
        for name in ("loss_start", "loss_end", "evaluations", "weight"):
            np.testing.assert_array_equal(left.per_step[name], right.per_step[name])
        for name, expected in right.per_unit["sum"].items():
            total = left.per_unit["sum"][name] + (left.per_unit["sum"][OUTPUT] if name == EMBEDDING else 0)
            np.testing.assert_allclose(total, expected, rtol=1e-11, atol=1e-18)
            if name != EMBEDDING:
                np.testing.assert_array_equal(left.per_unit["sum"][name], expected)
        for name, expected in right.spread.items():
            total = left.spread[name] + (left.spread[OUTPUT] if name == EMBEDDING else 0)
            np.testing.assert_allclose(total, expected, rtol=1e-11, atol=1e-15)
        residual = sum(left.per_unit["sum"][name].sum(axis=1) for name in left.per_unit["sum"])
        residual -= left.per_step["loss_end"] - left.per_step["loss_start"]
        np.testing.assert_allclose(residual, left.per_step["residual"], rtol=0, atol=1e-15)


def test_whole_are_the_shards_of_a_table_that_knows_no_uses(run: Path, tmp_path: Path, replay: Command) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    tied.rewrite_table(other, lambda row: dataclasses.replace(row, uses=()))
    assert replay(run, "--tied-weights", "whole", loss_data=("batch", "probe:20")) == 0
    assert replay(other, loss_data=("batch", "probe:20")) == 0
    shards = sorted((run / "shards").glob("*/*.safetensors"))
    assert len(shards) == 2
    for shard in shards:
        assert shard.read_bytes() == (other / shard.relative_to(run)).read_bytes()


def test_single_entries_line_up_with_the_model(run: Path, replay: Command, folder: Find) -> None:
    assert replay(run, "--per-parameter", "0:3") == 0
    shards = folder(run, "batch")
    entries = load_file(shards.path / "entries-00000000-00000003.safetensors")
    model = dict(tied.workload().model().named_parameters())
    assert {name: array.shape for name, array in entries.items()} == {
        name: tuple(tensor.shape) for name, tensor in model.items()
    }
    sums = shards.read(0, 4).per_unit["sum"]
    expected = (sums[EMBEDDING] + sums[OUTPUT])[:3].sum(axis=0)
    np.testing.assert_allclose(entries[EMBEDDING].sum(axis=1), expected, rtol=0, atol=1e-15)


WHOLE = {
    "ties_anew": f"in the first step no gradient reaches it as {OUTPUT!r}",
    "reads_the_other": f"in the first step no gradient reaches it as {OUTPUT!r}",
    "insists_on_the_tie": "without the tie the model fails (ValueError: expected tied weights)",
    "looks_for_the_tie": "without the tie the loss of step 0 is ",
    "hides_from_the_tied": "their gradients miss that of the tied tensor by ",
    "one_module": f"{'encoder.embed.weight'!r} and {OUTPUT!r} are one and the same module",
}


@pytest.mark.parametrize("kind", WHOLE)
def test_uses_that_cannot_be_told_apart_stay_whole_and_it_is_said(
    tmp_path: Path, kind: str, replay: Command, folder: Find, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tied.record(tmp_path / "run", getattr(tied, kind), steps=2)
    assert replay(run) == (3 if kind == "hides_from_the_tied" else 0)
    said = capsys.readouterr().err
    assert f"; tied weights {EMBEDDING!r} stay whole, for {WHOLE[kind]}" in said
    assert "told apart" not in said
    by_default = folder(run, "batch")
    assert OUTPUT not in by_default.read(0, 2).per_unit["sum"]
    whole = by_default.file(0, 2).read_bytes()
    by_default.remove(0, 2)
    replay(run, "--tied-weights", "whole")
    assert folder(run, "batch").file(0, 2).read_bytes() == whole


def test_with_the_training_s_dropout_the_uses_are_told_apart_too(
    tmp_path: Path, replay: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tied.record(tmp_path / "run", tied.dropping, steps=2)
    assert replay(run, "--dropout", "recorded") == 0
    said = capsys.readouterr().err
    assert "told apart: embedding, output" in said
    assert "the loss of step 0 is the training's bit for bit" in said


@pytest.mark.cluster
def test_two_workers_write_the_same_bytes(run: Path, tmp_path: Path, replay: Command) -> None:
    other = Path(shutil.copytree(run, tmp_path / "other"))
    chosen = ("--chunk", "2", "--per-parameter", "all", "--tied-weights", "split")
    assert replay(run, *chosen, loss_data=("probe:20",)) == 0
    assert replay(other, *chosen, "--workers", "2", loss_data=("probe:20",)) == 0
    files = sorted((run / "shards").glob("*/*.safetensors"))
    assert len(files) == 3
    for file in files:
        assert file.read_bytes() == (other / file.relative_to(run)).read_bytes()


def test_a_micro_batch_gives_each_use_and_each_component_its_own_share(
    run_in_float64: Path, replay: Command, folder: Find
) -> None:
    assert replay(run_in_float64, "--rule", "euler", "--rtol", "10", loss_data=("probe:20",)) == 0
    shard, opened = folder(run_in_float64, "probe").read(0, 3), Run(run_in_float64)
    text = torch.randint(TOKENS, (64, 7), generator=torch.Generator().manual_seed(5))
    drawn = sorted(np.random.default_rng(0).choice(48, size=20, replace=False).tolist())
    for t in range(3):
        theta, after = opened.parameters(t), opened.parameters(t + 1)
        for position, indices in enumerate((drawn[:8], drawn[8:16], drawn[16:])):
            for name, gradient in tied.gradients(theta, text[indices]).items():
                owner = EMBEDDING if name == OUTPUT else name
                given = gradient * (after[owner] - theta[owner])
                if name in FUSED:
                    # Units by repetition, part, and what is left: head by head, or all heads of a part together.
                    expected = given.view(FUSED[name], 3, -1).sum(dim=(0, 2))
                    assert shard.spread[name].shape == (3, 3, 3)
                else:
                    expected = given.sum()
                    assert shard.spread[name].shape == (3, 3)
                found = shard.spread[name][t, position]
                np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-11 * float(given.abs().sum()))


def test_products_with_a_tensor_that_fills_several_blocks_are_told_by_component() -> None:
    parts = tuple(Part(component=name, units=units) for name, units in (("query", 40), ("key", 20), ("value", 60)))
    shapes: dict[str, tuple[int, ...]] = {
        "before": (5,),
        "along columns": (3000, 120),
        "small": (120,),
        "rows": (120, 3000),
    }
    table = [
        Parameter(name=name, shape=shape, dtype="float64", component="fused", fused=parts, repeats=20, unit_axis=axis)
        for (name, shape), axis in zip(shapes.items(), (0, 1, 0, 0), strict=True)
        if name != "before"
    ]
    generator = torch.Generator().manual_seed(4)
    direction, *others = (
        {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
        for _ in range(3)
    )
    del others[0]["rows"]  # no gradient reached it yet
    assert shapes["rows"][0] * shapes["rows"][1] > 2 * BLOCK
    projection = Projection(direction, table)
    together = {name: tensor + others[0].get(name, 0) for name, tensor in others[1].items()}
    found = projection.of_each([projection.dots(others[0]), projection.dots(together)])
    part_of_unit = np.tile(np.repeat([0, 1, 2], [2, 1, 3]), 20)
    for position, other in enumerate(others):
        for name, values in found.items():
            product = (direction[name] * other.get(name, torch.zeros(()))).numpy()
            if name == "before":
                assert values[position] == pytest.approx(product.sum(), rel=1e-12, abs=1e-12)
                continue
            of_units = product.sum(axis=0) if name == "along columns" else product.reshape(120, -1).sum(axis=1)
            expected = np.bincount(part_of_unit, of_units)
            np.testing.assert_allclose(values[position].numpy(), expected, rtol=1e-10, atol=1e-10)


def test_shards_of_pruned_steps_are_taken_over_when_tied_and_fused_parameters_join(
    run: Path, replay: Command, folder: Find
) -> None:
    assert replay(run, loss_data=("probe:20",)) == 0
    now = folder(run, "probe")
    shard, attempts = now.read(0, 4), now.attempts(0, 4)
    joined = {EMBEDDING, OUTPUT, "decoder.qkv.weight"}
    table = [row for row in now.parameters if row.name not in joined]
    settings = dataclasses.replace(now.settings, parameter_table=digest_of_table(table))
    former = ShardFolder.create(run, settings, table, now.provenance)
    former.write(0, 4, shard, attempts)
    now.remove(0, 4)
    of_run = SimpleNamespace(path=run, pruned=[(0, 4)], attempts_within=lambda start, stop: attempts)
    take_over(cast("Replayer", SimpleNamespace(run=of_run, folders={"probe": now})))
    found = now.read(0, 4)
    for row in now.trained:
        for quantity in ("sum", "zero_count"):
            still = row.size // row.units if quantity == "zero_count" else 0
            expected = np.full((4, row.units), still) if row.name in joined else shard.per_unit[quantity][row.name]
            np.testing.assert_array_equal(found.per_unit[quantity][row.name], expected)
        left = np.zeros_like(shard.spread[row.name]) if row.name in joined else shard.spread[row.name]
        np.testing.assert_array_equal(found.spread[row.name], left)


def test_memory_is_foretold_with_a_gradient_for_every_use(run: Path, job: Callable[..., Job]) -> None:
    foretold = {}
    for whole in ((), (EMBEDDING,)):
        opened = Replayer(job(run, rule="simpson", loss_data=("batch",), whole=whole))
        foretold[whole] = bytes_in_memory(opened, Task(start=0, stop=4, loss_data=("batch",)))
    rows = 4 * (VOCABULARY * 4 * 8 + 3 * 8)
    entries = VOCABULARY * WIDTH
    # Three gradients in float32 that are looked at together, and half of one for gaps of the heap.
    assert foretold[()] - foretold[EMBEDDING,] == pytest.approx(entries * (3 * 4 + 2) + rows, abs=2)


def test_from_replay_to_the_cube(run: Path, replay: Command) -> None:
    assert replay(run, loss_data=("batch", "probe:20")) == 0
    assert reduce_main(["--run", str(run)]) == 0
    with open_cube(run / "lca.nc") as cube:
        entries = sum(tensor.numel() for tensor in tied.workload().model().parameters())
        assert int((cube["n_parameters"] - cube["n_tied"]).sum()) == entries
        assert int(cube["n_tied"].sum()) == VOCABULARY * WIDTH
        model = cube.sel(layer="model")
        embedding, output = (model["lca"].sel(component=name) for name in ("embedding", "output"))
        assert (embedding != output).all()
        hurting = model["hurting"].sel(component=["embedding", "output"])
        assert ((hurting >= 0) & (hurting <= 1)).all()
        total = cube["lca"].sum(("layer", "component"))
        np.testing.assert_allclose(total - (cube["loss_end"] - cube["loss_start"]), cube["residual"], atol=1e-12)
        for stack in ("encoder", "decoder"):
            layer = cube.sel(layer=f"{stack}.0")
            for name in ("query", "key", "value"):
                assert int(layer["n_parameters"].sel(component=name)) == WIDTH * (WIDTH + 1)
                assert (layer["lca_standard_error"].sel(data="probe", component=name) > 0).all()
        of_cells = cube["lca_standard_error"].sel(data="probe")
        assert (of_cells.sel(layer="model", component=["embedding", "output"]) > 0).all()
    assert replay(run, "--tied-weights", "whole", "--overwrite", loss_data=("batch", "probe:20")) == 0
    whole = [entry.settings.hash for entry in folders(run) if OUTPUT not in {row.name for row in entry.parameters}]
    out = run / "whole.nc"
    assert reduce_main(["--run", str(run), "--out", str(out), *(f"--settings={name}" for name in whole)]) == 0
    with open_cube(run / "lca.nc") as cube, open_cube(out) as of_whole:
        parts = cube["lca"].sel(layer="model", component=["embedding", "output"]).sum("component")
        both = of_whole["lca"].sel(layer="model", component="embedding")
        np.testing.assert_allclose(parts, both, rtol=1e-5, atol=1e-9)
        assert of_whole["lca"].sel(layer="model", component="output").isnull().all()
        assert int(of_whole["n_tied"].sum()) == 0
