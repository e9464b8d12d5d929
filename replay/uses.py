"""The uses of a model's tied weights, each with a gradient of its own.

An embedding that is also the output projection is one tensor under two names. Autograd adds up what reaches it by both;
so each use but the first gets a parameter of its own that stands in the model under the use's names and shares the
tensor's memory. Values stay tied, whatever is written into them; gradients do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from recorder.table import Parameter

_Slot = tuple[nn.Module, str]
"""A module, and the attribute of it that holds a parameter."""


class Uses:
    """Takes the uses of tied parameters apart, in the model itself.

    Parameters
    ----------
    model
        The model, tied as in the training. Where all uses of a parameter have places of their own in it, they are apart
        afterwards.
    rows
        Of the ledger: every use but the first of each tied parameter.

    Attributes
    ----------
    parameters : dict of str to torch.nn.Parameter
        Name of a use to its own parameter, of those that are apart.
    inseparable : dict of str to str
        Name of a tied parameter to the reason why its uses have no places of their own.
    """

    def __init__(self, model: nn.Module, rows: Sequence[Parameter]) -> None:
        tensors = dict(model.named_parameters(remove_duplicate=False))
        of_parameter: dict[str, list[Parameter]] = {}
        for row in rows:
            assert row.tied_to is not None
            of_parameter.setdefault(row.tied_to, []).append(row)
        self.parameters: dict[str, nn.Parameter] = {}
        self.inseparable: dict[str, str] = {}
        # Where each parameter of its own stands, and the tied one that stood there.
        self._places: list[tuple[_Slot, nn.Parameter, nn.Parameter]] = []
        for name, uses in of_parameter.items():
            reason = _why_inseparable(model, tensors, name, uses)
            if reason:
                self.inseparable[name] = reason
                continue
            tied = tensors[name]
            for use in uses:
                own = self.parameters[use.name] = nn.Parameter(tied.detach(), requires_grad=tied.requires_grad)
                self._places += [(_slot(model, other), own, tied) for other in (use.name, *use.aliases)]
        self._put(together=False)

    def _put(self, *, together: bool) -> None:
        for (module, attribute), own, tied in self._places:
            setattr(module, attribute, tied if together else own)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Tie the uses again, for a while.

        Yields
        ------
        None
            The model is as it was built.
        """
        self._put(together=True)
        try:
            yield
        finally:
            self._put(together=False)


def _slot(model: nn.Module, name: str) -> _Slot:
    module, _, attribute = name.rpartition(".")
    return model.get_submodule(module), attribute


def _why_inseparable(
    model: nn.Module, tensors: dict[str, nn.Parameter], name: str, uses: Sequence[Parameter]
) -> str | None:
    use_of = {alias: use.name for use in uses for alias in (use.name, *use.aliases)}
    elsewhere = [alias for alias in use_of if tensors.get(alias) is not tensors[name]]
    if elsewhere:
        return f"the model that the workload builds does not have that tensor at {elsewhere[0]!r}"
    # What no use claims stays with the first one.
    found: dict[tuple[int, str], str] = {}
    for alias in (alias for alias, tensor in tensors.items() if tensor is tensors[name]):
        module, attribute = _slot(model, alias)
        other = found.setdefault((id(module), attribute), alias)
        if use_of.get(other) != use_of.get(alias):
            return f"{other!r} and {alias!r} are one and the same module"
    return None
