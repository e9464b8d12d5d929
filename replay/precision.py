"""In which numbers the loss and its gradient are computed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from recorder.errors import UsageError

SIXTEEN_BIT = frozenset({torch.float16, torch.bfloat16})


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """How far rounding alone may move the residual of a step, relative to its loss.

    Parameters
    ----------
    of_loss
        What does not average out over predictions: the loss's own rounding, and that of parameters that all
        predictions see alike.
    of_prediction
        What rounding does to the loss of a single prediction: over n independent ones 1/√n of it is left.
    """

    of_loss: float = 0.0
    of_prediction: float = 0.0

    def over(self, predictions: float) -> float:
        """Return the share of the loss that is rounding.

        Parameters
        ----------
        predictions
            What the loss is averaged over.

        Returns
        -------
        float
            Relative to the loss.
        """
        return math.hypot(self.of_loss, self.of_prediction / math.sqrt(max(predictions, 1.0)))


EXACT = Rounding()
"""None at all."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """What parameters, buffers and batches are converted to, and how the forward passes run.

    Parameters
    ----------
    name
        As on the command line.
    dtype
        Of every floating-point tensor that goes into the model.
    autocast
        Where set, forward passes run under torch's autocast to this dtype, as in mixed-precision training; the
        parameters stay in `dtype`, or the small step between them would be lost.
    """

    name: str
    dtype: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def epsilon(self) -> float:
        """Spacing, at 1, of the coarsest numbers that the loss is computed in."""
        return torch.finfo(self.autocast or self.dtype).eps

    @property
    def rounding(self) -> Rounding:
        """What ``python -m benchmarks.rounding`` finds in the steps of a small Transformer, with a margin.

        In float32 and float64 a residual is off by 2.0 ε of the loss at most, whatever the number of predictions: the
        margin is 2. Under autocast to bfloat16 it is off by 0.09 ε over 31 predictions, 0.05 ε over 124, 0.04 ε over
        496 and 0.03 ε over 1,984 and over 7,936: the margin is 4 to 5. A width of 8 with logits of size 8 takes up
        most of it: 0.26 ε over 24 predictions, 0.15 ε over 96, 0.11 ε over 1,536. All of these sum their losses in
        float32; in 16 bit the sum alone would be off by ε/2, more than any step should be excused.
        """
        if self.autocast is None:
            return Rounding(of_loss=4 * self.epsilon)
        return Rounding(of_loss=self.epsilon / 8, of_prediction=2 * self.epsilon)

    def converted(self, values: Any) -> Any:
        """Convert floating-point tensors to `dtype`; all else stays as it is.

        Parameters
        ----------
        values
            Tensors in any nest of dicts, lists and tuples: parameters by name, or a micro-batch.

        Returns
        -------
        Any
            The same nest.
        """
        if isinstance(values, torch.Tensor):
            return values.to(self.dtype) if values.is_floating_point() else values
        if isinstance(values, Mapping):
            return {key: self.converted(entry) for key, entry in values.items()}
        if isinstance(values, list | tuple):
            return type(values)(self.converted(entry) for entry in values)
        return values

    def forward(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context in which forward passes run.

        Parameters
        ----------
        device
            Where they run.

        Returns
        -------
        context manager
            Nothing, autocast, or for float64 one that keeps models from going back to float32 on the way.
        """
        if self.autocast is not None:
            return torch.autocast(device.type, self.autocast)
        return _NoWayBack() if self.dtype is torch.float64 else nullcontext()


class _NoWayBack(TorchFunctionMode):
    """Models written for mixed precision take their softmax in float32; from float64 that would be a loss."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype is torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func in _IN_FLOAT32 and kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


_IN_FLOAT32 = frozenset(
    {functional.softmax, functional.log_softmax, torch.softmax, torch.log_softmax, torch.Tensor.softmax}
    | {torch.Tensor.log_softmax, torch.Tensor.sum, torch.Tensor.mean, torch.sum, torch.mean}
)

PRECISIONS = {
    precision.name: precision
    for precision in (
        Precision(name="float32", dtype=torch.float32),
        Precision(name="float64", dtype=torch.float64),
        Precision(name="bfloat16", dtype=torch.float32, autocast=torch.bfloat16),
    )
}


def precision_named(name: str) -> Precision:
    """Find a precision by its name.

    Parameters
    ----------
    name
        One of `PRECISIONS`.

    Returns
    -------
    Precision
        The precision.

    Raises
    ------
    UsageError
        If there is none of that name.
    """
    if name not in PRECISIONS:
        message = f"unknown dtype {name!r}; it is one of {', '.join(PRECISIONS)}"
        raise UsageError(message)
    return PRECISIONS[name]


def fitting(dtypes: Sequence[str]) -> Precision:
    """Choose the precision for parameters of given dtypes, where the user asks for none.

    Parameters
    ----------
    dtypes
        As in the parameter table.

    Returns
    -------
    Precision
        float32, whatever training computed in; float64 where that is what it recorded.
    """
    return PRECISIONS["float64" if "float64" in dtypes else "float32"]
