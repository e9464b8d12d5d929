"""What must hold of the parameter table of every model family, and the truth about its heads from the model itself.

The truth shares nothing with names or tables: every attention sends its scores through softmax, so softmax is watched
(and scaled_dot_product_attention is put in terms of it).
The number of heads is that of the matrices of attention probabilities. Query and key of head h are the weights that
the probabilities of head h have a gradient for. Value and out of head h are the weights that the loss has a gradient
for when the probabilities of all other heads are zero.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from recorder.parameters import parameter_table, warn_of_unmapped
from recorder.table import ATTENTION_COMPONENTS, COMPONENTS, Parameter, split_by_use
from reduce.grouping import Grouping, grouping
from reduce.statistics import STATISTICS

Units = npt.NDArray[np.int64]
LCA, LCA_HEAD = (next(each for each in STATISTICS if each.variable == name) for name in ("lca", "lca_head"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A tiny model of one family.

    `loss` runs it on one fixed example. `attentions` says in the order of their computation where each attention
    belongs: its layer, and the prefix of its components. `stacks` gives the live lists of layers by the name of their
    stack. `rotary`: keys are turned by their position, so that their bias matters.
    """

    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module], torch.Tensor]
    attentions: tuple[tuple[str, str], ...]
    stacks: Mapping[str, Callable[[nn.Module], nn.ModuleList]]
    components: frozenset[str]
    uses: tuple[str, ...] = ()
    rotary: bool = False

    def __str__(self) -> str:
        return self.name

    def model(self) -> nn.Module:
        torch.manual_seed(3)
        model = self.build().double().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.4)
        return model


@dataclasses.dataclass
class Softmax:
    """The attention probabilities of a forward pass, one call of softmax after the other: (heads, queries, keys).

    Of the call number `keep[0]` the probabilities of all heads but `keep[1]` are set to zero.
    """

    keep: tuple[int, Collection[int]] | None = None
    calls: list[torch.Tensor] = dataclasses.field(default_factory=list)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Softmax]:
        original = functional.softmax

        def softmax(scores: torch.Tensor, dim: int | None = None, **_: Any) -> torch.Tensor:
            assert dim == -1
            probabilities = original(scores, dim=-1)
            if self.keep is not None and self.keep[0] == len(self.calls):
                number = probabilities.flatten(end_dim=-3).shape[0]
                kept = torch.tensor([head in self.keep[1] for head in range(number)])
                probabilities = probabilities * kept.view(*probabilities.shape[:-2], 1, 1)
            self.calls.append(probabilities.flatten(end_dim=-3))
            return probabilities

        fused = functional.scaled_dot_product_attention
        fast = torch.backends.mha.get_fastpath_enabled()
        functional.softmax = softmax  # type: ignore[assignment]
        functional.scaled_dot_product_attention = _attention  # type: ignore[assignment]
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield self
        finally:
            functional.softmax = original
            functional.scaled_dot_product_attention = fused
            torch.backends.mha.set_fastpath_enabled(fast)


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
) -> torch.Tensor:
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    if is_causal:
        attn_mask = torch.full(scores.shape[-2:], -torch.inf, dtype=scores.dtype).triu(1)
    return functional.softmax(scores if attn_mask is None else scores + attn_mask, dim=-1) @ value


def gradients(value: torch.Tensor, model: nn.Module) -> dict[str, torch.Tensor]:
    named = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True, retain_graph=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in zip(named.items(), found, strict=True)
    }


def with_gradient(gradient: torch.Tensor, row: Parameter) -> set[int]:
    by_unit = gradient.movedim(row.unit_axis, 0).flatten(1)
    return set(torch.nonzero((by_unit != 0).any(1)).flatten().tolist())


def units_of(row: Parameter, component: str) -> dict[int | None, set[int]]:
    """Head of the component to the units that the table gives it."""
    found: dict[int | None, set[int]] = {}
    start = 0
    for block in row.blocks:
        if row.parts[block.part].component == component:
            found.setdefault(block.head, set()).update(range(start, start + block.units))
        start += block.units
    return found


def of_cell(table: Sequence[Parameter], layer: str, component: str) -> list[Parameter]:
    """Rows of weights, not of biases."""
    rows = [row for row in table if row.layer == layer and len(row.shape) > 1]
    return [row for row in rows if any(part.component == component for part in row.parts)]


def values_of(table: Sequence[Parameter], model: nn.Module, entries: Mapping[int, torch.Tensor]) -> dict[str, Any]:
    """Sum entries over units: what a shard of one step holds. `entries` is by identity of the tensor."""
    tensors = dict(model.named_parameters())
    return {
        row.name: entries[id(tensors[row.name])].movedim(row.unit_axis, 0).reshape(1, row.units, -1).sum(2).numpy()
        for row in table
    }


def cube(groups: Grouping, units: Mapping[str, Any]) -> tuple[Any, Any]:
    """Lca (layers, components) and lca_head (layers, attention components, heads), as reduce makes them."""
    cells, heads = (each.partial(units, each.groups(groups), 1)[0] for each in (LCA, LCA_HEAD))
    return cells.reshape(groups.cells.shape), heads.reshape(groups.heads.shape)


def random_entries(model: nn.Module) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return {id(each): torch.randn(each.shape, generator=generator, dtype=torch.float64) for each in model.parameters()}


class NamingProperties:
    """The tests of each family; a subclass has the fixture `family`."""

    def test_query_and_key_heads_are_those_whose_probabilities_they_decide(self, family: Family) -> None:
        model = family.model()
        table = parameter_table(model)
        with Softmax().watched() as softmax:
            family.loss(model)
        assert len(softmax.calls) == len(family.attentions)
        for probabilities, (layer, prefix) in zip(softmax.calls, family.attentions, strict=True):
            generator = torch.Generator().manual_seed(4)
            weights = torch.randn(probabilities.shape[1:], generator=generator, dtype=torch.float64)
            for head, of_head in enumerate(probabilities):
                found = gradients((weights * of_head).sum(), model)
                for row in table:
                    if row.layer != layer or len(row.shape) < 2:
                        continue
                    expected = set()
                    for component in (f"{prefix}query", f"{prefix}key"):
                        of_row = units_of(row, component)
                        shared = len(probabilities) // len(of_row) if of_row else 1
                        expected |= of_row.get(head // shared, set())
                    if expected:
                        assert with_gradient(found[row.name], row) == expected, (row.name, head)
                self._check_biases(family, [row for row in table if row.layer == layer], prefix, head, found)

    def _check_biases(
        self, family: Family, rows: Sequence[Parameter], prefix: str, head: int, found: Mapping[str, torch.Tensor]
    ) -> None:
        # The same vector added to all keys changes no probability, so query and key of a fused bias are told apart.
        for row in rows:
            if len(row.shape) > 1 or family.rotary:
                continue
            queries, keys = units_of(row, f"{prefix}query"), units_of(row, f"{prefix}key")
            gradient = found[row.name].abs()
            assert all((gradient[sorted(units)] > 1e-9).all() == (of == head) for of, units in queries.items())
            assert all((gradient[sorted(units)] < 1e-12).all() for units in keys.values())

    def test_value_and_out_heads_are_those_that_act_through_their_probabilities_alone(self, family: Family) -> None:
        model = family.model()
        table = parameter_table(model)
        with Softmax().watched() as every:
            family.loss(model)
        for call, (layer, prefix) in enumerate(family.attentions):
            for head in range(len(every.calls[call])):
                with Softmax(keep=(call, {head})).watched():
                    found = gradients(family.loss(model), model)
                for component in (f"{prefix}value", f"{prefix}out"):
                    rows = of_cell(table, layer, component)
                    assert rows
                    for row in rows:
                        of_row = units_of(row, component)
                        shared = len(every.calls[call]) // len(of_row)
                        known = set().union(*of_row.values())
                        assert with_gradient(found[row.name], row) & known == of_row[head // shared], (row.name, head)

    def test_without_a_heads_out_or_probabilities_or_values_the_loss_is_the_same(self, family: Family) -> None:
        model = family.model()
        table = parameter_table(model)
        with Softmax().watched() as every, torch.no_grad():
            whole = family.loss(model)
        for call, (layer, prefix) in enumerate(family.attentions):
            (value,) = of_cell(table, layer, f"{prefix}value")
            biases = [
                row for row in table if row.layer == layer and len(row.shape) == 1 and units_of(row, f"{prefix}value")
            ]
            (out,) = of_cell(table, layer, f"{prefix}out")
            values, outs = units_of(value, f"{prefix}value"), units_of(out, f"{prefix}out")
            shared = len(outs) // len(values)
            assert len(outs) == len(every.calls[call])
            with torch.no_grad():
                with Softmax(keep=(call, range(shared, len(outs)))).watched():
                    expected = family.loss(model)
                in_value = {row.name: units_of(row, f"{prefix}value")[0] for row in (value, *biases)}
                in_out = {out.name: set().union(*(outs[head] for head in range(shared)))}
                for units in (in_value, in_out):
                    found = self._loss_without(family, model, table, units)
                    # LLaMA's norms round to float32 on the way.
                    assert abs(found - expected) < 1e-3 * abs(expected - whole)

    def _loss_without(
        self, family: Family, model: nn.Module, table: Sequence[Parameter], units: Mapping[str, set[int]]
    ) -> torch.Tensor:
        without = copy.deepcopy(model)
        axes = {row.name: row.unit_axis for row in table}
        for name, of_row in units.items():
            without.get_parameter(name).index_fill_(axes[name], torch.tensor(sorted(of_row)), 0.0)
        return family.loss(without)

    def test_changing_one_heads_weights_alone_moves_exactly_that_heads_cell(self, family: Family) -> None:
        model = family.model()
        table = parameter_table(model)
        tensors = dict(model.named_parameters())
        entries = random_entries(model)
        groups = grouping(table)
        untouched = values_of(table, model, {key: torch.zeros_like(tensor) for key, tensor in entries.items()})
        for layer, prefix in family.attentions:
            place = [each.name for each in groups.layers].index(layer)
            for kind in ("query", "key", "value", "out"):
                (row,) = of_cell(table, layer, f"{prefix}{kind}")
                for head, units in units_of(row, f"{prefix}{kind}").items():
                    assert head is not None
                    key = id(tensors[row.name])
                    index = torch.tensor(sorted(units))
                    whole = entries[key].index_select(row.unit_axis, index)
                    moved = torch.zeros_like(entries[key]).index_copy_(row.unit_axis, index, whole)
                    cells, heads = cube(groups, untouched | values_of([row], model, {key: moved}))
                    expected = np.zeros_like(heads)
                    expected[place, ATTENTION_COMPONENTS.index(f"{prefix}{kind}"), head] = float(whole.sum())
                    np.testing.assert_allclose(heads, expected, rtol=1e-9, atol=0)
                    in_cells = np.zeros_like(cells)
                    in_cells[place, COMPONENTS.index(f"{prefix}{kind}")] = float(whole.sum())
                    np.testing.assert_allclose(cells, in_cells, rtol=1e-9, atol=0)

    def test_the_sum_over_all_cells_is_the_total_and_tied_weights_are_counted_once(self, family: Family) -> None:
        model = family.model()
        table = parameter_table(model)
        trainable = {id(each): each.numel() for each in model.parameters() if each.requires_grad}
        entries = random_entries(model)
        groups = grouping(table)
        cells, _ = cube(groups, values_of(table, model, entries))
        total = float(sum(each.sum() for key, each in entries.items() if key in trainable))
        np.testing.assert_allclose(cells.sum(), total, rtol=1e-9)
        assert groups.cells.entries.sum() == sum(trainable.values())
        split = grouping(split_by_use(table))
        assert split.cells.entries.sum() - split.tied.sum() == sum(trainable.values())
        assert tuple(use.component for row in table for use in row.uses) == family.uses
        assert bool(split.tied.sum()) == bool(family.uses)

    def test_a_permutation_of_layers_permutes_the_cube(self, family: Family) -> None:
        model = family.model()
        entries = random_entries(model)
        table = parameter_table(model)
        before = grouping(table)
        cells, heads = cube(before, values_of(table, model, entries))
        order = {layer.name: number for number, layer in enumerate(before.layers)}
        from_layer = dict(zip(order, order, strict=True))
        for stack, layers_of in family.stacks.items():
            layers = layers_of(model)
            moved = [*list(layers)[1:], layers[0]]
            for depth, layer in enumerate(moved):
                layers[depth] = layer
                from_layer[f"{stack}.{depth}"] = f"{stack}.{(depth + 1) % len(moved)}"
        table = parameter_table(model)
        after = grouping(table)
        moved_cells, moved_heads = cube(after, values_of(table, model, entries))
        assert [layer.name for layer in after.layers] == list(order)
        permuted = [order[from_layer[name]] for name in order]
        assert permuted != sorted(permuted)
        np.testing.assert_allclose(moved_cells, cells[permuted], rtol=1e-9)
        np.testing.assert_allclose(moved_heads, heads[permuted], rtol=1e-9)

    def test_nothing_trained_is_left_without_a_component(self, family: Family) -> None:
        table = parameter_table(family.model())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_unmapped(table)
        rows = [row for row in split_by_use(table) if row.trained]
        assert {part.component for row in rows for part in row.parts} == family.components

    def test_a_bias_lies_as_its_weight_does(self, family: Family) -> None:
        table = {row.name: row for row in parameter_table(family.model())}
        pairs = [
            (row, table[f"{name.removesuffix('weight')}bias"])
            for name, row in table.items()
            if f"{name.removesuffix('weight')}bias" in table and name.endswith("weight")
        ]
        for weight, bias in pairs:
            assert (bias.layer, bias.component, bias.unit_axis) == (weight.layer, weight.component, 0)
            assert (bias.fused, bias.repeats) == (weight.fused, weight.repeats)
            assert bias.heads == (0 if weight.component.endswith("out") else weight.heads)

    def test_inside_other_modules_the_table_is_the_same_and_two_towers_are_kept_apart(self, family: Family) -> None:
        model = family.model()
        plain = [dataclasses.replace(row, name="", aliases=(), uses=()) for row in parameter_table(model)]
        wrapped = nn.ModuleDict({"module": nn.ModuleDict({"_orig_mod": model})})
        inside = [dataclasses.replace(row, name="", aliases=(), uses=()) for row in parameter_table(wrapped)]
        assert inside == plain
        towers = parameter_table(nn.ModuleDict({"left": family.model(), "right": family.model()}))
        layers = {row.layer for row in plain if row.depth >= 0}
        found = {
            side: {row.layer for row in towers if row.name.startswith(side) and row.depth >= 0}
            for side in ("left", "right")
        }
        assert not found["left"] & found["right"]
        assert len(found["left"]) == len(found["right"]) == len(layers)
        assert {row.component for row in towers} == {row.component for row in plain}
