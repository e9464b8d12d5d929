"""Dataset indices of the batches that a data loader gives: found in the batch, or taken from its batch sampler.

With workers, a loader asks its sampler for batches long before the loop trains on them. Hence indices from a sampler
are matched first in, first out, when a batch is consumed, and never when the sampler hands it out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.utils.data import DataLoader, IterableDataset

from recorder.errors import UsageError

if TYPE_CHECKING:
    from recorder.recording import Recording

Batch = TypeVar("Batch")
Indices = str | int | Callable[[Any], Iterable[int]]

_REMEDY = "or let each batch carry the indices of its examples, and pass indices=KEY instead of a sampler"


class RecordedBatchSampler:
    """A batch sampler that remembers which indices it has handed out, for `announced`.

    Give it to the loader as its ``batch_sampler``, and to `announced` as ``sampler``. Every iteration over it has its
    own queue, so what was prefetched in an epoch that ended early is forgotten with it. All other attributes are
    those of the wrapped sampler, ``set_epoch`` for one.

    Parameters
    ----------
    batch_sampler
        Gives a list of dataset indices for each batch. The wrapper has a length if this one has.
    """

    def __init__(self, batch_sampler: Iterable[Sequence[int]]) -> None:
        self._batch_sampler = batch_sampler
        self._handed_out: deque[Sequence[int]] = deque()

    def __iter__(self) -> Iterator[Any]:
        self._handed_out = deque()
        return _remembering(iter(self._batch_sampler), self._handed_out)

    def take(self, *, after: int = 0) -> Iterator[int]:
        """Give the indices of the next batch of the iteration begun last, to a trainer that fetches the batches itself.

        Parameters
        ----------
        after
            How many batches to pass over before it, which the trainer has fetched and not trained on.

        Returns
        -------
        Iterator of int
            The dataset index of each example. A `UsageError` tells, once they are asked for, if no batch is left.
        """
        taken: Sequence[int] | None = None
        for _ in range(after + 1):
            taken = self._handed_out.popleft() if self._handed_out else None
        return _handed_out(taken)

    def __len__(self) -> int:
        return len(self._batch_sampler)  # type: ignore[arg-type]  # Python's own TypeError where it has no length

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # not yet there while a copy is made
            raise AttributeError(name)
        return getattr(self._batch_sampler, name)


def announced(
    recording: Recording,
    loader: Iterable[Batch],
    *,
    indices: Indices | None = None,
    sampler: RecordedBatchSampler | None = None,
) -> Iterator[Batch]:
    """Iterate over a loader once, and announce each batch to the recording right before the loop gets it.

    It must be what the training loop itself iterates over: whatever fetches batches ahead of the training belongs
    inside, as `loader`. A loop that takes a batch and then does not train on it calls `Recording.forget_pending`.

    Parameters
    ----------
    recording
        The run in the making.
    loader
        Gives the batches.
    indices
        Where a batch holds the dataset indices of its examples: a key into a dict, a position in a tuple or list, or a
        function of the batch.
    sampler
        The loader's batch sampler, where the batches do not hold them. With neither, batches are announced without
        indices, as for iterable data that has none.

    Returns
    -------
    Iterator
        The batches of the loader, as they are. What is wrong with the indices of a batch is a `UsageError` of the
        recording: it raises it if strict; else it warns, and the training goes on unrecorded.

    Raises
    ------
    UsageError
        If both `indices` and `sampler` are given, or the loader's batches cannot be matched with the sampler's.

    Examples
    --------
    Where every example carries its index::

        for batch in announced(rec, loader, indices="id"):
            loss(model(batch)).backward()

    Where none does::

        sampler = RecordedBatchSampler(BatchSampler(RandomSampler(data), batch_size=32, drop_last=False))
        loader = DataLoader(data, batch_sampler=sampler, num_workers=4)
        for batch in announced(rec, loader, sampler=sampler):
            loss(model(batch)).backward()
    """
    if indices is not None and sampler is not None:
        message = "the indices come from the batch or from the sampler: pass indices= or sampler=, not both"
        raise UsageError(message)
    if sampler is not None:
        return _announced_by_sampler(recording, matchable(loader, sampler), sampler)
    return _announced_by_batch(recording, loader, indices)


def _remembering(source: Iterator[Sequence[int]], handed_out: deque[Sequence[int]]) -> Iterator[Sequence[int]]:
    for indices in source:
        handed_out.append(list(indices))
        yield indices


def _announced_by_batch(recording: Recording, loader: Iterable[Batch], indices: Indices | None) -> Iterator[Batch]:
    for batch in loader:
        recording.batch(None if indices is None else found_in(batch, indices), batch)
        yield batch


def _announced_by_sampler(
    recording: Recording, loader: DataLoader[Batch], sampler: RecordedBatchSampler
) -> Iterator[Batch]:
    iterator = iter(loader)
    handed_out = sampler._handed_out
    # Persistent workers serve one iterator, which each iter() sets back to the start: an older one would go on with
    # batches of the newer. Without them, every iterator has its own batches.
    shared = loader.num_workers > 0 and loader.persistent_workers
    for batch in iterator:
        overtaken = shared and handed_out is not sampler._handed_out
        recording.batch(_taken_by(None if overtaken else handed_out.popleft()), batch)
        yield batch


# The four below are generators, so that the recording runs them: an error in them is then one of the recording, which
# does no harm to the training unless it is strict.


def found_in(batch: Any, indices: Indices) -> Iterator[int]:
    """Find the dataset indices of a batch's examples in the batch.

    Parameters
    ----------
    batch
        The batch.
    indices
        Where, as for `announced`.

    Yields
    ------
    int
        The index of each example. A `UsageError` tells what is there instead.
    """
    if callable(indices):
        where, found = "the function given as indices", indices(batch)
    else:
        where, found = f"the batch at {indices!r}", _entry(batch, indices)
    yield from _integers(found, where)


def _taken_by(indices: Sequence[int] | None) -> Iterator[int]:
    if indices is None:
        message = (
            "a loader with persistent workers was started again while an earlier iteration over it was still in use: "
            "its batches now belong to the new one; end the earlier loop first, or set persistent_workers=False"
        )
        raise UsageError(message)
    yield from _integers(indices, "the batch sampler")


def _handed_out(taken: Sequence[int] | None) -> Iterator[int]:
    if taken is None:
        message = (
            "more batches came than the batch sampler has handed out, so they were made otherwise: let each batch "
            "carry the indices of its examples, and pass indices=KEY"
        )
        raise UsageError(message)
    yield from _integers(taken, "the batch sampler")


def _integers(found: Any, where: str) -> Iterator[int]:
    try:
        values = found if isinstance(found, torch.Tensor) else torch.tensor(_plain(found))
    except (TypeError, ValueError, RuntimeError) as error:
        message = f"expected the dataset indices of the examples from {where}; found {_shortly(found)}"
        raise UsageError(message) from error
    if values.numel() and (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool):
        message = f"expected whole numbers from {where}, the dataset indices; found {values.dtype}: {_shortly(found)}"
        raise UsageError(message)
    yield from values.reshape(-1).tolist()


def _plain(found: Any) -> Any:
    return found if isinstance(found, int) or hasattr(found, "dtype") else list(found)


def _entry(batch: Any, key: str | int) -> Any:
    if isinstance(batch, Mapping):
        if key in batch:
            return batch[key]
        found = f"a {type(batch).__name__} with the keys {', '.join(map(repr, batch)) or 'none'}"
    elif isinstance(batch, list | tuple):
        if isinstance(key, int) and -len(batch) <= key < len(batch):
            return batch[key]
        found = f"a {type(batch).__name__} with the positions 0 to {len(batch) - 1}"
    else:
        found = f"a {type(batch).__name__}, neither dict nor tuple nor list"
    message = f"expected the dataset indices in the batch at {key!r}; found {found}: pass its key, or a function"
    raise UsageError(message)


def _shortly(found: Any) -> str:
    text = " ".join(repr(found).split())
    return f"{text[:60]}..." if len(text) > 60 else text


def matchable(loader: Iterable[Batch], sampler: RecordedBatchSampler) -> DataLoader[Batch]:
    """Make sure that a loader's batches come in the order in which a sampler hands out their indices.

    Parameters
    ----------
    loader
        Gives the batches.
    sampler
        What it draws from.

    Returns
    -------
    torch.utils.data.DataLoader
        The loader.

    Raises
    ------
    UsageError
        If they do not, or it draws from another sampler.
    """
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, IterableDataset):
        message = "a loader over an IterableDataset draws from no sampler: leave out sampler="
        raise UsageError(message)
    # A subclass with its own way through the batches (accelerate, torchdata) may skip, split or share them out.
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        message = (
            f"expected a plain torch DataLoader, whose batches come as its sampler hands them out; found a "
            f"{type(loader).__name__}, which may skip or split them: pass the DataLoader itself, {_REMEDY}"
        )
        raise UsageError(message)
    if loader.batch_sampler is not sampler:
        message = (
            f"expected a loader that draws from the given sampler; its batch_sampler is a "
            f"{type(loader.batch_sampler).__name__}: make it with DataLoader(..., batch_sampler=SAMPLER) and the very "
            f"RecordedBatchSampler given here (a library that replaced it must do so before it is wrapped), {_REMEDY}"
        )
        raise UsageError(message)
    if not getattr(loader, "in_order", True):
        message = f"a loader with in_order=False mixes its batches: make it with in_order=True, {_REMEDY}"
        raise UsageError(message)
    return loader
