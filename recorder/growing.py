"""A tensor file that grows step by step and survives a kill at any moment.

    RUN/segments/.NAME.growing     the tensor file in the making: room for its header, then the tensors' bytes
    RUN/segments/.NAME.journal     a line for every append: what it added, with checksums

An append writes the bytes, then one line into the journal; it counts once the line is there. `seal` writes the header
into its room, syncs and renames the file, so that its name appears only when it is whole. What a killed process left is
brought to the same end by `recover`: the lines whose checksums and bytes are right, up to the first that is not.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recorder import durable, tensorfile

PARTIAL_SUFFIX = ".growing"
JOURNAL_SUFFIX = ".journal"
_SMALLEST_ROOM = 4096
_LARGEST_ROOM = 64 << 20
"""A safetensors reader refuses headers over 100 MB."""
_FACTS_ROOM = 512
"""For what `seal` adds to the rows."""
_LINE_ROOM = 64
"""For what a line of the journal has besides its JSON's values."""
_LARGEST_OFFSET = 10**14
_VERIFY_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True, slots=True)
class Append:
    """What one append added.

    Parameters
    ----------
    tensors
        Name to ``{"dtype", "shape", "data_offsets"}``, as in a safetensors header.
    crc32
        Name to CRC-32 of the stored bytes.
    row
        A JSON object of the caller's.
    """

    tensors: Mapping[str, Mapping[str, Any]]
    crc32: Mapping[str, int]
    row: Mapping[str, Any]

    @property
    def header_bytes(self) -> int:
        """The most that this append takes of the header."""
        # The checksums and the rows are JSON texts within a JSON text.
        texts = (json.dumps(json.dumps(dict(part))) for part in (self.crc32, self.row))
        return len(json.dumps(dict(self.tensors))) + sum(map(len, texts))


def header_bytes(tensors: Mapping[str, tensorfile.Array], row: Mapping[str, Any]) -> int:
    """Say how much of the header an append can take at most.

    Parameters
    ----------
    tensors, row
        As for `GrowingTensorFile.append`.

    Returns
    -------
    int
        Bytes.
    """
    entries, _ = tensorfile.header_entries(Path("a segment"), tensors, _LARGEST_OFFSET)
    return Append(entries, dict.fromkeys(entries, 0xFFFFFFFF), row).header_bytes


def append_bytes(tensors: Mapping[str, tensorfile.Array], row: Mapping[str, Any]) -> int:
    """Say how much of the disk an append can take at most, its line of the journal included.

    Parameters
    ----------
    tensors, row
        As for `GrowingTensorFile.append`.

    Returns
    -------
    int
        Bytes.
    """
    return sum(array.nbytes for array in tensors.values()) + header_bytes(tensors, row) + _LINE_ROOM


def room_for(header_bytes: int) -> int:
    """Say how much of the disk is taken before a file has any tensor.

    Parameters
    ----------
    header_bytes
        As for `GrowingTensorFile`.

    Returns
    -------
    int
        Bytes, a multiple of 8.
    """
    room = min(max(header_bytes + _FACTS_ROOM, _SMALLEST_ROOM), _LARGEST_ROOM)
    return 8 + room + (-room) % 8


class GrowingTensorFile:
    """A tensor file in the making.

    Parameters
    ----------
    folder
        Where it will stand.
    name
        A name for the file until it is sealed, unique in the folder.
    header_bytes
        Expected size of the header: the sum of `Append.header_bytes` over all appends.

    Raises
    ------
    OSError
        If the disk refuses, here and in every method.
    """

    def __init__(self, folder: Path, name: str, header_bytes: int) -> None:
        self._partial, self._journal = _paths(folder, name)
        self._data_start = room_for(header_bytes)
        self._header_used = _FACTS_ROOM
        self._end = 0
        self.appends: list[Append] = []
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        self._data = os.open(self._partial, flags, 0o666)
        try:
            self._lines = os.open(self._journal, flags | os.O_APPEND, 0o666)
        except OSError:
            os.close(self._data)
            self._partial.unlink()
            raise
        try:
            # The room is taken now, so that a disk that fills up later still takes the header.
            _write_all(self._data, [b" " * self._data_start], 0)
            _write_all(self._lines, [_line({"data_start": self._data_start})])
        except OSError:
            self.discard()
            raise

    @property
    def bytes(self) -> int:
        """Size of the file so far."""
        return self._data_start + self._end

    @property
    def journal_bytes(self) -> int:
        """Size of the journal beside it so far."""
        return os.fstat(self._lines).st_size

    def append(self, tensors: Mapping[str, tensorfile.Array], row: Mapping[str, Any]) -> bool:
        """Add tensors and a row, or nothing at all.

        Parameters
        ----------
        tensors
            Name to NumPy array or CPU tensor.
        row
            A JSON object that goes with them.

        Returns
        -------
        bool
            False if the header has no room left for them: nothing was added, seal the file and begin another.
        """
        bodies = {name: tensorfile.content(array) for name, array in tensors.items()}
        entries, end = tensorfile.header_entries(self._partial, tensors, self._end)
        added = Append(entries, {name: zlib.crc32(body) for name, body in bodies.items()}, row)
        if self._header_used + added.header_bytes > self._data_start - 8:
            return False
        _write_all(self._data, bodies.values(), self._data_start + self._end)
        _write_all(self._lines, [_line(dataclasses.asdict(added))])
        self._keep(added, end)
        self._hand_to_disk()
        return True

    def _hand_to_disk(self) -> None:
        # The system begins to write what was appended, and lets go of what the disk has: so memory stays free for the
        # training and the next append finds warm pages (new ones cost ten times the time), and `seal` waits for little.
        if sys.platform == "linux":
            os.posix_fadvise(self._data, 0, 0, os.POSIX_FADV_DONTNEED)

    def _keep(self, added: Append, end: int) -> None:
        self.appends.append(added)
        self._header_used += added.header_bytes
        self._end = end

    def sync(self) -> None:
        """Wait until everything appended so far is on the disk, safe from a loss of power."""
        os.fsync(self._data)
        os.fsync(self._lines)

    def seal(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Make it the tensor file `path`, durably; it can't grow any more.

        Parameters
        ----------
        path
            The final path, in the same folder.
        facts
            The JSON object for `recorder.tensorfile.TensorFile.facts`; it holds the rows.
        """
        tensors = {name: entry for append in self.appends for name, entry in append.tensors.items()}
        checksums = {name: number for append in self.appends for name, number in append.crc32.items()}
        header = tensorfile.header_text(tensors, checksums, facts, length=self._data_start - 8)
        _write_all(self._data, [header], 0)
        os.ftruncate(self._data, self._data_start + self._end)
        os.fsync(self._data)
        self.close()
        durable.publish(self._partial, path)
        self._journal.unlink()

    def close(self) -> None:
        """Let go of the files; what they hold can be recovered."""
        for descriptor in (self._data, self._lines):
            if descriptor >= 0:
                os.close(descriptor)
        self._data = self._lines = -1

    def discard(self) -> None:
        """Remove the files."""
        self.close()
        self._partial.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)

    @classmethod
    def recover(cls, folder: Path, name: str) -> GrowingTensorFile | None:
        """Take up a file that a killed process left.

        Parameters
        ----------
        folder, name
            As given to the constructor then.

        Returns
        -------
        GrowingTensorFile or None
            The file with all its whole appends, ready for `seal`; None if there is nothing to recover.
        """
        partial, journal = _paths(folder, name)
        lines = list(_good_lines(journal.read_bytes())) if journal.exists() and partial.exists() else []
        if len(lines) < 2:  # the first line only tells where the data starts
            return None
        growing = cls.__new__(cls)
        growing._partial, growing._journal = partial, journal
        growing._data_start, growing._header_used, growing._end = lines[0]["data_start"], _FACTS_ROOM, 0
        growing.appends = []
        growing._data = os.open(partial, os.O_RDWR)
        growing._lines = os.open(journal, os.O_RDWR | os.O_APPEND)
        for line in lines[1:]:
            added = Append(**line)
            if not all(growing._is_whole(added, tensor) for tensor in added.tensors):
                break
            ends = [entry["data_offsets"][1] for entry in added.tensors.values()]
            growing._keep(added, max(ends, default=growing._end))
        if not growing.appends:
            growing.close()
            return None
        return growing

    def _is_whole(self, added: Append, name: str) -> bool:
        start, stop = added.tensors[name]["data_offsets"]
        found = 0
        for offset in range(start, stop, _VERIFY_BYTES):
            size = min(_VERIFY_BYTES, stop - offset)
            block = os.pread(self._data, size, self._data_start + offset)
            if len(block) < size:
                return False
            found = zlib.crc32(block, found)
        return found == added.crc32[name]


def unfinished(folder: Path) -> list[str]:
    """List the files in the making of a folder that no process is writing to.

    Parameters
    ----------
    folder
        The folder.

    Returns
    -------
    list of str
        Their names, for `GrowingTensorFile.recover` and `remove`.
    """
    found = {
        entry.name[1 : -len(suffix)]
        for suffix in (PARTIAL_SUFFIX, JOURNAL_SUFFIX)
        for entry in folder.glob(f".*{suffix}")
    }
    return sorted(found)


def remove(folder: Path, name: str) -> None:
    """Remove what is left of a file in the making.

    Parameters
    ----------
    folder, name
        As given to `GrowingTensorFile`.
    """
    for path in _paths(folder, name):
        path.unlink(missing_ok=True)


def _paths(folder: Path, name: str) -> tuple[Path, Path]:
    return folder / f".{name}{PARTIAL_SUFFIX}", folder / f".{name}{JOURNAL_SUFFIX}"


def _line(document: Mapping[str, Any]) -> bytes:
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    return f"{zlib.crc32(text):08x} ".encode() + text + b"\n"


def _good_lines(journal: bytes) -> Iterable[dict[str, Any]]:
    for line in journal.splitlines(keepends=True):
        digits, _, text = line[:-1].partition(b" ")
        if not line.endswith(b"\n") or digits != f"{zlib.crc32(text):08x}".encode():
            return
        yield json.loads(text)


def _write_all(descriptor: int, bodies: Iterable[bytes | memoryview], offset: int | None = None) -> None:
    for body in bodies:
        view = memoryview(body).cast("B")
        while view:
            written = os.write(descriptor, view) if offset is None else os.pwrite(descriptor, view, offset)
            offset = None if offset is None else offset + written
            view = view[written:]
