"""Loss data: on which examples the loss is measured.

``batch`` is each update's own recorded batch. ``probe:N`` and ``valid:N`` are N examples drawn once from the training
or the validation data, the same for every step; ``fresh:N`` are N drawn anew for every step; ``file:PATH`` are those
that a file lists, in named groups if it says so. All seeds are kept in the shards.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from recorder.errors import UsageError
from recorder.steps import Step
from recorder.workload import Workload
from replay.examplefile import read_examples
from replay.examples import DRAW_SEED, Collation, FixedExamples, FreshDraw, Grouped, draw
from replay.recordedbatch import RecordedBatch

DEFAULT = ("batch", "probe:512")
DEFAULT_OF_CHORD = ("probe:512",)
"""Between checkpoints there are many batches, and none of them is recorded."""

MICRO_BATCH = 32
"""Examples to a micro-batch where no training tells how many it took."""

_SPLITS = {"probe": "train", "valid": "valid", "fresh": "train"}
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_EXPECTED = (
    "expected batch, probe:N, valid:N, fresh:N or file:PATH, with N the number of examples; NAME= may stand before it"
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A loss data as the user asked for it.

    Parameters
    ----------
    name
        What it is called in shards, cube and figures.
    kind
        ``batch``, ``probe``, ``valid``, ``fresh`` or ``file``.
    examples
        How many to draw; None where nothing is drawn.
    file
        The file that lists the examples; None for the other kinds.
    split
        Where the examples are from; None for ``batch``.
    """

    name: str
    kind: str
    examples: int | None = None
    file: str | None = None
    split: str | None = None


def parse(text: str) -> Request:
    """Parse the value of ``--loss-data``.

    Parameters
    ----------
    text
        ``batch``, ``probe:N``, ``valid:N``, ``fresh:N`` or ``file:PATH``, the last with ``:valid`` behind it where the
        file lists examples of the validation data; ``NAME=`` before it calls it otherwise than its kind.

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
    Request(name='probe', kind='probe', examples=512, file=None, split='train')
    >>> parse("rare=file:rare.csv:valid")
    Request(name='rare', kind='file', examples=None, file='rare.csv', split='valid')
    """
    named = re.fullmatch(rf"({_NAME.pattern})=(.*)", text)
    rest = named[2] if named else text
    kind, _, value = rest.partition(":")
    name = named[1] if named else kind
    if rest == "batch":
        return Request(name=name, kind="batch")
    if kind in _SPLITS and value.isascii() and value.isdigit() and int(value) > 0:
        return Request(name=name, kind=kind, examples=int(value), split=_SPLITS[kind])
    if kind == "file" and value:
        path, _, split = value.rpartition(":")
        if path and split in {"train", "valid"}:
            return Request(name=name, kind=kind, file=path, split=split)
        return Request(name=name, kind=kind, file=value, split="train")
    message = f"unknown loss data {text!r}; {_EXPECTED}"
    raise UsageError(message)


class LossData(Protocol):
    """The examples of a step.

    `fixed`: the same for every step. `sampled`: drawn at random, so that what is measured on them has a standard error.
    `micro_batch`: examples to a micro-batch, or ``recorded``: as in the training.
    """

    name: str
    micro_batch: int | str
    fixed: bool
    sampled: bool
    settings: dict[str, Any]

    def micro_batches(self, step: Step) -> Sequence[Any]:
        """Return the micro-batches to measure the loss of a step on, on the device."""
        ...


def build(request: Request, workload: Workload, first_step: Step, device: torch.device) -> list[LossData]:
    """Build a loss data.

    Parameters
    ----------
    request
        What the user asked for.
    workload
        Lists and collates examples.
    first_step
        The run's first step: examples are cut into micro-batches of the size training used there, of
        `MICRO_BATCH` where it has none.
    device
        Where the micro-batches go.

    Returns
    -------
    list of LossData
        One; of a file with groups every group and, last, all of them together.

    Raises
    ------
    UsageError
        If there are not so many examples, or not those that the file lists.
    """
    if request.split is None:
        return [RecordedBatch(request.name, workload, device)]
    sizes = [len(micro_batch.indices) for micro_batch in first_step.micro_batches] or [MICRO_BATCH]
    collate = Collation(workload=workload, split=request.split, micro_batch=max(1, *sizes), device=device)
    available = workload.indices(request.split)
    if request.file is not None:
        return _from_file(request, available, collate)
    assert request.examples is not None
    if len(available) < request.examples:
        message = (
            f"--loss-data {request.kind}:{request.examples}: the split {request.split!r} has {len(available)} "
            f"examples; ask for at most {len(available)}"
        )
        raise UsageError(message)
    if request.kind == "fresh":
        return [FreshDraw(request.name, available, request.examples, request.split, collate)]
    origin = {"split": request.split, "seed": DRAW_SEED}
    drawn = draw(available, request.examples, DRAW_SEED)
    return [FixedExamples(request.name, drawn, origin, collate, sampled=True)]


def _from_file(request: Request, available: Sequence[int], collate: Collation) -> list[LossData]:
    assert request.file is not None
    groups = read_examples(Path(request.file))
    known = set(available)
    unknown = [index for indices in groups.values() for index in indices if index not in known]
    if unknown:
        message = (
            f"{request.file}: lists {len(unknown)} examples that the split {request.split!r} does not have, first "
            f"{unknown[0]}; it has {len(available)}. Are they of the other split (file:PATH:valid)?"
        )
        raise UsageError(message)
    origin = {"split": request.split}
    if list(groups) == [None]:
        return [FixedExamples(request.name, groups[None], origin, collate, sampled=False)]
    parts = [
        FixedExamples(f"{request.name}/{group}", indices, origin, collate, sampled=False)
        for group, indices in groups.items()
    ]
    return [*parts, Grouped(request.name, parts)]
