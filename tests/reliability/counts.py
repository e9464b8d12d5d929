"""How often each promise is put to the test: a few times in the test suite, all the times in `make reliability`."""

from __future__ import annotations

import os

FULL = os.environ.get("LOSSLEDGER_RELIABILITY") == "full"
SEED = int(os.environ.get("LOSSLEDGER_RELIABILITY_SEED", "0"))


def _count(few: int, full: int) -> int:
    return full if FULL else few


KILLS = _count(48, 1002)
"""SIGKILLs of a training at random moments; a multiple of the six trainings."""

KILLED_CALLS = _count(36, 10_000)
"""System calls that a commit is killed at; the full number is more than there are."""

CALL_STRIDE = _count(20, 1)
"""Every so many calls of a training with two threads, whose calls come in no fixed order, it is killed."""

DISK_SIZES = _count(8, 64)
"""Sizes of a disk that a run fills."""

FAILING_CALLS = _count(40, 10_000)
"""Calls to the operating system that a recording is refused; the full number is more than there are."""

ALL_CONFIGURATIONS = FULL
"""Whether the observer effect is looked for in all 48 configurations, and not in 12."""

PREEMPTIONS = _count(10, 200)
"""Kills of a training that is restarted from its last checkpoint."""

WRITERS = _count(10, 100)
"""Times that two recorders meet on one folder."""

STEPS = _count(3_000, 100_000)
"""Steps of the long recording."""

BIT_FLIPS = _count(1_500, 10**9)
TRUNCATIONS = _count(400, 10**9)
SWAPS = _count(20, 10**9)
"""Damages done to a small run; the full numbers are more than there are."""

SEGMENTS = _count(8, 100)
"""Segments of a run, each of which is damaged once."""

HURT_REPLAYS = _count(1, 100)
"""Replays whose workers are killed, stopped or starved, five times each in `make reliability`."""

HURTS = _count(4, 5)
"""Of each of them."""

STANDSTILL_KINDS = _count(1, 10)
"""Kinds of standstill that a replay is brought to; the full number is more than there are."""

STANDSTILLS = _count(1, 6)
"""How often each of them."""

KILLED_REPLAYS = _count(1, 100)
"""Replays that are killed and resumed."""

BAD_CHUNKS = _count(2, 10)
"""Kinds of bad chunk; the full number is more than there are."""

REPLAY_SIZES = ("small", "middle", "large", "tiny") if FULL else ("small",)
"""Models whose replay is watched for its memory."""

REPLAY_LOSS_DATA = ("batch", "probe:4") if FULL else ("batch",)
"""On which loss data."""

LONG_REPLAY_SIZE = "small" if FULL else "tiny"
"""Model of the longer replay."""

REPLAY_STEPS = _count(8, 24)
"""Steps of a replay; ten times as many must take the same memory."""
