from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest

from recorder.segmentwriter import SegmentWriter
from recorder.steps import Step
from recorder.writer import BackgroundWriter


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a niceness for each thread")
def test_the_writers_thread_gives_way_to_the_training_and_no_other_thread_does(tmp_path: Path) -> None:
    before = os.getpriority(os.PRIO_PROCESS, 0)
    found: list[int] = []

    def step() -> Step:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return Step(step=0, epoch=1, seed=1, learning_rates=(), micro_batches=())

    writer = BackgroundWriter(SegmentWriter(tmp_path, "id", 1, 0, 4))
    writer.put(None, step)
    writer.close()
    assert writer.failure is None
    assert found[0] > before or before == 19
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == before
