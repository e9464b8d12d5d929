"""A table in lines for people, and as a skeleton of rules that is read back."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies as st

from recorder.correction import correct
from recorder.maplines import lines, place_in_words, shape_in_words
from recorder.mapskeleton import is_unsaid, skeleton
from recorder.namingrules import parse_naming_rules
from recorder.parameters import parameter_table
from recorder.placing import Place
from recorder.table import FUSED, Parameter, Part
from tests.cases import TinyTransformer

# --- Tables ---------------------------------------------------------------------------------------------------------


def row(name: str, **changes: Any) -> Parameter:
    fields: dict[str, Any] = {"name": name, "shape": (6, 4), "dtype": "float32"} | changes
    if fields.get("depth", -1) >= 0:
        fields["layer"] = f"{fields['stack']}.{fields['depth']}"
    return Parameter(**fields)


def blank(rows: list[Parameter] | tuple[Parameter, ...]) -> list[Parameter]:
    """The same tensors, as they are recorded where nobody says what they are."""
    return [
        dataclasses.replace(row, uses=(), **Place().fields())  # with the names of its uses among its aliases
        for row in rows
    ]


places: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.builds(
        lambda component, axis, heads: {"component": component, "unit_axis": axis, "heads": 2 * heads},
        st.sampled_from(["key", "W1", "norm", "other"]),
        st.integers(0, 1),
        st.integers(0, 1),
    ),
    st.sampled_from(
        [
            {
                "component": FUSED,
                "fused": (Part(component="query", units=4, heads=2), Part(component="key", units=2, heads=2)),
                "repeats": 2,
            },
            {"component": FUSED, "fused": (Part(component="gate", units=3), Part(component="W1", units=3))},
        ]
    ),
)
layers: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.builds(
        lambda stack, depth: {"stack": stack, "depth": depth},
        st.sampled_from(["encoder", "decoder", "h"]),
        st.integers(0, 3),
    ),
)
names = st.lists(st.sampled_from(["layers", "a+b", "0", "1", "2", "3", "11", "w", "it's"]), min_size=1, max_size=4).map(
    ".".join
)


@st.composite
def tables(draw: st.DrawFn) -> list[Parameter]:
    rows = [
        row(name, **draw(places), **draw(layers)) for name in draw(st.lists(names, unique=True, min_size=1, max_size=9))
    ]
    # A stack counted in the names, as models have it.
    place = draw(places)
    rows += [row(f"x.{depth}.y.0.w", stack="tower", depth=depth, **place) for depth in range(draw(st.integers(0, 3)))]
    if draw(st.booleans()):
        uses = [
            row("tied.w", aliases=("tied.v",), component="embedding"),
            row("far.0.w", component="output", tied_to="tied.w", unit_axis=1),
        ]
        rows.append(dataclasses.replace(uses[0], aliases=("far.0.w", "tied.v"), uses=tuple(uses)))
    return rows


# --- The skeleton ---------------------------------------------------------------------------------------------------


@hypothesis.settings(deadline=None, max_examples=150)
@hypothesis.given(tables())
def test_a_table_written_as_a_skeleton_and_read_back_is_the_same_table(table: list[Parameter]) -> None:
    rules = parse_naming_rules(skeleton(table), "skeleton.toml")
    found = correct(blank(table), rules).parameters
    assert [new for new, old in zip(found, table, strict=True) if not is_unsaid(old)] == [
        old for old in table if not is_unsaid(old)
    ]
    # Of the others the layer is suggested, and nothing else.
    for new, old in zip(found, table, strict=True):
        assert (new.component, new.unit_axis, new.heads) == (old.component, old.unit_axis, old.heads) or not is_unsaid(
            old
        )


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(tables())
def test_the_rules_for_what_is_in_other_speak_of_nothing_else(table: list[Parameter]) -> None:
    text = skeleton(table, only_other=True)
    unsaid = {old.name for old in table if is_unsaid(old)}
    rules = parse_naming_rules(text, "skeleton.toml") if unsaid else ()
    said = {
        name for old in table for name in (old.name, *old.aliases) for rule in rules if rule.pattern.fullmatch(name)
    }
    assert said == unsaid


def test_a_skeleton_of_the_tiny_transformer_makes_its_table() -> None:
    table = parameter_table(TinyTransformer(layers=12))
    text = skeleton(table)
    assert correct(blank(table), parse_naming_rules(text, "skeleton.toml")).parameters == table
    assert text.count("[[rule]]") == 18  # sixteen tensors of a layer, and two uses of the embedding


def test_the_layer_that_a_name_suggests_is_offered_for_what_is_in_other() -> None:
    table = [
        row("decoder.blocks.0.moe.w"),
        row("decoder.blocks.1.moe.w"),
        row("h.3.scale"),
        row("h.3.mlp.w"),
        row("net.0.weight"),
        row("net.2.weight"),
        row("trunk.0.attn.w", component="key", stack="encoder", depth=0),
        row("trunk.0.new.w"),
    ]
    found = {new.name: new.layer for new in correct(table, parse_naming_rules(skeleton(table), "s")).parameters}
    assert found == {
        "decoder.blocks.0.moe.w": "decoder.0",
        "decoder.blocks.1.moe.w": "decoder.1",
        "h.3.scale": "h.3",  # h.3 is a layer, for it holds the module mlp
        "h.3.mlp.w": "h.3",
        "net.0.weight": "model",
        "net.2.weight": "model",
        "trunk.0.attn.w": "encoder.0",
        "trunk.0.new.w": "encoder.0",  # trunk was said to be the encoder
    }


# --- Lines ----------------------------------------------------------------------------------------------------------


@hypothesis.settings(deadline=None, max_examples=100)
@hypothesis.given(tables())
def test_every_row_stands_in_one_line_with_its_like(table: list[Parameter]) -> None:
    found = lines(table)
    assert sorted(row.name for line in found for row in line.rows) == sorted(row.name for row in table)
    for line in found:
        assert len({(place_in_words(row), row.shape, row.stack) for row in line.rows}) == 1


def test_twelve_layers_are_read_as_one() -> None:
    found = {line.name: line for line in lines(parameter_table(TinyTransformer(layers=12)))}
    assert len(found) == 17
    keys = found["decoder.layers.{0-11}.self_attn.k_proj.weight"]
    assert (keys.layers, shape_in_words(keys), len(keys.rows)) == ("decoder.0-11", "2 heads of 4 rows", 12)
    assert shape_in_words(found["decoder.layers.{0-11}.self_attn.out_proj.weight"]) == "2 heads of 4 columns"
    assert shape_in_words(found["decoder.layers.{0-11}.fc1.bias"]) == "16 entries"


def test_numbers_that_count_no_layers_are_put_together_too_where_something_is_said_of_them() -> None:
    said = [row(f"h.{d}.experts.{e}.w", component="W1", stack="h", depth=d) for d in (0, 1, 4) for e in (0, 1)]
    (line,) = lines(said)
    assert (line.name, line.layers) == ("h.{0-1,4}.experts.{0-1}.w", "h.0-1,4")
    unsaid = [row(f"h.{d}.experts.{e}.w") for d in (0, 1) for e in (0, 1)]
    assert [line.name for line in lines(unsaid)] == ["h.{0-1}.experts.0.w", "h.{0-1}.experts.1.w"]


def test_layers_that_differ_stand_apart() -> None:
    table = [row(f"h.{d}.w.w", component="W1", stack="h", depth=d, shape=(6, 4 + (d == 2))) for d in range(4)]
    assert [line.name for line in lines(table)] == ["h.{0-1,3}.w.w", "h.2.w.w"]


def test_fused_units_are_told_part_by_part() -> None:
    parts = (Part(component="query", units=4, heads=2), Part(component="key", units=2, heads=2))
    (line,) = lines([row("qk", component=FUSED, fused=parts, repeats=2)])
    assert shape_in_words(line) == "rows: query 2 heads of 2, key 2 heads of 1, in 2 turns"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"shape": ()}, "1 number"),
        ({"shape": (1,)}, "1 entry"),
        ({"shape": (32, 4), "component": "position", "unit_axis": 1, "heads": 4}, "4 heads of 1 column"),
        ({"shape": (2, 3, 5), "unit_axis": 2}, "5 slices of axis 2"),
    ],
)
def test_units_are_told_in_words(changes: dict[str, Any], expected: str) -> None:
    (line,) = lines([row("w", **changes)])
    assert shape_in_words(line) == expected
