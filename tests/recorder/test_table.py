from __future__ import annotations

import json
from typing import Any

import pytest

from recorder.errors import FormatError
from recorder.table import Parameter, Part, split_by_use

EMBEDDING: dict[str, Any] = {"shape": (3, 2), "dtype": "float32"}
FUSED = Parameter(
    name="qkv",
    shape=(12, 2),
    dtype="float32",
    component="fused",
    fused=tuple(Part(component=name, units=4, heads=2) for name in ("query", "key", "value")),
    repeats=2,
)
USES = (
    Parameter(name="embed", aliases=("shared",), component="embedding", **EMBEDDING),
    Parameter(name="head", component="output", tied_to="embed", **EMBEDDING),
)
TIED = Parameter(name="embed", aliases=("shared", "head"), component="embedding", uses=USES, **EMBEDDING)


@pytest.mark.parametrize(
    "row", [FUSED, TIED, Parameter(name="w", shape=(2,), dtype="float32")], ids=lambda row: row.name
)
def test_a_row_survives_json(row: Parameter) -> None:
    assert Parameter.from_dict(json.loads(json.dumps(row.to_dict()))) == row


def test_a_plain_row_tells_nothing_of_what_few_rows_have() -> None:
    row = Parameter(name="w", shape=(2,), dtype="float32").to_dict()
    assert not {"model_dtype", "fused", "repeats", "uses", "tied_to"} & set(row)


def test_its_blocks_are_its_units_in_order() -> None:
    found = [(FUSED.parts[block.part].component, block.head, block.units) for block in FUSED.blocks]
    assert found == [(name, head, 2) for head in (0, 1) for name in ("query", "key", "value")]
    (whole,) = Parameter(name="w", shape=(5, 3), dtype="float32", unit_axis=1).blocks
    assert (whole.part, whole.head, whole.units) == (0, None, 3)


def test_a_table_split_by_use_has_a_row_for_every_use_in_the_place_of_the_tied_parameter() -> None:
    other = Parameter(name="w", shape=(2,), dtype="float32")
    assert split_by_use([TIED, other]) == (*USES, other)


def fused_with(**changes: Any) -> dict[str, Any]:
    return {**FUSED.to_dict(), **changes}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (fused_with(component="query"), "component 'fused' and no heads where it has parts"),
        (fused_with(fused=[]), "component 'fused' and no heads where it has parts"),
        (fused_with(heads=2), "found component 'fused', 3 parts, 2 heads"),
        (fused_with(fused=[{"component": "query", "units": 4}]), "parts have 4 units, but it has 12"),
        (fused_with(fused=[{"component": "quiery", "units": 12}]), "component 'quiery' is none of"),
        (
            fused_with(fused=[{"component": "query", "units": 12, "heads": 5}], repeats=1),
            "12 units do not divide into 5",
        ),
        (fused_with(fused=[{"component": "query", "units": 12, "heads": 3}]), "12 units in 3 heads .* 2 repetitions"),
        (fused_with(repeats=0), "0 repetitions"),
        (fused_with(fused=[{"component": "query", "rows": 12}]), "a part is not understood .*rows"),
        ({**TIED.to_dict(), "uses": [USES[0].to_dict()]}, "expected two uses or more"),
        ({**TIED.to_dict(), "uses": [use.to_dict() for use in USES[::-1]]}, "the first of this name"),
        ({**TIED.to_dict(), "shape": [2, 3]}, "its uses must have its shape"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        Parameter.from_dict(row)
