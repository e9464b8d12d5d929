"""Micro-batches that do not fit into memory, cut in two by their examples until they do.

The loss is a sum over predictions and so is its gradient: that of a micro-batch is that of its parts, within rounding.
Nothing here knows what a batch holds, so whether its parts add up is tried, on the first one that is cut.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

from recorder.errors import LossledgerError, MismatchError
from recorder.workload import HalvesBatches

Result = TypeVar("Result")
Measure = Callable[[Any], tuple[float, float]]

_WAY_OUT = (
    "give the workload a method `halve(batch)` that returns two batches of half the examples each, or replay on other "
    "--loss-data, or train with smaller micro-batches"
)
# What torch says in a plain RuntimeError where the host's memory is full.
_ALLOCATOR = "DefaultCPUAllocator"


class DoesNotFitError(LossledgerError):
    """A micro-batch is larger than memory and cannot be cut: of one step perhaps, while all others fit."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory is full.

    Parameters
    ----------
    error
        Raised by a forward or backward pass.

    Returns
    -------
    bool
        For the memory of a GPU or of the host.
    """
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _ALLOCATOR in str(error)
    )


def halve(batch: Any) -> tuple[Any, Any]:
    """Cut a batch in two along the first axis of all its tensors.

    Parameters
    ----------
    batch
        Any nest of dicts, lists and tuples. Tensors without axes, numbers and texts stand in both halves as they are.

    Returns
    -------
    tuple
        The two halves; the first has the odd example.

    Raises
    ------
    DoesNotFitError
        If its tensors have no common number of examples, or there is but one.
    """
    sizes = {path: len(tensor) for path, tensor in _tensors(batch, "batch") if tensor.dim()}
    if len(set(sizes.values())) != 1:
        found = ", ".join(f"{path} has {size}" for path, size in sizes.items()) or "it has no tensors"
        message = (
            "a micro-batch does not fit into memory, and cannot be cut in two: expected tensors that all have its "
            f"examples along their first axis, but {found}; {_WAY_OUT}"
        )
        raise DoesNotFitError(message)
    examples = next(iter(sizes.values()))
    if examples < 2:
        message = (
            "a single example does not fit into memory; use a device with more of it, fewer --workers, or --dtype "
            "bfloat16"
        )
        raise DoesNotFitError(message)
    middle = (examples + 1) // 2
    return _cut(batch, slice(0, middle)), _cut(batch, slice(middle, examples))


def _tensors(value: Any, path: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _tensors(entry, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for position, entry in enumerate(value):
            yield from _tensors(entry, f"{path}.{position}")


def _cut(value: Any, part: slice) -> Any:
    if isinstance(value, torch.Tensor):
        return value[part] if value.dim() else value
    if isinstance(value, Mapping):
        return {key: _cut(entry, part) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cut(entry, part) for entry in value)
    return value


class Pieces:
    """The pieces in which the micro-batches of one evaluation after the other fit into memory.

    Parameters
    ----------
    workload
        May know how to cut its batches.
    measure
        Loss and number of predictions of a batch, without gradient.
    epsilon
        Spacing of the numbers that the loss is computed in, at 1.
    """

    def __init__(self, workload: object, measure: Measure, epsilon: float) -> None:
        self._halve = workload.halve if isinstance(workload, HalvesBatches) else halve
        self._measure = measure
        self._slack = math.sqrt(epsilon)
        self._checked = False
        self._of: Sequence[Any] | None = None
        self._pieces: list[list[Any]] = []
        self._at = (0, 0)

    @property
    def most(self) -> int:
        """Number of pieces of the micro-batch that is cut most, of those asked for last; 1 where all fit."""
        return max(map(len, self._pieces), default=1)

    def each(self, position: int) -> Iterator[Any]:
        """Yield the pieces of a micro-batch, inside of `fit`.

        Parameters
        ----------
        position
            Number of the micro-batch.

        Yields
        ------
        Any
            The micro-batch itself, as long as it fits.
        """
        for number, piece in enumerate(self._pieces[position]):
            self._at = (position, number)
            yield piece

    def fit(self, micro_batches: Sequence[Any], work: Callable[[], Result], *, whole: bool = False) -> Result:
        """Do work on micro-batches, cutting what does not fit and starting again.

        Parameters
        ----------
        micro_batches
            As asked for. How they fit is known for as long as the same object is asked for, and not longer: what was
            computed before must not decide the bits of a step.
        work
            Goes through `each` of them.

        whole
            Refuse to cut: the dropout that training drew for a batch is not that of its parts.

        Returns
        -------
        Result
            Of the work.

        Raises
        ------
        DoesNotFitError
            If something does not fit and must not be cut.
        """
        if micro_batches is not self._of:
            self._of, self._pieces = micro_batches, [[micro_batch] for micro_batch in micro_batches]
        while True:
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if whole:
                    message = (
                        "a micro-batch does not fit into memory, and with --dropout recorded it cannot be cut in two; "
                        "use a device with more of it, fewer --workers, or --dropout off"
                    )
                    raise DoesNotFitError(message) from error
            # Only out here has the error let go of what the failed pass had in memory.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            position, number = self._at
            halves = self._halve(self._pieces[position][number])
            self._pieces[position][number : number + 1] = halves
            self._check(halves[0])

    def _check(self, piece: Any) -> None:
        # A batch may hold what is no sum over its examples, such as the number of its tokens; a piece small enough to
        # be measured whole and in halves tells.
        while not self._checked:
            try:
                halves = self._halve(piece)
            except DoesNotFitError:
                return
            try:
                whole, parts = self._measure(piece), [self._measure(half) for half in halves]
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                piece = halves[0]
                continue
            loss, predictions = (sum(values) for values in zip(*parts, strict=True))
            if predictions != whole[1] or not math.isclose(loss, whole[0], rel_tol=self._slack):
                message = (
                    "a micro-batch does not fit into memory, and its halves do not add up to it: expected a loss of "
                    f"{whole[0]:.6g} nat over {whole[1]:g} predictions, found {loss:.6g} over {predictions:g}; "
                    f"{_WAY_OUT}"
                )
                raise MismatchError(message)
            self._checked = True
