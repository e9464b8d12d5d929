from __future__ import annotations

from pathlib import Path

import pytest

from replay.log import FILE
from tests.reliability.conftest import Promise
from tests.reliability.counts import BAD_CHUNKS, FULL
from tests.reliability.replays import DEED, DEEDS, STEPS, Recorded, hashes, here, shard_files

pytestmark = pytest.mark.cluster

REASON = {
    "exception": "IndexError: list index out of range",
    "loop": "no step was finished for 15 s",
    "segfault": "3 workers died at it",
    "killed": "3 workers died at it",
    "memory": "a single example does not fit into memory",
}


@pytest.mark.skipif(not FULL, reason="in `make reliability`; one chunk that hangs is tried below")
def test_as_many_chunks_may_hang_as_there_are_workers_and_one_more_ends_the_replay(
    tmp_path: Path, promise: Promise, replayed: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    with promise("P5") as tally:
        for hanging, finished in (((4, 5), set(range(STEPS)) - {4, 5}), ((4, 5, 6, 7, 8), {0, 1, 2, 3})):
            with tally.case(f"{len(hanging)} chunks"):
                run = replayed.copy(tmp_path / str(len(hanging)))
                monkeypatch.setenv(DEEDS, ", ".join(f"loop {step}" for step in hanging))
                assert here(run, "--workers", "2", "--stall-seconds", "20") == 1
                assert {int(file.name.partition("-")[0]) for file in shard_files(run)} == finished


def test_a_chunk_that_fails_or_crashes_or_hangs_is_named_and_all_others_are_finished(
    tmp_path: Path,
    promise: Promise,
    replayed: Recorded,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert REASON.keys() == DEED.keys()
    kinds = list(REASON)[:BAD_CHUNKS]
    run = replayed.copy(tmp_path / "run")
    monkeypatch.setenv(DEEDS, ", ".join(f"{kind} {4 + 2 * number}" for number, kind in enumerate(kinds)))
    with promise("P5") as tally:
        assert here(run, "--workers", "2", "--stall-seconds", "15") == 1
        said = capfd.readouterr().err
        last, log = said.splitlines()[-1], (run / "shards" / FILE).read_text()
        for number, kind in enumerate(kinds):
            step = 4 + 2 * number
            with tally.case(kind):
                assert REASON[kind] in last
                assert f"{step}-{step}" in last.partition("; missing: ")[2]
                assert REASON[kind] in log
                assert not [file for file in shard_files(run) if file.name.startswith(f"{step:08d}-")]
        with tally.case("all others"):
            assert len(shard_files(run)) == 2 * (STEPS - len(kinds))
            assert hashes(run).items() <= replayed.hashes.items()
        with tally.case("once the cause is gone"):
            monkeypatch.delenv(DEEDS)
            assert here(run, "--workers", "1") == 0
            assert hashes(run) == replayed.hashes
