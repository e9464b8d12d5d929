"""The model and the optimizer under watch: what the recorder reads from them at each step.

Only reads: copies of parameters, which of them have a gradient, the state of the random generators, buffers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from recorder import tensorfile
from recorder.errors import UsageError
from recorder.manifest import OptimizerFacts
from recorder.parameters import parameter_table

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer


class Watched:
    """A live model and the optimizer that updates it.

    Parameters
    ----------
    model
        The model in training.
    optimizer
        Any torch optimizer over its parameters.
    left_out
        Names of parameters that are not to be recorded.

    Attributes
    ----------
    table : tuple of Parameter
        The parameter table; `settle_table` and `find_first_gradients` say which parameters are trained.
    device : torch.device
        Where the model is.
    unrecorded_changes : set of str
        Names of buffers and untrained parameters found changed so far.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, *, left_out: Collection[str] = ()) -> None:
        self._model = model
        self._optimizer = optimizer
        self._tensors = dict(model.named_parameters())
        self._names = {id(tensor): name for name, tensor in self._tensors.items()}
        self._checksums: dict[str, int] = {}
        self._recorded_buffers: tuple[str, ...] = ()
        self.table = tuple(
            dataclasses.replace(row, status="not_recorded") if row.name in left_out else row
            for row in parameter_table(model)
        )
        self.device = next(iter(self._tensors.values())).device
        self.unrecorded_changes: set[str] = set()

    def settle_table(self, *, recorded_buffers: tuple[str, ...] = ()) -> None:
        """Find out, just before the first step, which parameters are trained, and remember what must not change.

        Parameters
        ----------
        recorded_buffers
            Names of buffers that are recorded with every step, and so may change.

        Raises
        ------
        UsageError
            If the optimizer updates tensors that are not the model's.
        """
        unknown = len(self._updated() - set(self._names))
        if unknown:
            message = (
                f"the optimizer updates {unknown} tensors that are no parameters of the model given to watch "
                "(a float32 copy kept for 16-bit training, or another model's); such training is not recorded yet"
            )
            raise UsageError(message)
        self._recorded_buffers = recorded_buffers
        with_gradient = self._with_gradient()
        self.table = tuple(
            parameter
            if parameter.name in with_gradient or parameter.status == "not_recorded"
            else dataclasses.replace(parameter, status="untrained")
            for parameter in self.table
        )
        self._checksums = self._checksums_of_unrecorded()

    def find_first_gradients(self) -> bool:
        """Find untrained parameters that now have their first gradient.

        Returns
        -------
        bool
            Whether the table has changed.
        """
        with_gradient = self._with_gradient()
        late = {parameter.name for parameter in self.table if parameter.status == "untrained"} & with_gradient
        if late:
            self.table = tuple(
                dataclasses.replace(parameter, status="trained") if parameter.name in late else parameter
                for parameter in self.table
            )
        return bool(late)

    def _updated(self) -> set[int]:
        return {id(tensor) for group in self._optimizer.param_groups for tensor in group["params"]}

    def _with_gradient(self) -> set[str]:
        updated = self._updated()
        return {name for name, tensor in self._tensors.items() if tensor.grad is not None and id(tensor) in updated}

    def live(self, *, trained: bool = True) -> dict[str, torch.Tensor]:
        """Give the tensors that are recorded with every step, or the others.

        Parameters
        ----------
        trained
            Which.

        Returns
        -------
        dict of str to torch.Tensor
            Name to the training's own tensor.
        """
        return {
            parameter.name: self._tensors[parameter.name] for parameter in self.table if parameter.trained == trained
        }

    def copies(self, *, trained: bool) -> dict[str, torch.Tensor]:
        """Copy the trained parameters, or the others, to host memory.

        Parameters
        ----------
        trained
            Which.

        Returns
        -------
        dict of str to torch.Tensor
            Name to copy.
        """
        return {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.live(trained=trained).items()}

    def skipped(self) -> bool:
        """Say whether the update that just ended did nothing, because a gradient scaler found an overflow.

        Returns
        -------
        bool
            Only for optimizers that the scaler leaves the decision to; others are not called at all.
        """
        found = getattr(self._optimizer, "found_inf", None)
        return found is not None and bool(found.item())

    def gradients_dropped(self) -> bool:
        """Say whether all gradients are gone, so that what was announced before belongs to no update.

        Returns
        -------
        bool
            True if no parameter holds a gradient, or every gradient is zero.
        """
        gradients = [tensor.grad for tensor in self._tensors.values() if tensor.grad is not None]
        return not any(bool(_entries(gradient).any()) for gradient in gradients)

    def gradient_norm(self) -> float:
        """Measure the gradient that the optimizer is about to use.

        Returns
        -------
        float
            Euclidean norm over all parameters.
        """
        gradients = [_entries(tensor.grad) for tensor in self._tensors.values() if tensor.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def random_state(self) -> dict[str, torch.Tensor]:
        """Read the state of torch's generators, which does not advance them.

        Returns
        -------
        dict of str to torch.Tensor
            By the names of `recorder.segments.RANDOM_STATES`.
        """
        state = {"rng_cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["rng_cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def find_unrecorded_changes(self) -> bool:
        """Compare buffers and untrained parameters, which no step records, with those before the first step.

        Returns
        -------
        bool
            Whether `unrecorded_changes` has grown.
        """
        changed = {
            name for name, checksum in self._checksums_of_unrecorded().items() if checksum != self._checksums.get(name)
        }
        grown = bool(changed - self.unrecorded_changes)
        self.unrecorded_changes |= changed
        return grown

    def _checksums_of_unrecorded(self) -> dict[str, int]:
        # Of the bytes: a NaN that stays is no change (fairseq keeps a buffer of memory that it never fills).
        buffers = {name: tensor for name, tensor in self._model.named_buffers() if name not in self._recorded_buffers}
        tensors = {**buffers, **self.live(trained=False)}
        return {name: tensorfile.checksum(tensor.detach().cpu()) for name, tensor in tensors.items()}

    def optimizer_state(self) -> dict[int, dict[str, Any]]:
        """Take the optimizer's state.

        Returns
        -------
        dict
            As ``optimizer.state_dict()["state"]``; empty before its first step.
        """
        state: dict[int, dict[str, Any]] = self._optimizer.state_dict()["state"]
        return state

    def optimizer_facts(self) -> OptimizerFacts:
        """Describe the optimizer.

        Returns
        -------
        OptimizerFacts
            Class, hyperparameters and parameter names of each group.
        """
        groups = []
        for group in self._optimizer.param_groups:
            facts = {
                key: _hyperparameter(value)
                for key, value in group.items()
                if isinstance(value, bool | int | float | str | tuple | None)
            }
            groups.append(facts | {"parameters": [self._names[id(tensor)] for tensor in group["params"]]})
        kind = type(self._optimizer)
        return OptimizerFacts(
            name=f"{kind.__module__}.{kind.__qualname__}", groups=tuple(groups), fresh=not self.optimizer_state()
        )


def _hyperparameter(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_hyperparameter(entry) for entry in value]
    if isinstance(value, torch.Tensor) or (isinstance(value, float) and not math.isfinite(value)):
        value = float(value)
        return value if math.isfinite(value) else repr(value)  # JSON has no NaN and no infinity
    return value


def _entries(gradient: torch.Tensor) -> torch.Tensor:
    # torch takes no norm of a sparse gradient (nn.Embedding(sparse=True)).
    return gradient.coalesce().values() if gradient.is_sparse else gradient
