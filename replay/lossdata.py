"""Loss data: on which examples the loss is measured.

``batch`` is each update's own recorded batch. ``probe:N`` and ``valid:N`` are N examples drawn once, with a seed that
is kept in the shards, from the training or the validation data, and stay the same for every step.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch

from recorder import tensorfile
from recorder.batches import take_apart, to_device
from recorder.errors import MismatchError, UsageError
from recorder.steps import MicroBatch, Step
from recorder.workload import Workload

DEFAULT = ("batch", "probe:512")
DRAW_SEED = 0

_SPLITS = {"probe": "train", "valid": "valid"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A loss data as the user asked for it.

    Parameters
    ----------
    name
        ``batch``, ``probe`` or ``valid``.
    examples
        How many to draw; None for ``batch``.
    """

    name: str
    examples: int | None


def parse(text: str) -> Request:
    """Parse the value of ``--loss-data``.

    Parameters
    ----------
    text
        ``batch``, ``probe:N`` or ``valid:N``.

    Returns
    -------
    Request
        What was asked for.

    Raises
    ------
    UsageError
        If it is none of them.

    Examples
    --------
    >>> parse("probe:512")
    Request(name='probe', examples=512)
    """
    name, _, number = text.partition(":")
    if text == "batch":
        return Request(name="batch", examples=None)
    if name in _SPLITS and number.isascii() and number.isdigit() and int(number) > 0:
        return Request(name=name, examples=int(number))
    message = f"unknown loss data {text!r}; expected batch, probe:N or valid:N, with N the number of examples"
    raise UsageError(message)


class LossData(Protocol):
    """The examples of a step."""

    name: str
    fixed: bool
    settings: dict[str, Any]

    def micro_batches(self, step: Step) -> Sequence[Any]:
        """Return the micro-batches to measure the loss of a step on, on the device."""
        ...


class RecordedBatch:
    """The update's own batch, from its recorded tensors or collated again from its indices.

    Parameters
    ----------
    workload
        Collates where tensors were not recorded.
    device
        Where the micro-batches go.
    """

    name = "batch"
    fixed = False

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self._workload = workload
        self._device = device
        self.settings: dict[str, Any] = {}

    def micro_batches(self, step: Step) -> Sequence[Any]:
        """Return the micro-batches of the recorded update.

        Parameters
        ----------
        step
            The recorded step.

        Returns
        -------
        list
            One batch for each micro-batch.
        """
        return [
            to_device(recorded_or_collated(self._workload, step, micro_batch), self._device)
            for micro_batch in step.micro_batches
        ]


class FixedDraw:
    """Examples drawn once from a split.

    Parameters
    ----------
    request
        Name and number.
    workload
        Lists and collates the examples.
    micro_batch
        Examples to a micro-batch.
    device
        Where the micro-batches go.

    Raises
    ------
    UsageError
        If the split has fewer examples.
    """

    fixed = True

    def __init__(self, request: Request, workload: Workload, micro_batch: int, device: torch.device) -> None:
        assert request.examples is not None
        self.name = request.name
        split = _SPLITS[request.name]
        available = workload.indices(split)
        if len(available) < request.examples:
            message = (
                f"--loss-data {request.name}:{request.examples}: the split {split!r} has {len(available)} examples; "
                f"ask for at most {len(available)}"
            )
            raise UsageError(message)
        drawn = np.random.default_rng(DRAW_SEED).choice(len(available), size=request.examples, replace=False)
        # The order of the workload is kept: it may put examples of similar length side by side.
        indices = [available[position] for position in sorted(drawn)]
        collated = [
            workload.batch(indices[first : first + micro_batch], split=split, epoch=1)
            for first in range(0, len(indices), micro_batch)
        ]
        self._batches = [to_device(batch, device) for batch in collated]
        self.settings = {
            "split": split,
            "examples": request.examples,
            "seed": DRAW_SEED,
            "micro_batch": micro_batch,
            "crc32": _checksum_of_batches(collated),
        }

    def micro_batches(self, step: Step) -> Sequence[Any]:
        """Return the drawn examples, the same for every step.

        Parameters
        ----------
        step
            Not looked at.

        Returns
        -------
        list
            The micro-batches.
        """
        return self._batches


def build(request: Request, workload: Workload, first_step: Step, device: torch.device) -> LossData:
    """Build a loss data.

    Parameters
    ----------
    request
        What the user asked for.
    workload
        Lists and collates examples.
    first_step
        The run's first step: drawn examples are cut into micro-batches of the size training used there.
    device
        Where the micro-batches go.

    Returns
    -------
    LossData
        The loss data.
    """
    if request.name == "batch":
        return RecordedBatch(workload, device)
    sizes = [len(micro_batch.indices) for micro_batch in first_step.micro_batches]
    return FixedDraw(request, workload, max(1, max(sizes)), device)


def recorded_or_collated(workload: Workload, step: Step, micro_batch: MicroBatch) -> Any:
    """Return a recorded micro-batch, collated again from its indices if its tensors were not stored.

    Parameters
    ----------
    workload
        Collates.
    step
        The step the micro-batch belongs to.
    micro_batch
        What is recorded of it.

    Returns
    -------
    Any
        The batch in host memory.
    """
    if micro_batch.stored:
        return micro_batch.batch()
    batch = workload.batch(micro_batch.indices.tolist(), split="train", epoch=step.epoch)
    if micro_batch.checksums:
        verify_collation(batch, step, micro_batch)
    return batch


def verify_collation(batch: Any, step: Step, micro_batch: MicroBatch) -> None:
    """Compare a batch collated again with the checksums of the recorded one.

    Parameters
    ----------
    batch
        What the workload collated.
    step, micro_batch
        The record.

    Raises
    ------
    MismatchError
        If any tensor differs.
    """
    _, tensors = take_apart(batch)
    found = {path: tensorfile.checksum(tensor) for path, tensor in tensors.items()}
    different = sorted(
        path for path in set(found) | set(micro_batch.checksums) if found.get(path) != micro_batch.checksums.get(path)
    )
    if different:
        message = (
            f"step {step.step}: the batch collated again from its {len(micro_batch.indices)} recorded indices is not "
            f"the recorded one: {len(different)} of {len(micro_batch.checksums)} tensors differ, first "
            f"{different[0]!r}. "
            "Either the data has changed, or it is other data, or its rows are collated in another order"
        )
        raise MismatchError(message)


def _checksum_of_batches(batches: Sequence[Any]) -> int:
    checksum = 0
    for batch in batches:
        _, tensors = take_apart(batch)
        for tensor in tensors.values():
            checksum = zlib.crc32(tensorfile.content(tensor), checksum)
    return checksum
