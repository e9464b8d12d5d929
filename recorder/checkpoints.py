"""One checkpoint in a run of path ``chord``: where each of its tensors stands, and what its bytes must be.

    RUN/checkpoints/00001000/checkpoint.json        which tensor is where, with its CRC-32
    RUN/checkpoints/00001000/model.safetensors      a link to the source's file, or what was made of it

Part of the run format (docs/formats/run.md). The record is written last: a checkpoint that has one is whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from recorder import sealedjson, tensorfile
from recorder.errors import DamagedFileError, FormatError

if TYPE_CHECKING:
    import torch

FORMAT = "lossledger-checkpoint"
VERSION = 1
FOLDER = "checkpoints"
RECORD_FILE = "checkpoint.json"

WRITTEN, HARD_LINK, SYMBOLIC_LINK = "written", "hard link", "symbolic link"
"""How a file came into the run."""


def checkpoint_folder(run: Path, step: int) -> Path:
    """Name the folder of a checkpoint.

    Parameters
    ----------
    run
        The run's folder.
    step
        After how many updates it was taken.

    Returns
    -------
    Path
        The folder, whether or not it exists.
    """
    return run / FOLDER / f"{step:08d}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """A safetensors file of a checkpoint.

    Parameters
    ----------
    name
        In the checkpoint's folder.
    bytes
        Its size.
    kind
        `WRITTEN`, `HARD_LINK` or `SYMBOLIC_LINK`.
    """

    name: str
    bytes: int
    kind: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """A tensor of a checkpoint.

    Parameters
    ----------
    file
        Name of its file.
    tensor
        Its name in the file.
    crc32
        CRC-32 of its bytes.
    """

    file: str
    tensor: str
    crc32: int


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What is known of one checkpoint.

    Parameters
    ----------
    step
        After how many updates it was taken.
    epoch
        The training's epoch then, from 1; 0 where the source does not tell.
    source
        What it was made of: path of each file to its bytes and its time of modification in ns.
    taken_from
        Name of a tensor of the model to its name in the source, where that is another.
    files
        Its files.
    tensors
        Name of a parameter or a buffer of the model to where it stands.
    """

    step: int
    epoch: int
    source: Mapping[str, tuple[int, int]]
    taken_from: Mapping[str, str]
    files: tuple[File, ...]
    tensors: Mapping[str, Stored]

    def write(self, run: Path) -> None:
        """Write the record into its checkpoint's folder: the checkpoint is whole then.

        Parameters
        ----------
        run
            The run's folder.
        """
        document = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        sealedjson.write(checkpoint_folder(run, self.step) / RECORD_FILE, document)

    @classmethod
    def read(cls, run: Path, step: int) -> Record:
        """Read the record of a checkpoint.

        Parameters
        ----------
        run
            The run's folder.
        step
            After how many updates it was taken.

        Returns
        -------
        Record
            The record. A `DamagedFileError` tells if it fails its checksum.

        Raises
        ------
        FormatError
            If it is missing, of another version, or not understood.
        """
        path = checkpoint_folder(run, step) / RECORD_FILE
        if not path.is_file():
            message = f"{path}: expected the record of the checkpoint after {step} updates, found none"
            raise FormatError(message)
        document = sealedjson.read(path, (FORMAT, VERSION))
        if (document.get("format"), document.get("version")) != (FORMAT, VERSION):
            message = (
                f"{path}: expected format {FORMAT} version {VERSION}, found {document.get('format')!r} version "
                f"{document.get('version')!r}"
            )
            raise FormatError(message)
        fields = {name: value for name, value in document.items() if name not in {"format", "version", "crc32"}}
        try:
            fields["source"] = {name: (size, time) for name, (size, time) in fields["source"].items()}
            fields["files"] = tuple(File(**entry) for entry in fields["files"])
            fields["tensors"] = {name: Stored(**entry) for name, entry in fields["tensors"].items()}
            record = cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            message = f"{path}: a field is missing, unknown or not understood ({error})"
            raise FormatError(message) from error
        if record.step != step:
            message = f"{path}: expected the checkpoint of its folder, found that after {record.step} updates"
            raise FormatError(message)
        return record


class CheckpointReader:
    """A checkpoint opened for reading tensor by tensor.

    Parameters
    ----------
    run
        The run's folder.
    record
        The checkpoint's record.

    Raises
    ------
    DamagedFileError
        If a file is missing or has another size than at the import.
    """

    def __init__(self, run: Path, record: Record) -> None:
        self.record = record
        self._folder = checkpoint_folder(run, record.step)
        self._handles: dict[str, Any] = {}
        for file in record.files:
            path = self._folder / file.name
            found = path.stat().st_size if path.exists() else None
            if found != file.bytes:
                is_now = "is missing" if found is None else f"has {found:,} bytes"
                message = f"{path}: {is_now}; it had {file.bytes:,} when it was imported. {_remedy(file)}"
                raise DamagedFileError(message)

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read tensors, every checksum verified.

        Parameters
        ----------
        names
            Of the model's parameters or buffers.

        Returns
        -------
        dict of str to torch.Tensor
            Name to tensor in host memory, in the stored dtype.
        """
        return {name: self._tensor(name) for name in names}

    def _tensor(self, name: str) -> torch.Tensor:
        stored = self.record.tensors.get(name)
        if stored is None:
            message = f"{self._folder / RECORD_FILE}: tells of no tensor {name!r}"
            raise DamagedFileError(message)
        path = self._folder / stored.file
        (file,) = (entry for entry in self.record.files if entry.name == stored.file)
        try:
            if stored.file not in self._handles:
                self._handles[stored.file] = safe_open(path, framework="pt")
            tensor: torch.Tensor = self._handles[stored.file].get_tensor(stored.tensor)
        except (SafetensorError, OSError) as error:
            message = f"{path}: tensor {stored.tensor!r} cannot be read ({error}). {_remedy(file)}"
            raise DamagedFileError(message) from error
        found = tensorfile.checksum(tensor)
        if found != stored.crc32:
            message = (
                f"{path}: tensor {stored.tensor!r} is not the one that was imported: expected CRC-32 {stored.crc32}, "
                f"found {found}. {_remedy(file)}"
            )
            raise DamagedFileError(message)
        return tensor


def _remedy(file: File) -> str:
    if file.kind == WRITTEN:
        return "Restore it from a copy, or import the checkpoints again into a new folder"
    return (
        f"It is a {file.kind} to a file of the checkpoints' source, which something has changed since: restore that, "
        "or import the checkpoints again into a new folder"
    )
