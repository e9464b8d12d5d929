"""The tensors of one checkpoint, whatever file they stand in: names, shapes and dtypes first, values when asked for."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from recorder.errors import UsageError


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a tensor without its values.

    Parameters
    ----------
    shape
        Its shape.
    dtype
        As torch prints it, without ``torch.``.
    """

    shape: tuple[int, ...]
    dtype: str


class Weights(Protocol):
    """The tensors of a checkpoint.

    `facts`: name to what is known of each. `files`: what they are read from. `linkable`: safetensors files that may be
    linked instead of written again; empty where the tensors stand in other files.
    """

    facts: Mapping[str, Facts]
    files: tuple[Path, ...]
    linkable: tuple[Path, ...]

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into host memory."""
        ...

    def file_of(self, name: str) -> Path:
        """Name the file of a tensor."""
        ...


class InMemory:
    """Tensors that a pickle file was loaded to, or several: mapped from the disk where the file allows it.

    Parameters
    ----------
    files
        The files.
    parts
        For each the tensors of it.
    """

    linkable: tuple[Path, ...] = ()

    def __init__(self, files: tuple[Path, ...], parts: tuple[Mapping[str, torch.Tensor], ...]) -> None:
        self.files = files
        self._places = {
            name: (file, tensor) for file, part in zip(files, parts, strict=True) for name, tensor in part.items()
        }
        self.facts: Mapping[str, Facts] = {
            name: Facts(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, (_, tensor) in self._places.items()
        }

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor.

        Parameters
        ----------
        name
            One of `facts`.

        Returns
        -------
        torch.Tensor
            Contiguous, in host memory.
        """
        return self._places[name][1].detach().contiguous()

    def file_of(self, name: str) -> Path:
        """Name the file of a tensor.

        Parameters
        ----------
        name
            One of `facts`.

        Returns
        -------
        Path
            The file.
        """
        return self._places[name][0]


class SafetensorsFiles:
    """Tensors in safetensors files, read one by one.

    Parameters
    ----------
    files
        The files; no tensor is in two of them.

    Raises
    ------
    UsageError
        If a file is no safetensors file, or two hold a tensor of the same name.
    """

    def __init__(self, files: tuple[Path, ...]) -> None:
        self.files = self.linkable = files
        self._handles: dict[Path, Any] = {}
        self._places: dict[str, Path] = {}
        self.facts: Mapping[str, Facts] = self._look()

    def _look(self) -> dict[str, Facts]:
        facts: dict[str, Facts] = {}
        for file in self.files:
            try:
                handle: Any = safe_open(file, framework="pt")
                self._handles[file] = handle
                for name in handle.keys():  # noqa: SIM118 (no mapping)
                    if name in facts:
                        message = f"{file}: holds tensor {name!r}, which {self._places[name].name} holds too"
                        raise UsageError(message)
                    found = handle.get_slice(name)
                    facts[name] = Facts(tuple(found.get_shape()), _DTYPES.get(found.get_dtype(), found.get_dtype()))
                    self._places[name] = file
            except (SafetensorError, OSError) as error:
                message = f"{file}: cannot be read as a safetensors file ({error})"
                raise UsageError(message) from error
        return facts

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Parameters
        ----------
        name
            One of `facts`.

        Returns
        -------
        torch.Tensor
            In host memory.

        Raises
        ------
        UsageError
            If the file cannot be read.
        """
        try:
            tensor: torch.Tensor = self._handles[self._places[name]].get_tensor(name)
        except (SafetensorError, OSError) as error:
            message = f"{self._places[name]}: tensor {name!r} cannot be read ({error})"
            raise UsageError(message) from error
        return tensor

    def file_of(self, name: str) -> Path:
        """Name the file of a tensor.

        Parameters
        ----------
        name
            One of `facts`.

        Returns
        -------
        Path
            The file.
        """
        return self._places[name]


_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def indexed_files(index: Path) -> tuple[Path, ...]:
    """List the files that the index of a sharded checkpoint names.

    Parameters
    ----------
    index
        ``model.safetensors.index.json`` or ``pytorch_model.bin.index.json``.

    Returns
    -------
    tuple of Path
        Beside the index.

    Raises
    ------
    UsageError
        If the index is not understood, or a file is missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        message = f"{index}: expected an index of tensors to files, with an entry weight_map ({error})"
        raise UsageError(message) from error
    # A name with a folder in it would lead out of the checkpoint.
    files = tuple(index.parent / Path(name).name for name in names)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        message = f"{index}: names {len(files)} files, of which {len(missing)} are missing: {', '.join(missing)}"
        raise UsageError(message)
    return files
