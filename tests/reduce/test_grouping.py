from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from recorder.errors import FormatError
from recorder.table import split_by_use
from reduce.grouping import grouping
from reduce.statistics import STATISTICS
from replay.shards import ATTENTION_COMPONENTS, COMPONENTS, Parameter, Part


def test_layers_are_ordered_by_stack_then_depth_with_the_model_last() -> None:
    names = [("vision", 1), ("decoder", 0), ("model", -1), ("encoder", 10), ("audio", 0), ("encoder", 2)]
    table = [
        Parameter(
            name=f"{stack}{depth}",
            shape=(1,),
            dtype="float32",
            layer=stack if depth < 0 else f"{stack}.{depth}",
            stack=stack,
            depth=depth,
        )
        for stack, depth in names
    ]
    assert [layer.name for layer in grouping(table).layers] == [
        "encoder.2",
        "encoder.10",
        "decoder.0",
        "audio.0",
        "vision.1",
        "model",
    ]


def test_every_trained_parameter_is_in_exactly_one_cell(parameters: list[Parameter]) -> None:
    cells = grouping(parameters).cells
    assert [member.parameter for member in cells.members] == [row.name for row in parameters if row.trained]
    assert all(len(member.codes) == 1 for member in cells.members)
    assert cells.entries.sum() == sum(row.size for row in parameters if row.trained)


def test_a_cell_is_the_layer_and_component_of_its_parameter(parameters: list[Parameter]) -> None:
    made = grouping(parameters)
    layers = [layer.name for layer in made.layers]
    places = {row.name: (row.layer, row.component) for row in parameters}
    for member in made.cells.members:
        layer, component = np.unravel_index(member.codes[0], made.cells.shape)
        assert (layers[layer], COMPONENTS[component]) == places[member.parameter]


def test_only_attention_weights_with_heads_have_heads(parameters: list[Parameter]) -> None:
    heads = grouping(parameters).heads
    assert {member.parameter for member in heads.members} == {"d0.key", "d0.key.extra", "d0.out", "e2.query"}
    assert heads.shape == (4, len(ATTENTION_COMPONENTS), 3)


def test_a_table_without_heads_has_one_empty_head() -> None:
    heads = grouping([Parameter(name="w", shape=(4, 4), dtype="float32")]).heads
    assert heads.shape == (1, len(ATTENTION_COMPONENTS), 1)
    assert not heads.members
    assert not heads.entries.any()


def test_a_layer_of_two_depths_is_refused() -> None:
    table = [
        Parameter(name=name, shape=(1,), dtype="float32", layer="encoder.0", stack="encoder", depth=depth)
        for name, depth in (("a", 0), ("b", 1))
    ]
    with pytest.raises(FormatError, match=r"parameter 'b': expected layer 'encoder.0' .* depth 0 .*found .* depth 1"):
        grouping(table)


LAYER: dict[str, Any] = {"layer": "encoder.0", "stack": "encoder", "depth": 0}


def fused(name: str, units: int, *parts: Part, repeats: int = 1) -> Parameter:
    return Parameter(
        name=name, shape=(units, 2), dtype="float32", component="fused", fused=parts, repeats=repeats, **LAYER
    )


def sums(table: list[Parameter], values: dict[str, list[float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Sum units by component, and by component and head."""
    made = grouping(table)
    units = {name: np.array([of_parameter]) for name, of_parameter in values.items()}
    lca, lca_head = (
        next(statistic for statistic in STATISTICS if statistic.variable == variable)
        for variable in ("lca", "lca_head")
    )
    cells = lca.finalize(lca.partial(units, made.cells, 1).reshape(made.cells.shape), made.cells.entries)
    heads = lca_head.finalize(lca_head.partial(units, made.heads, 1).reshape(made.heads.shape), made.heads.entries)
    return (
        {name: cells[0, code] for code, name in enumerate(COMPONENTS) if not np.isnan(cells[0, code])},
        {
            f"{name}{head}": value
            for code, name in enumerate(ATTENTION_COMPONENTS)
            for head, value in enumerate(heads[0, code])
            if not np.isnan(value)
        },
    )


def test_parts_one_behind_the_other_with_fewer_key_heads_than_query_heads() -> None:
    parts = Part(component="query", units=8, heads=4), Part(component="key", units=4, heads=2)
    row = fused("qkv", 16, *parts, Part(component="value", units=4, heads=2))
    cells, heads = sums([row], {"qkv": [2.0**unit for unit in range(16)]})
    assert cells == {"key": 0xF00, "query": 0xFF, "value": 0xF000}
    assert heads == {
        "key0": 0x300,
        "key1": 0xC00,
        "query0": 0x3,
        "query1": 0xC,
        "query2": 0x30,
        "query3": 0xC0,
        "value0": 0x3000,
        "value1": 0xC000,
    }
    made = grouping([row])
    assert made.cells.entries.sum() == 32
    assert made.cells.entries[0, COMPONENTS.index("query")] == 16
    assert made.heads.entries[0, ATTENTION_COMPONENTS.index("key")].tolist() == [4, 4, 0, 0]


def test_parts_that_repeat_themselves_head_by_head() -> None:
    parts = [Part(component=name, units=4, heads=2) for name in ("query", "key", "value")]
    cells, heads = sums([fused("qkv", 12, *parts, repeats=2)], {"qkv": [2.0**unit for unit in range(12)]})
    assert cells == {"query": 0b000011000011, "key": 0b001100001100, "value": 0b110000110000}
    assert heads == {
        "query0": 0b11,
        "key0": 0b1100,
        "value0": 0b110000,
        "query1": 0b11 << 6,
        "key1": 0b1100 << 6,
        "value1": 0b110000 << 6,
    }


def test_a_part_without_heads_beside_one_with_heads_counts_in_its_cell_alone() -> None:
    row = fused("mixed", 6, Part(component="query", units=4, heads=2), Part(component="W1", units=2))
    cells, heads = sums([row], {"mixed": [1, 2, 4, 8, 16, 32]})
    assert cells == {"query": 15, "W1": 48}
    assert heads == {"query0": 3, "query1": 12}


def test_the_uses_of_a_tied_parameter_have_cells_of_their_own_and_are_counted_once() -> None:
    shape: dict[str, Any] = {"shape": (3, 2), "dtype": "float32"}
    uses = (
        Parameter(name="embed", component="embedding", **shape),
        Parameter(name="head", component="output", tied_to="embed", **shape),
    )
    tied = Parameter(name="embed", aliases=("head",), component="embedding", uses=uses, **shape)
    table = [*split_by_use([tied]), Parameter(name="w", component="W1", **shape)]
    assert sums(table, {"embed": [1, 2, 4], "head": [8, 16, 32], "w": [64, 0, 0]})[0] == {
        "embedding": 7,
        "output": 56,
        "W1": 64,
    }
    made = grouping(table)
    assert made.cells.entries.sum() - made.tied.sum() == 12
    assert made.tied[0, COMPONENTS.index("output")] == 6
