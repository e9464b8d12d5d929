"""Write a file whole or not at all, and on the disk before anyone sees its name.

Temporary neighbour, fsync, rename, fsync of the folder: after a kill or a power cut a reader finds the old
file or the new one, never half of one. Ground floor: imports neither torch nor anything of lossledger.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

TEMPORARY_SUFFIX = ".partial"


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    # The umask can only be read by setting it. mkstemp makes files 0600, which would hide a run from its group.
    current = os.umask(0o077)
    os.umask(current)
    return current


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on leaving without an error it becomes `path`, synced to disk.

    Parameters
    ----------
    path
        The final path. An existing file is replaced in one atomic rename.

    Yields
    ------
    Path
        An empty temporary file in the same folder, for a library that insists on writing by name.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Give a file that is whole and synced its final name, durably.

    Parameters
    ----------
    temporary
        The file, in the same folder.
    path
        Its final path. An existing file is replaced in one atomic rename.
    """
    temporary.replace(path)
    _fsync_folder(path.parent)


def write(path: Path, body: Callable[[BinaryIO], object]) -> None:
    """Write `path` durably from a function that fills an open binary stream.

    Parameters
    ----------
    path
        The final path.
    body
        Called once with the open temporary file.
    """
    with replacing(path) as temporary, temporary.open("wb") as stream:
        body(stream)
        stream.flush()


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, durably and all at once.

    Parameters
    ----------
    path
        The final path.
    text
        Its content.
    """
    write(path, lambda stream: stream.write(text.encode("utf-8")))


def sweep(folder: Path) -> list[Path]:
    """Remove the temporary files that a killed writer left in `folder`.

    Parameters
    ----------
    folder
        A folder that no other process is writing to.

    Returns
    -------
    list of Path
        What was removed.
    """
    leftovers = sorted(Path(folder).glob(f".*{TEMPORARY_SUFFIX}"))
    for leftover in leftovers:
        leftover.unlink(missing_ok=True)
    return leftovers
