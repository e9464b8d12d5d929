"""The most memory this process has held since a moment of one's choice."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Forget the peak so far, where the system can (Linux)."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")


def resident_bytes() -> int:
    """Tell what the process holds now.

    Returns
    -------
    int
        Bytes of resident memory; 0 where the system does not tell.
    """
    return _entry("VmRSS") if _STATUS.exists() else 0


def peak_bytes() -> int:
    """Tell the peak since `reset_peak`; where the system cannot forget, that of the whole process.

    Returns
    -------
    int
        Bytes of resident memory.
    """
    if _STATUS.exists():
        return _entry("VmHWM")
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _entry(name: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith(name))
