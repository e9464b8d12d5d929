"""Numbers as a user types them at a command line: 60M parameters, 2.5GB of disk."""

from __future__ import annotations

import argparse
import re

_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def size(text: str) -> int:
    """Read a number with a decimal unit.

    Parameters
    ----------
    text
        Such as ``60M``, ``1e9`` or ``2.5GB``.

    Returns
    -------
    int
        The number.

    Raises
    ------
    argparse.ArgumentTypeError
        If it is none.
    """
    match = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([kMGT]?)B?", text)
    if match is None:
        message = f"expected a number such as 60M or 2.5GB, not {text!r}"
        raise argparse.ArgumentTypeError(message)
    return int(float(match[1]) * _UNITS[match[2]])
