"""Data set indices that travel with a batch through the loader of a ``transformers.Trainer``.

The Trainer drops every column that the model does not take, and accelerate may put another batch sampler around the
first, skip batches or hand some out twice. So the index is put beside the example where the loader fetches it, goes
around the collator, and is taken off again where the Trainer takes the batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils.pin_memory import pin_memory

from accelerate.data_loader import DataLoaderShard  # isort: skip
from accelerate.utils import send_to_device  # isort: skip


class Fetched:
    """What a loader fetched for a batch, with the indices that it asked for.

    Parameters
    ----------
    indices
        Data set indices.
    examples
        What the data set gave for them.
    """

    def __init__(self, indices: list[int], examples: Any) -> None:
        self.indices = indices
        self.examples = examples


class Carried:
    """A collated batch on its way to the Trainer, with the indices of its examples.

    Parameters
    ----------
    indices
        Data set indices, one for each example.
    batch
        What the collator made.
    """

    def __init__(self, indices: list[int], batch: Any) -> None:
        self.indices = indices
        self.batch = batch

    def to(self, device: Any, **arguments: Any) -> Carried:
        """Move the batch, as accelerate asks of whatever can be moved.

        Parameters
        ----------
        device
            Where to.
        **arguments
            ``non_blocking``.

        Returns
        -------
        Carried
            The batch as accelerate moves one, with the same indices.
        """
        return Carried(self.indices, send_to_device(self.batch, device, **arguments))

    def pin_memory(self) -> Carried:
        """Pin the batch's memory, as a loader asks of whatever can do so.

        Returns
        -------
        Carried
            The batch as torch pins one, with the same indices.
        """
        return Carried(self.indices, pin_memory(self.batch))  # type: ignore[no-untyped-call]


class IndexedDataset:
    """A data set that gives its examples together with their indices; all else is the wrapped one's.

    Parameters
    ----------
    dataset
        With ``__getitem__``, and perhaps ``__getitems__``.
    """

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitem__(self, index: Any) -> Fetched:
        # A sampler of batches in the place of a sampler asks for a list of indices at once.
        return Fetched(list(index) if isinstance(index, list | tuple) else [index], self._dataset[index])

    def __getitems__(self, indices: list[int]) -> Fetched:
        fetch = getattr(self._dataset, "__getitems__", None)
        examples = fetch(indices) if fetch else [self._dataset[index] for index in indices]
        return Fetched(list(indices), examples)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "_dataset":  # not yet there while a worker's copy is made
            raise AttributeError(name)
        return getattr(self._dataset, name)


class CarryingCollator:
    """A collator that lets the indices pass by the wrapped one.

    Parameters
    ----------
    collate
        The training's own collator.
    """

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self._collate = collate

    def __call__(self, fetched: Fetched) -> Carried:
        """Collate what the loader fetched.

        Parameters
        ----------
        fetched
            From an `IndexedDataset`.

        Returns
        -------
        Carried
            The batch and its indices.
        """
        return Carried(fetched.indices, self._collate(fetched.examples))


def carries(loader: Any) -> bool:
    """Say whether indices can travel with the batches of a loader.

    Parameters
    ----------
    loader
        What the Trainer iterates over.

    Returns
    -------
    bool
        True for a plain loader and for accelerate's loader of one process's own batches, over data with indices. A
        loader of another kind may look into the batches on their way.
    """
    plain = isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__
    return (plain or isinstance(loader, DataLoaderShard)) and not isinstance(loader.dataset, IterableDataset)


@contextmanager
def carrying(loader: Any) -> Iterator[None]:
    """Let indices travel with the batches of a loader, and of those that accelerate makes of it to skip batches.

    Parameters
    ----------
    loader
        One that `carries`. No other may iterate over it meanwhile than one that takes indices off again.

    Yields
    ------
    None
        While it does.
    """
    base = loader.base_dataloader if isinstance(loader, DataLoaderShard) else loader
    dataset, collate = base.dataset, base.collate_fn
    # torch forbids to assign another data set, for a sampler could be at odds with it; this one has the same examples.
    vars(base)["dataset"] = IndexedDataset(dataset)
    base.collate_fn = CarryingCollator(collate)
    try:
        yield
    finally:
        vars(base)["dataset"] = dataset
        base.collate_fn = collate


class Taken:
    """Takes the indices off the batches that a Trainer takes from its loader, and finds them again at its step.

    With workers, accumulation and prefetching many batches are under way; they are told apart by identity.
    """

    def __init__(self) -> None:
        self._under_way: deque[tuple[list[int], Any]] = deque()

    def off(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Iterate over a loader's batches as they are without indices.

        Parameters
        ----------
        batches
            From the loader.

        Returns
        -------
        Iterator
            The same batches; it takes none before it is asked for one.
        """
        return map(self.off_one, batches)

    def off_one(self, batch: Any) -> Any:
        """Take the indices off a batch.

        Parameters
        ----------
        batch
            With or without them.

        Returns
        -------
        Any
            The batch as the collator made it.
        """
        if not isinstance(batch, Carried):
            return batch
        self._under_way.append((batch.indices, batch.batch))
        return batch.batch

    def indices_of(self, batch: Any) -> list[int] | None:
        """Find the indices of a batch that is trained on now; those taken before it are forgotten.

        Parameters
        ----------
        batch
            The very object that was taken from the loader.

        Returns
        -------
        list of int or None
            Its indices; None if it came without.
        """
        if not any(known is batch for _, known in self._under_way):
            return None
        while True:
            indices, known = self._under_way.popleft()
            if known is batch:
                return indices

    def forget(self) -> None:
        """Forget the batches that an epoch left over."""
        self._under_way.clear()
