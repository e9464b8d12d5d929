"""The model and the optimizer under watch: what the recorder reads from them at each step.

Only reads: copies of parameters, which of them have a gradient, the state of the random generators, buffers.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch

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

    Attributes
    ----------
    table : tuple of Parameter
        The parameter table; `settle_table` and `find_first_gradients` say which parameters are trained.
    device : torch.device
        Where the model is.
    changing_buffers : set of str
        Names of the buffers found changed so far.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        self._tensors = dict(model.named_parameters())
        self._names = {id(tensor): name for name, tensor in self._tensors.items()}
        self._buffers: dict[str, torch.Tensor] = {}
        self.table = parameter_table(model)
        self.device = next(iter(self._tensors.values())).device
        self.changing_buffers: set[str] = set()

    def settle_table(self) -> None:
        """Find out, just before the first step, which parameters are trained, and remember the buffers.

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
        with_gradient = self._with_gradient()
        self.table = tuple(
            parameter if parameter.name in with_gradient else dataclasses.replace(parameter, status="untrained")
            for parameter in self.table
        )
        self._buffers = {name: buffer.detach().clone() for name, buffer in self._model.named_buffers()}

    def find_first_gradients(self) -> bool:
        """Find untrained parameters that now have their first gradient.

        Returns
        -------
        bool
            Whether the table has changed.
        """
        with_gradient = self._with_gradient()
        late = {parameter.name for parameter in self.table if not parameter.trained} & with_gradient
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
        return {
            parameter.name: self._tensors[parameter.name].detach().to("cpu", copy=True)
            for parameter in self.table
            if parameter.trained == trained
        }

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

    def find_changed_buffers(self) -> bool:
        """Compare the buffers with those before the first step.

        Returns
        -------
        bool
            Whether `changing_buffers` has grown.
        """
        changed = {
            name
            for name, buffer in self._model.named_buffers()
            if name not in self._buffers or not _same_bits(buffer, self._buffers[name])
        }
        grown = bool(changed - self.changing_buffers)
        self.changing_buffers |= changed
        return grown

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


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    # NaN is no change: fairseq keeps a buffer of memory that it never fills.
    bits = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*bits)


def _entries(gradient: torch.Tensor) -> torch.Tensor:
    # torch takes no norm of a sparse gradient (nn.Embedding(sparse=True)).
    return gradient.coalesce().values() if gradient.is_sparse else gradient
