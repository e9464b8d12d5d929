"""The errors a user may meet, each a sentence that says what was expected, found, where, and what to do.

Command lines turn a `LossledgerError` into one line and its exit code; anything else is a bug of ours
and keeps its traceback.
"""

from __future__ import annotations


class LossledgerError(Exception):
    """Base of every error that lossledger raises for a user to read."""

    exit_code = 1


class UsageError(LossledgerError, ValueError):
    """A wrong argument, flag, or folder: nothing was started and nothing was written."""

    exit_code = 2


class FormatError(LossledgerError, ValueError):
    """A file is not of the format or of the version that this program reads."""


class DamagedFileError(FormatError):
    """A file of ours is truncated or its content does not match its checksum."""


class MismatchError(LossledgerError):
    """Recomputing something that was recorded did not reproduce the record."""


class JoinError(UsageError):
    """A restarted training does not go on from what its run recorded: the record would lie."""
