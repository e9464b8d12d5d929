"""Examples to measure the loss on, drawn or listed, and collated into micro-batches."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from recorder import tensorfile
from recorder.batches import take_apart, to_device
from recorder.steps import Step
from recorder.workload import Workload

DRAW_SEED = 0


class FixedExamples:
    """Examples that stay the same for every step, collated once.

    Parameters
    ----------
    name
        What it is called.
    indices
        Data set indices.
    origin
        What decides the examples, for the settings.
    collate
        Makes micro-batches of indices.
    sampled
        Whether they were drawn at random.
    """

    fixed = True

    def __init__(
        self, name: str, indices: Sequence[int], origin: Mapping[str, Any], collate: Collation, *, sampled: bool
    ) -> None:
        self.name = name
        self.sampled = sampled
        self.micro_batch: int | str = collate.micro_batch
        batches = collate.host(indices)
        self._batches = collate.on_device(batches)
        self.settings: dict[str, Any] = {
            **origin,
            "examples": len(indices),
            "micro_batch": collate.micro_batch,
            "crc32": _checksum_of_batches(batches),
        }

    def micro_batches(self, step: Step) -> Sequence[Any]:
        """Return the examples, the same for every step.

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


class FreshDraw:
    """Examples drawn anew for every step, each time without replacement.

    Parameters
    ----------
    name
        What it is called.
    available
        Data set indices to draw from.
    examples
        How many.
    split
        Where they are from.
    collate
        Makes micro-batches of indices.
    """

    fixed = False
    sampled = True

    def __init__(self, name: str, available: Sequence[int], examples: int, split: str, collate: Collation) -> None:
        self.name = name
        self._available, self._examples, self._collate = available, examples, collate
        self.micro_batch: int | str = collate.micro_batch
        self.settings: dict[str, Any] = {
            "split": split,
            "examples": examples,
            "available": len(available),
            "seed": DRAW_SEED,
            "micro_batch": collate.micro_batch,
            "crc32": _checksum_of_batches(collate.host(self._draw(0))),
        }

    def micro_batches(self, step: Step) -> Sequence[Any]:
        """Draw and collate the examples of a step.

        Parameters
        ----------
        step
            The number of updates before it decides the draw.

        Returns
        -------
        list
            The micro-batches.
        """
        return self._collate.on_device(self._collate.host(self._draw(step.first_update)))

    def _draw(self, step: int) -> list[int]:
        return draw(self._available, self._examples, (DRAW_SEED, step))


class Grouped:
    """All examples of a file in groups: its loss is the mean of the groups' by their predictions.

    Nothing is evaluated for it: its LCA is the groups', by weight.

    Parameters
    ----------
    name
        What it is called; its groups are ``name/group``.
    parts
        The groups.
    """

    fixed = True
    sampled = False

    def __init__(self, name: str, parts: Sequence[FixedExamples]) -> None:
        self.name = name
        self.parts = tuple(parts)
        self.micro_batch: int | str = self.parts[0].micro_batch
        self.settings: dict[str, Any] = {"groups": {part.name: part.settings for part in parts}}

    def micro_batches(self, step: Step) -> Sequence[Any]:
        """Return the examples of all groups, one group after the other.

        Parameters
        ----------
        step
            Not looked at.

        Returns
        -------
        list
            The micro-batches.
        """
        return [batch for part in self.parts for batch in part.micro_batches(step)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Collation:
    """How indices become micro-batches.

    Parameters
    ----------
    workload
        Collates.
    split
        Where the examples are from.
    micro_batch
        Examples to a micro-batch.
    device
        Where the micro-batches go.
    """

    workload: Workload
    split: str
    micro_batch: int
    device: torch.device

    def host(self, indices: Sequence[int]) -> list[Any]:
        """Collate examples.

        Parameters
        ----------
        indices
            Data set indices.

        Returns
        -------
        list
            Micro-batches in host memory.
        """
        return [
            self.workload.batch(indices[first : first + self.micro_batch], split=self.split, epoch=1)
            for first in range(0, len(indices), self.micro_batch)
        ]

    def on_device(self, batches: Sequence[Any]) -> list[Any]:
        """Move micro-batches to the device.

        Parameters
        ----------
        batches
            In host memory.

        Returns
        -------
        list
            On the device.
        """
        return [to_device(batch, self.device) for batch in batches]


def draw(available: Sequence[int], examples: int, seed: int | tuple[int, int]) -> list[int]:
    """Draw examples without replacement.

    Parameters
    ----------
    available
        Data set indices.
    examples
        How many.
    seed
        Of `numpy.random.default_rng`.

    Returns
    -------
    list of int
        In the order of `available`: a workload may put examples of similar length side by side.
    """
    drawn = np.random.default_rng(seed).choice(len(available), size=examples, replace=False)
    return [available[position] for position in sorted(drawn)]


def _checksum_of_batches(batches: Sequence[Any]) -> int:
    checksum = 0
    for batch in batches:
        _, tensors = take_apart(batch)
        for tensor in tensors.values():
            checksum = zlib.crc32(tensorfile.content(tensor), checksum)
    return checksum
