"""The language of the naming rules, on modules made for the purpose."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from recorder.errors import FormatError
from recorder.namingrules import NamingRule, naming_rules, parse_naming_rules
from recorder.parameters import parameter_table
from recorder.table import FUSED, Parameter, Part


class Attention(nn.Module):
    """Knows its numbers of heads in every way that rules can ask for."""

    def __init__(self, rows: int = 16) -> None:
        super().__init__()
        self.num_heads = 4
        self.sizes = {"gate": 6}
        self.config = SimpleNamespace(num_key_value_heads=2, name="gqa", cached=True, none=0)
        self.proj = nn.Linear(3, rows, bias=False)


class Model(nn.Module):
    def __init__(self, rows: int = 16) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_head=8)
        self.attn = Attention(rows)


class Special(Attention):
    """A user's class derived from one that a rule names."""


def rules(rule: str) -> tuple[NamingRule, ...]:
    return parse_naming_rules(f"[[rule]]\n{rule}\n", "own.toml")


def only_row(model: nn.Module, rule: str) -> Parameter:
    (row,) = parameter_table(model, rules(rule))
    return row


def parts(**fields: str) -> str:
    return f"parts = [{', '.join(f'{{component = {name!r}, {field}}}' for name, field in fields.items())}]"


GROUPS = "'config.num_key_value_heads'"
PROJ = "pattern = '(?P<attention>attn)\\.proj\\.weight'\n"


@pytest.mark.parametrize(
    ("heads", "expected"),
    [("2", 2), ("'num_heads'", 4), ("'config.num_key_value_heads'", 2), ("'model:config.n_head'", 8)],
)
def test_heads_are_a_number_or_an_attribute_of_the_attention_module_or_of_the_model(heads: str, expected: int) -> None:
    row = only_row(Model(), f"{PROJ}component = 'value'\nheads = {heads}")
    assert (row.component, row.heads, row.units) == ("value", expected, 16)


@pytest.mark.parametrize(
    ("heads", "problem"),
    [
        ("'heads'", "module 'attn' (Attention) has no number 'heads'"),
        ("'config.n_head'", "module 'attn' (Attention) has no number 'config.n_head'"),
        ("'config.name'", "module 'attn' (Attention) has no number 'config.name': it is 'gqa'"),
        ("'config.cached'", "module 'attn' (Attention) has no number 'config.cached': it is True"),
        ("'config.none'", "module 'attn' (Attention) has no number 'config.none': it is 0"),
        ("'sizes.up'", "module 'attn' (Attention) has no number 'sizes.up'"),
        ("'model:config.heads'", "the model (Model) has no number 'config.heads'"),
    ],
)
def test_an_attribute_that_holds_no_number_is_told_with_rule_parameter_and_module(heads: str, problem: str) -> None:
    expected = f"own.toml: naming rule 1, for parameter 'attn.proj.weight': {problem}"
    with pytest.raises(FormatError, match=f"^{re.escape(expected)}$"):
        only_row(Model(), f"{PROJ}component = 'value'\nheads = {heads}")


def test_a_rule_of_the_package_does_not_apply_to_a_module_that_it_does_not_fit() -> None:
    (rule,) = rules(f"{PROJ}component = 'value'\nheads = 'heads'")
    (row,) = parameter_table(Model(), [dataclasses.replace(rule, optional=True)])
    assert (row.component, row.layer, row.heads) == ("other", "model", 0)
    (rule,) = rules(f"{PROJ}component = 'value'\nheads = 5")
    (row,) = parameter_table(Model(), [dataclasses.replace(rule, optional=True)])
    assert (row.component, row.heads) == ("other", 0)
    assert all(rule.optional for rule in naming_rules())


@pytest.mark.parametrize(
    ("rows", "fields", "expected"),
    [
        (12, "parts = [{component = 'gate'}, {component = 'W1'}]", [("gate", 6, 0), ("W1", 6, 0)]),
        (
            12,
            parts(query="heads = 2", key="heads = 2", value="heads = 2"),
            [("query", 4, 2), ("key", 4, 2), ("value", 4, 2)],
        ),
        (
            24,  # grouped queries: heads of 3 rows
            parts(query="heads = 'num_heads'", key=f"heads = {GROUPS}", value=f"heads = {GROUPS}"),
            [("query", 12, 4), ("key", 6, 2), ("value", 6, 2)],
        ),
        (
            16,  # the gate has a size of its own
            parts(gate="units = 'sizes.gate'", key="heads = 2", out="heads = 3"),
            [("gate", 6, 0), ("key", 4, 2), ("out", 6, 3)],
        ),
        (5, "parts = [{component = 'gate', units = 2}, {component = 'W1', units = 3}]", [("gate", 2, 0), ("W1", 3, 0)]),
    ],
)
def test_the_units_of_parts_follow_from_their_heads(
    rows: int, fields: str, expected: list[tuple[str, int, int]]
) -> None:
    row = only_row(Model(rows), PROJ + fields)
    assert row.component == FUSED
    assert row.fused == tuple(Part(component=name, units=units, heads=heads) for name, units, heads in expected)


def test_repeated_parts_take_turns() -> None:
    parts = "parts = [{component = 'query', heads = 'num_heads'}, {component = 'key', heads = 'num_heads'}]"
    row = only_row(Model(), f"{PROJ}{parts}\nrepeats = 'num_heads'")
    assert row.repeats == 4
    assert [(row.fused[block.part].component, block.head, block.units) for block in row.blocks] == [
        *[("query", 0, 2), ("key", 0, 2), ("query", 1, 2), ("key", 1, 2)],
        *[("query", 2, 2), ("key", 2, 2), ("query", 3, 2), ("key", 3, 2)],
    ]


@pytest.mark.parametrize(
    ("rows", "fields", "problem"),
    [
        (
            13,
            "parts = [{component = 'gate'}, {component = 'W1'}]",
            "the 13 units of parameter 'attn.proj.weight' do not divide into parts of [0, 0] heads and [0, 0] units",
        ),
        (
            16,
            "parts = [{component = 'gate'}, {component = 'key', heads = 2}]",
            "parts of [0, 2] heads and [0, 0] units",
        ),
        (
            16,
            "parts = [{component = 'gate', units = 17}, {component = 'W1'}]",
            "parts of [0, 0] heads and [17, 0] units",
        ),
        (16, "parts = [{component = 'gate', units = 7}]", "its parts have 7 units, but it has 16"),
        (16, "parts = [{component = 'gate'}]\nunit_axis = 2", "of shape (16, 3) has no axis 2"),
        (16, "component = 'key'\nheads = 3", "16 units do not divide into 3 heads"),
    ],
)
def test_a_rule_that_does_not_fit_the_tensor_is_told_with_the_numbers(rows: int, fields: str, problem: str) -> None:
    with pytest.raises(FormatError, match=re.escape(problem)):
        only_row(Model(rows), PROJ + fields)


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("pattern = 'a'\ncomponent = 'attention'", "component 'attention' is none of key, query"),
        ("pattern = 'a'\nparts = [{component = 'keys'}]", "component 'keys' is none of key, query"),
        ("pattern = 'a'\nparts = [{heads = 2}]", "component"),
        ("pattern = 'a'\nparts = [{component = 'key', size = 2}]", "field 'size' is none of component, heads, units"),
        ("pattern = 'a'\nparts = ['key']", "expected a table, found 'key'"),
        (
            "pattern = 'a'\ncomponent = 'key'\nparts = [{component = 'key'}]",
            "either a component, with its heads, or parts",
        ),
        ("pattern = 'a'\nheads = 2\nparts = [{component = 'key'}]", "either a component, with its heads, or parts"),
        ("pattern = 'a'\ncomponent = 'key'\nrepeats = 2", "only parts can repeat"),
        ("pattern = 'a'\ncomponent = 'key'\nheads = 0", "0 is no number of heads"),
        ("pattern = 'a'\ncomponent = 'key'\nheads = true", "True is no number of heads"),
        ("pattern = 'a'\ncomponent = 'key'\nheads = 1.5", "heads = 1.5 is of the wrong type"),
        (
            "pattern = 'a'\ncomponent = 'key'\nheads = 'n_head'",
            "no group 'attention' to name the module with .* 'n_head'",
        ),
        ("pattern = '(?P<depth>1)'\ncomponent = 'key'", "expected a stack and a depth of 0 or more"),
        ("pattern = '(?P<stack>1)'\ncomponent = 'key'", "expected a stack and a depth of 0 or more"),
        ("pattern = '1'\ncomponent = 'key'\nstack = 'decoder'", "expected a stack and a depth of 0 or more"),
        ("pattern = '1'\ncomponent = 'key'\nstack = 'a'\ndepth = -1", "expected a stack and a depth of 0 or more"),
        ("pattern = '1'\ncomponent = 'key'\nclasses = {layer = 'Layer'}", "no group 'layer', which `classes` names"),
        ("pattern = '(?P<a>1)'\ncomponent = 'key'\nclasses = {a = '('}", "subpattern"),
    ],
)
def test_a_rule_that_makes_no_sense_is_named_by_file_and_number(rule: str, problem: str) -> None:
    with pytest.raises(FormatError, match=rf"^own\.toml: naming rule 1 is not understood: .*{problem}"):
        rules(rule)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[[rule]\n", "own.toml is no TOML: "),
        ("[rules]\n", "own.toml: expected a table [fragments] and tables [[rule]], found ['rules']"),
        ("rule = 3\n", "own.toml: expected a table [fragments] and tables [[rule]], found ['rule']"),
    ],
)
def test_a_file_that_is_no_table_of_rules_is_refused(text: str, problem: str) -> None:
    with pytest.raises(FormatError, match=f"^{re.escape(problem)}"):
        parse_naming_rules(text, "own.toml")


def test_a_rule_asks_for_the_class_of_a_module_that_its_pattern_names() -> None:
    model = nn.ModuleDict({"a": Attention(), "b": Special(), "c": nn.Sequential()})
    model["c"].proj = nn.Linear(3, 2, bias=False)
    condition = r"""
    [fragments]
    kind = 'Att(?:ention)'
    [[rule]]
    pattern = '(?P<attention>.)\.proj\.weight'
    component = "key"
    classes = {attention = '{kind}'}
    [[rule]]
    pattern = '(?P<attention>.)\.proj\.weight'
    component = "W1"
    """
    table = parameter_table(model, parse_naming_rules(condition, "own.toml"))
    assert [row.component for row in table] == ["key", "key", "W1"]


LAYERS = r"""
[[rule]]
pattern = '(?P<tower>(?:.+\.)?)layers\.(?P<depth>\d+)\.weight'
component = "W1"
stack = "decoder"
"""


def layers(number: int) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(number))})


def test_layers_of_several_towers_are_kept_apart_and_of_one_tower_have_its_plain_name() -> None:
    one = parameter_table(nn.ModuleDict({"text": layers(2)}), parse_naming_rules(LAYERS, "own.toml"))
    assert [(row.layer, row.stack, row.depth) for row in one] == [
        ("decoder.0", "decoder", 0),
        ("decoder.1", "decoder", 1),
    ]
    model = nn.ModuleDict({"text": layers(1), "image": layers(1), "layers": layers(1)["layers"]})  # type: ignore[index]
    several = parameter_table(model, parse_naming_rules(LAYERS, "own.toml"))
    assert [(row.layer, row.stack, row.depth) for row in several] == [
        *[("text.decoder.0", "text.decoder", 0), ("image.decoder.0", "image.decoder", 0), ("decoder.0", "decoder", 0)]
    ]


def test_names_that_wrappers_insert_are_invisible_to_rules_and_to_the_look_up_of_heads() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

    model = Model()
    model.attn = Wrapper(model.attn)  # type: ignore[assignment]
    (row,) = parameter_table(Wrapper(model), rules(f"{PROJ}component = 'key'\nheads = 'num_heads'"))
    assert (row.name, row.component, row.heads) == ("_orig_mod.attn._orig_mod.proj.weight", "key", 4)


class Tied(nn.Module):
    """One tensor under four names: two of one module, one of an output layer, one that no rule knows."""

    def __init__(self) -> None:
        super().__init__()
        self.nobody = nn.Linear(2, 5, bias=False)
        self.lm_head = nn.Linear(2, 5, bias=False)
        self.embed = nn.Embedding(5, 2)
        self.shared = self.embed
        self.nobody.weight = self.lm_head.weight = self.embed.weight


TIED = r"""
[[rule]]
pattern = 'lm_head\.weight'
component = "output"
[[rule]]
pattern = 'shared\.weight'
component = "embedding"
"""


def summary(row: Parameter) -> tuple[Any, ...]:
    return (row.name, row.aliases, row.component, row.tied_to)


def test_uses_of_a_tied_weight_are_the_cells_of_its_names() -> None:
    (row,) = parameter_table(Tied(), parse_naming_rules(TIED, "own.toml"))
    assert summary(row) == ("nobody.weight", ("lm_head.weight", "embed.weight", "shared.weight"), "output", None)
    assert [summary(use) for use in row.uses] == [
        ("nobody.weight", ("lm_head.weight",), "output", None),
        # no rule knows embed.weight, but it is the same module as shared.weight
        ("embed.weight", ("shared.weight",), "embedding", "nobody.weight"),
    ]
    assert {(use.shape, use.dtype, use.status) for use in row.uses} == {((5, 2), "float32", "trained")}


@pytest.mark.parametrize("known", [TIED.split("[[rule]]")[1], ""])
def test_a_tied_weight_in_one_cell_has_no_uses(known: str) -> None:
    (row,) = parameter_table(Tied(), parse_naming_rules(f"[[rule]]{known}" if known else "", "own.toml"))
    assert (row.uses, row.component) == ((), "output" if known else "other")


def test_a_layer_that_stands_in_a_stack_twice_is_one_use_of_its_weights() -> None:
    layer = nn.Linear(2, 2, bias=False)
    model = nn.ModuleDict({"layers": nn.ModuleList([layer, layer])})
    (row,) = parameter_table(model, parse_naming_rules(LAYERS, "own.toml"))
    assert (row.layer, row.aliases, row.uses) == ("decoder.0", ("layers.1.weight",), ())
    copies = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(2))
    copies[1].weight = copies[0].weight
    (row,) = parameter_table(nn.ModuleDict({"layers": copies}), parse_naming_rules(LAYERS, "own.toml"))
    assert [use.layer for use in row.uses] == ["decoder.0", "decoder.1"]


def test_a_tied_frozen_weight_is_untrained_in_all_its_uses() -> None:
    model = Tied()
    model.embed.weight.requires_grad_(False)
    (row,) = parameter_table(model, parse_naming_rules(TIED, "own.toml"))
    assert {row.status, *(use.status for use in row.uses)} == {"untrained"}
    assert torch.equal(model.embed.weight, model.lm_head.weight)


def test_the_rules_of_the_documentation_are_understood() -> None:
    page = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"(?:^    .*\n|^\n)+", page[page.index("    [fragments]") :], flags=re.MULTILINE)[:1]
    mixer = Attention(16)
    mixer.n_heads, mixer.config.n_kv_heads = 4, 2  # type: ignore[assignment]
    mixer.qkv, mixer.proj = nn.Linear(3, 16), nn.Linear(8, 3, bias=False)
    model = nn.ModuleDict({"tokens": nn.Embedding(5, 3), "blocks": nn.ModuleList([nn.ModuleDict({"mixer": mixer})])})
    table = {row.name: row for row in parameter_table(model, parse_naming_rules(textwrap.dedent(block), "models.md"))}
    parts = [(part.component, part.units, part.heads) for part in table["blocks.0.mixer.qkv.bias"].parts]
    assert parts == [("query", 8, 4), ("key", 4, 2), ("value", 4, 2)]
    out = table["blocks.0.mixer.proj.weight"]
    assert (out.layer, out.component, out.unit_axis, out.heads) == ("decoder.0", "out", 1, 4)
    assert (table["tokens.weight"].component, table["tokens.weight"].layer) == ("embedding", "model")
