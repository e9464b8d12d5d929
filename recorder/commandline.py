"""What the four command lines share: one line for a user's mistake, an exit code, nothing else.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but entries missed the tolerance, 130 interrupted.
Ground floor: imports neither torch nor anything of lossledger but its errors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from recorder.errors import LossledgerError

DONE = 0
FAILED = 1
WRONG_USAGE = 2
TOLERANCE_NOT_MET = 3
INTERRUPTED = 130


def say(line: str) -> None:
    """Write one line for the person at the terminal, to standard error.

    Parameters
    ----------
    line
        The text, without its newline.
    """
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def result(line: str) -> None:
    """Write one line of result, to standard output, where a script can read it.

    Parameters
    ----------
    line
        The text, without its newline.
    """
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def guarded(program: str, command: Callable[[], int]) -> int:
    """Run a command and turn the errors meant for users into one line and an exit code.

    Parameters
    ----------
    program
        How the user called it, such as ``python -m replay``.
    command
        Does the work and returns an exit code.

    Returns
    -------
    int
        The exit code.
    """
    try:
        return command()
    except LossledgerError as error:
        say(f"{program}: error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say(f"{program}: interrupted; everything finished so far is kept")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (``| head``); Python would complain once more at exit.
        sys.stderr.close()
        return FAILED
