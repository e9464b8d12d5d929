"""How the tensors of one θ lie in flat memory: one vector for each dtype, tensor after tensor.

A step is copied, coded and decoded in these vectors; names and shapes come back from the layout.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from recorder.codec import bit_dtype

if TYPE_CHECKING:
    import numpy.typing as npt

PARAMETERS = "parameters"
BUFFERS = "buffers"


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """The place of one tensor.

    Parameters
    ----------
    kind
        `PARAMETERS` or `BUFFERS`.
    name
        Its name in the model.
    dtype, shape
        As torch prints them, the dtype without the prefix ``torch.``.
    """

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @classmethod
    def of(cls, kind: str, name: str, tensor: torch.Tensor) -> Slot:
        """Describe a tensor.

        Parameters
        ----------
        kind, name
            As for the class.
        tensor
            The tensor.

        Returns
        -------
        Slot
            Its place.
        """
        return cls(kind, name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


@dataclasses.dataclass(frozen=True)
class Layout:
    """The places of all tensors of a θ.

    Parameters
    ----------
    slots
        In order; those of one dtype follow each other in that dtype's vector.
    """

    slots: tuple[Slot, ...]

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Dtype to number of entries of its vector."""
        sizes: dict[str, int] = {}
        for slot in self.slots:
            sizes[slot.dtype] = sizes.get(slot.dtype, 0) + slot.size
        return sizes

    @property
    def bytes(self) -> int:
        """Bytes of one θ."""
        return sum(size * bit_dtype(dtype).itemsize for dtype, size in self.sizes.items())

    def allocate(self, *, pinned: bool = False) -> dict[str, torch.Tensor]:
        """Make empty vectors in host memory.

        Parameters
        ----------
        pinned
            Whether a GPU is to copy into them.

        Returns
        -------
        dict of str to torch.Tensor
            Dtype to vector.
        """
        return {
            dtype: torch.empty(size, dtype=getattr(torch, dtype), pin_memory=pinned)
            for dtype, size in self.sizes.items()
        }

    def views(self, vectors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        """Cut the vectors into tensors of the recorded shapes, which share their memory.

        Parameters
        ----------
        vectors
            Dtype to vector.

        Returns
        -------
        list of torch.Tensor
            One for each slot.
        """
        used = dict.fromkeys(self.sizes, 0)
        views = []
        for slot in self.slots:
            start = used[slot.dtype]
            used[slot.dtype] = start + slot.size
            views.append(vectors[slot.dtype][start : start + slot.size].view(slot.shape))
        return views

    def to_list(self) -> list[list[Any]]:
        """Return the layout as plain JSON types.

        Returns
        -------
        list
            Kind, name, dtype and shape of every slot.
        """
        return [[slot.kind, slot.name, slot.dtype, list(slot.shape)] for slot in self.slots]

    @classmethod
    def from_list(cls, rows: Iterable[Iterable[Any]]) -> Layout:
        """Build a layout from what `to_list` gave.

        Parameters
        ----------
        rows
            Kind, name, dtype and shape of every slot.

        Returns
        -------
        Layout
            The layout.
        """
        return cls(tuple(Slot(kind, name, dtype, tuple(shape)) for kind, name, dtype, shape in rows))


def bits(vector: torch.Tensor) -> npt.NDArray[Any]:
    """Look at a vector in host memory as bit patterns.

    Parameters
    ----------
    vector
        1-d, contiguous.

    Returns
    -------
    numpy.ndarray
        Unsigned integers of the same width; shares the memory.
    """
    width = bit_dtype(str(vector.dtype).removeprefix("torch."))
    flat: npt.NDArray[Any] = vector.view(torch.uint8).numpy().view(width)
    return flat
