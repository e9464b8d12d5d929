"""Bits of a small run turned round, one after the other, in several processes at once."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from recorder.errors import LossledgerError
from recorder.verify import verify
from tests.reliability.counts import BIT_FLIPS, SEED
from tests.reliability.promises import Tally
from tests.reliability.readings import content_of


def files_of(run: Path) -> list[Path]:
    """Every file that holds anything: manifest, segments, untrained, optimizer, what the trainer needs."""
    files = [file for file in sorted(run.rglob("*")) if file.is_file() and file.stat().st_size]
    assert {file.name.split(".")[0] for file in files} >= {"manifest", "untrained", "optimizer", "counts"}
    assert len(files) == 7
    return files


def assert_noticed_or_harmless(run: Path, content: str) -> None:
    """`verify` finds something, or reading ends in an error of ours, or reads what was written; no other error."""
    try:
        if verify(run).damages:
            return
        found = content_of(run)
    except LossledgerError:
        return
    assert found == content, "it went unnoticed, and the run reads otherwise than it was written"


def flip_bits(run: str, result: str, part: int, parts: int) -> None:
    """Turn round every so many bits, and write down what came of it."""
    folder = Path(run)
    content = content_of(folder)
    points = [(file, bit) for file in files_of(folder) for bit in range(8 * file.stat().st_size)]
    if len(points) > BIT_FLIPS:
        points = random.Random(SEED).sample(points, BIT_FLIPS)
    tally = Tally("F1", SEED)
    for file, bit in points[part::parts]:
        with tally.case(f"{file.name}, bit {bit}"), _flipped(file, bit):
            assert_noticed_or_harmless(folder, content)
    assert content_of(folder) == content
    Path(result).write_text(json.dumps({"tried": tally.tried, "broken": tally.broken}))


@contextmanager
def _flipped(file: Path, bit: int) -> Iterator[None]:
    descriptor = os.open(file, os.O_RDWR)
    try:
        byte = os.pread(descriptor, 1, bit // 8)
        os.pwrite(descriptor, bytes([byte[0] ^ 1 << bit % 8]), bit // 8)
        yield
        os.pwrite(descriptor, byte, bit // 8)
    finally:
        os.close(descriptor)
