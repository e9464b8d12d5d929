"""The parameter sets on the line between the two ends of a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch


class Between(Mapping[str, torch.Tensor]):
    """A parameter set on the line between two, made where it is looked at.

    Parameters
    ----------
    start, end
        The two.
    node
        How far between them, from 0 to 1.
    """

    def __init__(self, start: Mapping[str, torch.Tensor], end: Mapping[str, torch.Tensor], node: float) -> None:
        self._start, self._end, self._node = start, end, node

    def __getitem__(self, name: str) -> torch.Tensor:
        # The update is exact in its own dtype where it is small, so that this is off by hardly more than the last
        # rounding, in a third of the memory that float64 would take.
        return torch.lerp(self._start[name], self._end[name], self._node)

    def __iter__(self) -> Iterator[str]:
        return iter(self._start)

    def __len__(self) -> int:
        return len(self._start)

    def shape(self, name: str) -> torch.Size:
        """Look up a shape without making the tensor.

        Parameters
        ----------
        name
            Of the tensor.

        Returns
        -------
        torch.Size
            Its shape.
        """
        return self._start[name].shape

    def write(self, name: str, out: torch.Tensor) -> None:
        """Make a tensor where it is wanted.

        Parameters
        ----------
        name
            Of the tensor.
        out
            Of its shape and dtype; overwritten.
        """
        torch.lerp(self._start[name], self._end[name], self._node, out=out)
