from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from recorder.errors import FormatError
from recorder.parameters import (
    UnmappedParameterWarning,
    naming_rules,
    parameter_table,
    parse_naming_rules,
    warn_of_unmapped,
)
from recorder.table import COMPONENTS, Parameter
from tests.cases import TinyTransformer


def row(**changes: Any) -> Parameter:
    fields: dict[str, Any] = {"name": "decoder.w", "shape": (6, 4), "dtype": "float32", "component": "query"}
    return Parameter(**(fields | changes))


def test_the_tiny_transformer_is_mapped_like_a_fairseq_decoder() -> None:
    table = {parameter.name: parameter for parameter in parameter_table(TinyTransformer(width=8, heads=2, layers=2))}
    assert {parameter.component for parameter in table.values()} == {
        *("key", "query", "value", "out", "W1", "W2", "embedding", "norm"),
    }
    out = table["decoder.layers.1.self_attn.out_proj.weight"]
    assert (out.layer, out.stack, out.depth, out.component) == ("decoder.1", "decoder", 1, "out")
    assert (out.unit_axis, out.units, out.heads, out.size) == (1, 8, 2, 64)
    assert table["decoder.embed_tokens.weight"].aliases == ("decoder.output_projection.weight",)


def test_heads_are_read_from_the_live_module_not_guessed() -> None:
    table = parameter_table(TinyTransformer(width=8, heads=4, layers=1))
    heads = {parameter.heads for parameter in table if parameter.component in {"key", "query", "value"}}
    assert heads == {4}


def test_the_first_rule_that_matches_the_whole_name_decides() -> None:
    rules = parse_naming_rules(
        """
        [fragments]
        end = '(?:weight|bias)'
        [[rule]]
        pattern = '0\\.{end}'
        component = "W1"
        [[rule]]
        pattern = '.*'
        component = "norm"
        """,
        "own.toml",
    )
    table = parameter_table(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))), rules)
    assert {parameter.name: parameter.component for parameter in table} == {
        "0.weight": "W1",
        "0.bias": "W1",
        "1.weight": "norm",
        "1.bias": "norm",
        "2.0.weight": "norm",  # "0.weight" is only its end
        "2.0.bias": "norm",
    }


@pytest.mark.parametrize(
    ("rule", "problem"),
    [("pattern = '('\ncomponent = 'W1'", "subpattern"), ("pattern = 'a'", "component"), ("color = 'red'", "color")],
)
def test_a_rule_that_is_not_understood_is_named_by_file_and_number(rule: str, problem: str) -> None:
    with pytest.raises(FormatError, match=rf"own\.toml: naming rule 1 is not understood: .*{problem}"):
        parse_naming_rules(f"[[rule]]\n{rule}\n", "own.toml")


def test_every_rule_of_the_package_names_a_component_of_the_ledger() -> None:
    components = {part.component for rule in naming_rules() for part in rule.parts or (rule,)}
    assert components == set(COMPONENTS) - {"other"}


def test_parameters_that_no_rule_covers_go_to_other_with_a_warning_that_names_them() -> None:
    table = parameter_table(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)))
    assert {(parameter.component, parameter.layer, parameter.depth) for parameter in table} == {("other", "model", -1)}
    expected = (
        "4 parameters match no naming rule and go to component 'other' (python -m recorder map RUN prints the table, "
        "--map FILE or map= of recorder.watch takes rules of yours): 0.weight, 0.bias, 1.weight, 1.bias"
    )
    with pytest.warns(UnmappedParameterWarning, match=f"^{re.escape(expected)}$"):
        warn_of_unmapped(table)


def test_mapped_and_untrained_parameters_are_warned_of_by_nobody() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unmapped([*parameter_table(TinyTransformer()), row(component="other", status="untrained")])


def test_a_frozen_tensor_is_untrained_and_a_tied_one_stands_once() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3), "c": nn.Linear(2, 3)})
    model["b"].weight = model["a"].weight
    model["c"].weight = model["a"].weight
    model["b"].bias.requires_grad_(False)
    table = {parameter.name: parameter for parameter in parameter_table(model, [])}
    assert list(table) == ["a.weight", "a.bias", "b.bias", "c.bias"]
    assert table["a.weight"].aliases == ("b.weight", "c.weight")
    assert [name for name, parameter in table.items() if not parameter.trained] == ["b.bias"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_shape_and_dtype_are_the_tensors_own(dtype: torch.dtype) -> None:
    model = nn.ParameterDict({"scalar": nn.Parameter(torch.zeros((), dtype=dtype))})
    (scalar,) = parameter_table(model)
    assert (scalar.shape, scalar.units, scalar.size) == ((), 1, 1)
    assert f"torch.{scalar.dtype}" == str(dtype)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"component": "attention"}, "parameter 'decoder.w': component 'attention' is none of key, query, value"),
        ({"unit_axis": 2}, "parameter 'decoder.w': unit axis 2 is not an axis of shape (6, 4)"),
        ({"unit_axis": -1}, "parameter 'decoder.w': unit axis -1 is not an axis of shape (6, 4)"),
        ({"heads": 4}, "parameter 'decoder.w': 6 units do not divide into 4 heads"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused_with_the_reason(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=re.escape(message)):
        row(**changes)


def test_a_row_with_missing_and_unknown_fields_names_them_all() -> None:
    document = row().to_dict() | {"colour": "red", "size": 24}
    del document["dtype"], document["shape"]
    expected = "parameter table, row 'decoder.w': missing fields ['dtype', 'shape'], unknown fields ['colour', 'size']"
    with pytest.raises(FormatError, match=re.escape(expected)):
        Parameter.from_dict(document)
