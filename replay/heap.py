"""One heap for all threads of a worker.

glibc gives every thread a heap of its own, and there what one thread has freed serves no other: θ is read in one thread
and let go of in another, and each heap keeps gaps for the largest it ever held. One heap takes less memory and no more
time. Other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes
import os

ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
"""The same for a process that is yet to start: by then no thread has a heap of its own."""

_M_ARENA_MAX = -8  # malloc.h


def share_one_heap() -> None:
    """Have all threads that this process starts from now on use the heaps that are there."""
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
    except (AttributeError, OSError, ValueError):
        return
    ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
