from __future__ import annotations

import numpy as np
import pytest

from recorder.errors import FormatError
from reduce.grouping import grouping
from replay.shards import ATTENTION_COMPONENTS, COMPONENTS, Parameter


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
