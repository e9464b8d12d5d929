from __future__ import annotations

import json
from pathlib import Path

from recorder.runformat import Run
from recorder.segments import list_segments
from recorder.verify import verify
from tests.reliability.children import train_long
from tests.reliability.conftest import Promise
from tests.reliability.counts import STEPS
from tests.reliability.trainings import build, fingerprint, trained, update
from tests.reliability.warm import WarmProcess

_MEBIBYTE = 1 << 20


def test_a_long_recording_takes_few_files_few_handles_and_flat_memory(
    tmp_path: Path, promise: Promise, warm: WarmProcess
) -> None:
    run = tmp_path / "run"
    with promise("R11") as tally:
        with tally.case("recorded under 32 handles"):
            warm.run(train_long, run, tmp_path / "result", STEPS)
        told = json.loads((tmp_path / "result").read_text())
        with tally.case("few files"):
            files = [file for file in run.rglob("*") if file.is_file()]
            segments = list_segments(run)
            assert len(segments) == -(-STEPS // 64)
            assert len(files) <= len(segments) + 5
        with tally.case("few handles"):
            assert max(told["handles"]) - min(told["handles"]) <= 2  # a segment's two files, or none between segments
        with tally.case("flat memory"):
            settled = told["memory"][len(told["memory"]) // 3 :]
            assert max(settled) - settled[0] < 8 * _MEBIBYTE
        with tally.case("whole"):
            verdict = verify(run)
            assert not verdict.damages
            assert verdict.usable == ((0, STEPS),)
        with tally.case("the last step is the training's"):
            model, optimizer = build("sgd")
            for step in range(STEPS):
                update(model, optimizer, step)
            assert fingerprint(trained(model)) == told["model"]
            assert fingerprint(Run(run).parameters(STEPS)) == told["model"]
