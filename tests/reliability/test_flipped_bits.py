from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from pathlib import Path

import pytest

from recorder.verify import verify
from tests.reliability.conftest import Promise
from tests.reliability.counts import SEED, SWAPS, TRUNCATIONS
from tests.reliability.flips import assert_noticed_or_harmless, files_of, flip_bits
from tests.reliability.readings import content_of
from tests.reliability.trainings import record_twice
from tests.reliability.warm import WarmProcess

pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")

_BLOCK = 4096


@pytest.fixture
def run(tmp_path: Path) -> Path:
    record_twice(tmp_path / "run")
    assert not verify(tmp_path / "run").damages
    return tmp_path / "run"


def test_no_flipped_bit_passes_unnoticed(run: Path, promise: Promise, warm: WarmProcess) -> None:
    parts = len(os.sched_getaffinity(0))
    results = [run.with_name(f"result{part}") for part in range(parts)]
    pids = []
    for part, result in enumerate(results):
        copy = run.with_name(f"part{part}")
        shutil.copytree(run, copy)
        pids.append(warm.start(flip_bits, copy, result, part, parts))
    with promise("F1", SEED) as tally:
        for pid, result in zip(pids, results, strict=True):
            assert warm.wait(pid) == 0, warm.log()
            told = json.loads(result.read_text())
            tally.tried += told["tried"]
            tally.broken += told["broken"]


def test_no_truncated_file_passes_unnoticed(run: Path, promise: Promise) -> None:
    content = content_of(run)
    cuts = [(file, size) for file in files_of(run) for size in range(file.stat().st_size)]
    if len(cuts) > TRUNCATIONS:
        cuts = [*random.Random(SEED).sample(cuts, TRUNCATIONS), *((file, 0) for file in files_of(run))]
    with promise("F1", SEED) as tally:
        for file, size in cuts:
            whole = file.read_bytes()
            with tally.case(f"{file.name}, cut to {size} bytes"):
                os.truncate(file, size)
                assert_noticed_or_harmless(run, content)
            file.write_bytes(whole)
        assert content_of(run) == content


def test_no_missing_file_passes_unnoticed(run: Path, promise: Promise) -> None:
    content = content_of(run)
    aside = run.with_name("aside")
    with promise("F1", SEED) as tally:
        for file in files_of(run):
            file.rename(aside)
            with tally.case(f"{file.name} is missing"):
                assert_noticed_or_harmless(run, content)
            aside.rename(file)
        assert content_of(run) == content


def test_no_two_files_under_each_others_names_pass_unnoticed(run: Path, promise: Promise) -> None:
    content = content_of(run)
    pairs = list(itertools.combinations(files_of(run), 2))
    if len(pairs) > SWAPS:
        pairs = random.Random(SEED).sample(pairs, SWAPS)
    with promise("F1", SEED) as tally:
        for one, other in pairs:
            _swap(one, other)
            with tally.case(f"{one.name} and {other.name} are swapped"):
                assert_noticed_or_harmless(run, content)
            _swap(one, other)
        assert content_of(run) == content


def _swap(one: Path, other: Path) -> None:
    bytes_of_one = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(bytes_of_one)


def test_no_block_of_zeros_passes_unnoticed(run: Path, promise: Promise) -> None:
    content = content_of(run)
    with promise("F1", SEED) as tally:
        for file in files_of(run):
            whole = file.read_bytes()
            for start in range(0, len(whole), _BLOCK):
                with tally.case(f"{file.name}, zeros from {start}"):
                    stop = min(start + _BLOCK, len(whole))
                    file.write_bytes(whole[:start] + bytes(stop - start) + whole[stop:])
                    assert_noticed_or_harmless(run, content)
                file.write_bytes(whole)
        assert content_of(run) == content
