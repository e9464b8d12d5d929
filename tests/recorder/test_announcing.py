from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

import recorder
from recorder.announcing import RecordedBatchSampler, announced
from recorder.errors import UsageError
from recorder.recording import RecorderWarning, Recording
from recorder.runformat import Run

pytestmark = [
    # The workers are forked, as by default on Linux until Python 3.13, from a process in which torch has threads.
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes:UserWarning"),
    # The models have names that no naming rule knows.
    pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning"),
]

LENGTH = 23
BATCH = 4
WORKERS: list[dict[str, Any]] = [
    {"num_workers": 0},
    {"num_workers": 2, "prefetch_factor": 4, "multiprocessing_context": "fork"},
    {"num_workers": 2, "prefetch_factor": 4, "multiprocessing_context": "fork", "persistent_workers": True},
]
workers = pytest.mark.parametrize("options", WORKERS, ids=["no workers", "workers", "persistent workers"])


class Numbered(Dataset[dict[str, Any]]):
    """Each example tells its own index, so that the truth is in the batch."""

    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"id": index, "x": torch.full((3,), float(index))}


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.arange(LENGTH))


class Listener:
    """Stands for a strict recording: hears what is announced."""

    def __init__(self) -> None:
        self.heard: list[tuple[list[int] | None, Any]] = []

    def batch(self, indices: Iterable[int] | None, batch: Any = None) -> None:
        self.heard.append((None if indices is None else list(indices), batch))

    @property
    def indices(self) -> list[list[int] | None]:
        return [indices for indices, _ in self.heard]


class ShuffledBatches:
    """A batch sampler without length, whose order is that of its epoch."""

    def __init__(self) -> None:
        self.epoch = 0
        self.batch_size = BATCH

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        return (order[start : start + BATCH] for start in range(0, LENGTH, BATCH))


def shuffling(seed: int = 0) -> RecordedBatchSampler:
    order = RandomSampler(range(LENGTH), generator=torch.Generator().manual_seed(seed))
    return RecordedBatchSampler(BatchSampler(order, BATCH, drop_last=False))


def listen() -> tuple[Recording, Listener]:
    listener = Listener()
    return cast("Recording", listener), listener


# --- Indices from the sampler ---------------------------------------------------------------------------------------


@workers
def test_every_batch_is_announced_with_the_indices_it_was_made_of(options: dict[str, Any]) -> None:
    recording, listener = listen()
    sampler = shuffling()
    loader = DataLoader(Numbered(), batch_sampler=sampler, **options)
    for epoch in range(3):
        truth = []
        for batch in announced(recording, loader, sampler=sampler):
            truth.append(batch["id"].tolist())
            assert listener.heard[-1][1] is batch
        assert listener.indices[6 * epoch :] == truth
        assert [len(indices) for indices in truth] == [4, 4, 4, 4, 4, 3]
    assert len({tuple(indices or ()) for indices in listener.indices}) == 18  # each epoch has its own order


@workers
@pytest.mark.parametrize("taken", [1, 2])
def test_what_was_prefetched_in_an_epoch_left_early_is_forgotten(options: dict[str, Any], taken: int) -> None:
    recording, listener = listen()
    sampler = shuffling()
    loader = DataLoader(Numbered(), batch_sampler=sampler, **options)
    truth = []
    for stop_after in (taken, 6, taken, 6):
        for position, batch in enumerate(announced(recording, loader, sampler=sampler), start=1):
            truth.append(batch["id"].tolist())
            if position == stop_after:
                break
    assert listener.indices == truth
    assert len(truth) == 2 * (taken + 6)


def test_a_batch_is_announced_right_before_the_loop_gets_it_however_far_the_sampler_is_ahead() -> None:
    recording, listener = listen()
    sampler = shuffling()
    loader = DataLoader(Numbered(), batch_sampler=sampler, **WORKERS[1])
    batches = announced(recording, loader, sampler=sampler)
    assert listener.heard == []
    first = next(batches)
    assert listener.indices == [first["id"].tolist()]
    second = next(batches)
    assert listener.indices == [first["id"].tolist(), second["id"].tolist()]


def test_the_loader_gives_what_it_gives_without_the_recorder() -> None:
    def train_order(wrap: Callable[[BatchSampler], Any], announce: bool) -> list[list[int]]:
        torch.manual_seed(5)
        sampler = wrap(BatchSampler(RandomSampler(range(LENGTH)), BATCH, drop_last=True))
        loader = DataLoader(Numbered(), batch_sampler=sampler, **WORKERS[2])
        recording, _ = listen()
        return [
            batch["id"].tolist()
            for _ in range(2)
            for batch in (announced(recording, loader, sampler=sampler) if announce else loader)
        ]

    assert train_order(RecordedBatchSampler, announce=True) == train_order(lambda sampler: sampler, announce=False)


class Emptying(Numbered):
    """Uses up the list that it is asked for."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[indices.pop()] for _ in range(len(indices))]


def test_a_list_that_is_changed_later_is_remembered_as_it_was_handed_out() -> None:
    recording, listener = listen()
    sampler = RecordedBatchSampler(ShuffledBatches())
    loader = DataLoader(Emptying(), batch_sampler=sampler)
    truth = [batch["id"].tolist()[::-1] for batch in announced(recording, loader, sampler=sampler)]
    assert listener.indices == truth == list(ShuffledBatches())


def test_two_iterations_at_the_same_time_have_their_own_queues() -> None:
    recording, listener = listen()
    sampler = shuffling()
    loader = DataLoader(Numbered(), batch_sampler=sampler)
    one, other = (announced(recording, loader, sampler=sampler) for _ in range(2))
    truth = [next(batches)["id"].tolist() for batches in (one, other, one, one, other, one)]
    next(iter(loader))  # a look at the loader by somebody else
    truth += [next(batches)["id"].tolist() for batches in (other, one)]
    assert listener.indices == truth


def test_persistent_workers_that_were_started_again_meanwhile_are_an_error() -> None:
    recording, listener = listen()
    sampler = shuffling()
    loader = DataLoader(Numbered(), batch_sampler=sampler, **WORKERS[2])
    old = announced(recording, loader, sampler=sampler)
    next(old)
    new = announced(recording, loader, sampler=sampler)
    assert next(new)["id"].tolist() == listener.indices[-1]
    with pytest.raises(UsageError, match="persistent workers was started again while an earlier iteration"):
        next(old)


def test_a_generator_that_is_closed_early_or_never_started_does_no_harm() -> None:
    recording, listener = listen()
    sampler = shuffling()
    loader = DataLoader(Numbered(), batch_sampler=sampler, **WORKERS[1])
    announced(recording, loader, sampler=sampler)
    batches = cast("Any", announced(recording, loader, sampler=sampler))
    next(batches)
    batches.close()
    assert list(batches) == []
    assert len(listener.heard) == 1
    truth = [batch["id"].tolist() for batch in announced(recording, loader, sampler=sampler)]
    assert listener.indices[1:] == truth


def test_the_wrapped_sampler_is_seen_through_the_wrapper() -> None:
    wrapped = ShuffledBatches()
    sampler = RecordedBatchSampler(wrapped)
    sampler.set_epoch(3)
    assert wrapped.epoch == 3
    assert sampler.batch_size == BATCH
    assert not hasattr(sampler, "drop_last")
    assert copy.deepcopy(sampler).epoch == 3
    assert [list(indices) for indices in sampler] == [list(indices) for indices in wrapped]


def test_the_wrapper_has_a_length_if_the_wrapped_sampler_has_one() -> None:
    assert len(DataLoader(Numbered(), batch_sampler=shuffling())) == 6
    with pytest.raises(TypeError, match="'ShuffledBatches' has no len"):
        len(RecordedBatchSampler(ShuffledBatches()))


def test_a_sampler_whose_entries_are_no_integers_is_refused() -> None:
    sampler = RecordedBatchSampler([[0.5, 1.5]])  # type: ignore[list-item]
    recording, _ = listen()
    loader = DataLoader(Numbered(), batch_sampler=sampler)
    with pytest.raises(UsageError, match=r"expected whole numbers from the batch sampler.*\[0\.5, 1\.5\]"):
        next(announced(recording, loader, sampler=sampler))


# --- Loaders that cannot be matched with a sampler ------------------------------------------------------------------


class Sharing(DataLoader[Any]):
    """Gives every second batch, as libraries for several processes do."""

    def __iter__(self) -> Any:
        return (batch for position, batch in enumerate(super().__iter__()) if position % 2)


SAMPLER = shuffling()


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (DataLoader(Stream()), "over an IterableDataset draws from no sampler: leave out sampler="),
        ([{"id": [1]}], "expected a plain torch DataLoader.*found a list.*indices=KEY"),
        (Sharing(Numbered(), batch_sampler=SAMPLER), "found a Sharing, which may skip or split them: pass the DataLoa"),
        (DataLoader(Numbered(), batch_size=4), r"its batch_sampler is a BatchSampler: make it with DataLoader\("),
        (DataLoader(Numbered(), batch_sampler=shuffling()), "its batch_sampler is a RecordedBatchSampler.*the very"),
        (DataLoader(Numbered(), sampler=cast("Any", SAMPLER), batch_size=None), "its batch_sampler is a NoneType"),
        (
            DataLoader(Numbered(), batch_sampler=BatchSampler(cast("Any", SAMPLER), 2, drop_last=False)),
            "its batch_sampler is a BatchSampler",
        ),
        (
            DataLoader(Numbered(), batch_sampler=SAMPLER, num_workers=2, in_order=False),
            "in_order=False mixes its batches: make it with in_order=True",
        ),
    ],
)
def test_a_loader_whose_batches_are_not_those_of_the_sampler_is_refused_at_once(loader: Any, message: str) -> None:
    recording, _ = listen()
    with pytest.raises(UsageError, match=message):
        announced(recording, loader, sampler=SAMPLER)


def test_indices_and_sampler_together_are_refused_at_once() -> None:
    recording, _ = listen()
    with pytest.raises(UsageError, match="pass indices= or sampler=, not both"):
        announced(recording, [], indices="id", sampler=SAMPLER)


# --- Indices from the batch -----------------------------------------------------------------------------------------


@workers
def test_a_key_finds_the_indices_in_the_batches_of_any_loader(options: dict[str, Any]) -> None:
    recording, listener = listen()
    loader = DataLoader(Numbered(), batch_size=BATCH, shuffle=True, **options)
    truth = [batch["id"].tolist() for _ in range(2) for batch in announced(recording, loader, indices="id")]
    assert listener.indices == truth
    assert sorted(index for indices in truth[:6] for index in indices) == list(range(LENGTH))


@pytest.mark.parametrize(
    ("batch", "indices", "found"),
    [
        ({"id": torch.tensor([3, 1])}, "id", [3, 1]),
        (UserDict(id=[3, 1]), "id", [3, 1]),
        ({7: (3, 1)}, 7, [3, 1]),
        (("x", torch.tensor([[3], [1]], dtype=torch.int32)), 1, [3, 1]),
        (["x", np.array([3, 1], dtype=np.int16)], -1, [3, 1]),
        ([np.frombuffer(b"\3\1", dtype=np.uint8)], 0, [3, 1]),
        ([[torch.tensor(3), torch.tensor(1)]], 0, [3, 1]),
        ([[np.int64(3), np.int64(1)]], 0, [3, 1]),
        ([range(2)], 0, [0, 1]),
        ([5], 0, [5]),
        ([np.int64(5)], 0, [5]),
        ([torch.tensor([])], 0, []),
        ([[]], 0, []),
        (torch.tensor([[1, 8], [2, 9]]), lambda batch: batch[:, 0], [1, 2]),
        ("ab", lambda batch: (ord(letter) for letter in batch), [97, 98]),
        ({"meta": {"id": [2**40]}}, lambda batch: batch["meta"]["id"], [2**40]),
    ],
)
def test_indices_are_found_by_key_position_or_function(batch: Any, indices: Any, found: list[int]) -> None:
    recording, listener = listen()
    assert list(announced(recording, [batch], indices=indices)) == [batch] or isinstance(batch, torch.Tensor)
    assert listener.indices == [found]


@pytest.mark.parametrize(
    ("batch", "indices", "message"),
    [
        ({"idx": [1], "x": [2]}, "id", r"in the batch at 'id'; found a dict with the keys 'idx', 'x': pass its key"),
        ({}, 0, "at 0; found a dict with the keys none"),
        (([1], [2]), "id", "at 'id'; found a tuple with the positions 0 to 1"),
        ([[1], [2]], 2, "at 2; found a list with the positions 0 to 1"),
        (([1], [2]), -3, "at -3; found a tuple with the positions 0 to 1"),
        (torch.tensor([1]), 0, "at 0; found a Tensor, neither dict nor tuple nor list: pass its key, or a function"),
        ({"id": torch.tensor([1.0])}, "id", r"whole numbers from the batch at 'id'.*found torch.float32: tensor\("),
        ({"id": [1, 2.5]}, "id", r"whole numbers .*found torch.float32: \[1, 2.5\]"),
        ({"id": np.array([True])}, "id", "whole numbers .*found torch.bool"),
        ({"id": ["a", "b"]}, "id", r"indices of the examples from the batch at 'id'; found \['a', 'b'\]"),
        ({"id": [[1], [2, 3]]}, "id", r"found \[\[1\], \[2, 3\]\]"),
        ({"id": [2**63]}, "id", f"found .{2**63}"),
        ({"id": None}, "id", "found None"),
        ({"id": ["x" * 99]}, "id", "x{58}[.]{3}"),
        ([0], lambda batch: "no", "from the function given as indices; found 'no'"),
    ],
)
def test_what_holds_no_indices_is_said(batch: Any, indices: Any, message: str) -> None:
    recording, _ = listen()
    with pytest.raises(UsageError, match=message):
        next(announced(recording, [batch], indices=indices))


@workers
def test_iterable_data_is_announced_without_indices(options: dict[str, Any]) -> None:
    recording, listener = listen()
    given = list(announced(recording, DataLoader(Stream(), batch_size=BATCH, **options)))
    assert listener.indices == [None] * len(given)
    assert [batch for _, batch in listener.heard] == given


# --- With a real recording ------------------------------------------------------------------------------------------


def train(run: Path, batches: Callable[[Recording], Iterable[Any]], *, strict: bool) -> list[list[int]]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = SGD(model.parameters(), lr=1e-4)
    truth = []
    with recorder.watch(model, optimizer, run=run, strict=strict) as recording:
        for batch in batches(recording):
            model(batch["x"]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            truth.append(batch["id"].tolist())
    return truth


def test_the_run_holds_the_indices_that_every_step_was_made_with(tmp_path: Path) -> None:
    sampler = shuffling()
    loader = DataLoader(Numbered(), batch_sampler=sampler, **WORKERS[1])
    truth = train(tmp_path / "run", lambda rec: announced(rec, loader, sampler=sampler), strict=True)
    run = Run(tmp_path / "run")
    assert [[micro.indices.tolist() for micro in run.step(t).micro_batches] for t in run.steps] == [[i] for i in truth]


def test_wrong_indices_end_the_recording_and_not_the_training_unless_it_is_strict(tmp_path: Path) -> None:
    loader = DataLoader(Numbered(), batch_sampler=BatchSampler(SequentialSampler(range(LENGTH)), BATCH, drop_last=True))
    with pytest.warns(RecorderWarning, match="UsageError at step 0: expected the dataset indices in the batch at 'i'"):
        assert len(train(tmp_path / "one", lambda rec: announced(rec, loader, indices="i"), strict=False)) == 5
    with pytest.raises(UsageError, match="found a dict with the keys 'id', 'x'"):
        train(tmp_path / "two", lambda rec: announced(rec, loader, indices="i"), strict=True)
