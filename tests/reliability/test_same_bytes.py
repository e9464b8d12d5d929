from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from replay.shards import ShardFolder
from tests.reliability.conftest import Promise
from tests.reliability.counts import FULL
from tests.reliability.replays import STEPS, Recorded, hashes, here

pytestmark = pytest.mark.cluster


@pytest.mark.skipif(not FULL, reason="in `make reliability`; one command with two workers is tried below")
def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, promise: Promise, replayed: Recorded) -> None:
    with promise("P6") as tally:
        for workers, repetition in itertools.product(("1", "2", "4"), range(3)):
            with tally.case(f"{workers} workers, repetition {repetition}"):
                run = replayed.copy(tmp_path / "run")
                assert here(run, "--workers", workers) == 0
                assert hashes(run) == replayed.hashes
                shutil.rmtree(run)


def test_the_bytes_do_not_depend_on_the_order_of_the_chunks_and_on_who_does_them(
    tmp_path: Path, promise: Promise, replayed: Recorded
) -> None:
    run = replayed.copy(tmp_path / "run")
    with promise("P6") as tally, tally.case("every third chunk, from the last one on"):
        for share, workers in (("3/3", "1"), ("1/3", "2"), ("2/3", "1")):
            assert here(run, "--workers", workers, "--shard", share) == 0
        assert hashes(run) == replayed.hashes


def test_the_numbers_do_not_depend_on_the_length_of_the_chunks(
    tmp_path: Path, promise: Promise, replayed: Recorded
) -> None:
    with promise("P6") as tally:
        expected: dict[str, Any] | None = None
        for chunk in (1, 3, 5, STEPS):
            run = replayed.copy(tmp_path / str(chunk))
            with tally.case(f"{chunk} steps a chunk"):
                assert here(run, "--workers", "1", "--chunk", str(chunk)) == 0
                found = _numbers(run)
                expected = expected or found
                assert found.keys() == expected.keys()
                for name, values in found.items():
                    np.testing.assert_array_equal(values, expected[name], err_msg=name)


def _numbers(run: Path) -> dict[str, Any]:
    """Every array of every loss data over all steps; what a chunk spares its neighbours is no number of a step."""
    numbers: dict[str, Any] = {}
    for path in run.glob("shards/*/settings.json"):
        folder = ShardFolder.open(path.parent)
        shards = [folder.read(start, stop) for start, stop in folder.finished()]
        arrays = [
            {
                **{name: array for name, array in shard.per_step.items() if name != "evaluations"},
                **{
                    f"{quantity}/{parameter}": array
                    for group in (shard.per_unit, shard.per_parameter)
                    for quantity, of in group.items()
                    for parameter, array in of.items()
                },
            }
            for shard in shards
        ]
        for name in arrays[0]:
            numbers[f"{folder.settings.loss_data}/{name}"] = np.concatenate([array[name] for array in arrays])
    return numbers
