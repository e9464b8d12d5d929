"""The tensors in a folder of ``torch.distributed.checkpoint``, read by one process: ``.metadata``, ``__0_0.distcp``.

``.metadata`` is a pickle. It is read with an unpickler that knows the few classes of plain data it is made of and
refuses every other name before anything of it is imported. The tensors are read by torch, with ``weights_only``.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from recorder.errors import UsageError
from recorder.importing.weights import Facts

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

METADATA = ".metadata"

_PLAIN_DATA = frozenset(
    {
        *(
            ("torch.distributed.checkpoint.metadata", name)
            for name in (
                "Metadata",
                "MetadataIndex",
                "StorageMeta",
                "TensorProperties",
                "TensorStorageMetadata",
                "BytesStorageMetadata",
                "ChunkStorageMetadata",
                "_MEM_FORMAT_ENCODING",
            )
        ),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib._local", "PosixPath"),
    }
)


class _MetadataUnpickler(pickle.Unpickler):  # noqa: S301 (of its names only those above are ever looked up)
    """Knows plain data alone."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN_DATA:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        message = f"it names {module}.{name}"
        raise pickle.UnpicklingError(message)


class DistributedWeights:
    """The tensors of one such folder.

    Parameters
    ----------
    folder
        The folder.

    Raises
    ------
    UsageError
        If its metadata cannot be read, or names anything but plain data.
    """

    linkable: tuple[Path, ...] = ()

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            with (folder / METADATA).open("rb") as stream:
                self._metadata = _read_metadata(stream)
            storage: Mapping[Any, Any] = self._metadata.state_dict_metadata
            facts = {
                name: Facts(tuple(entry.size), str(entry.properties.dtype).removeprefix("torch."))
                for name, entry in storage.items()
                if hasattr(entry, "size")
            }
            files = sorted({info.relative_path for info in self._metadata.storage_data.values()})
        except pickle.UnpicklingError as error:
            message = (
                f"{folder / METADATA}: was not loaded: it holds more than the metadata of torch.distributed.checkpoint "
                f"({error}), and loading that could run code of whoever made it"
            )
            raise UsageError(message) from error
        except (OSError, EOFError, AttributeError, TypeError, ValueError, IndexError, KeyError, ImportError) as error:
            message = f"{folder / METADATA}: cannot be read as metadata of torch.distributed.checkpoint ({error})"
            raise UsageError(message) from error
        self.facts: Mapping[str, Facts] = facts
        self.files = (folder / METADATA, *(folder / Path(file).name for file in files))

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, put together of all its shards.

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
            If the files cannot be read.
        """
        import torch.distributed.checkpoint

        dcp: Any = torch.distributed.checkpoint
        facts = self.facts[name]
        tensors = {name: torch.empty(facts.shape, dtype=getattr(torch, facts.dtype))}
        try:
            with warnings.catch_warnings():
                # That torch.distributed is not initialised, and one process loads: it is what is wanted.
                warnings.simplefilter("ignore")
                dcp.load(tensors, storage_reader=_reader(self._folder, self._metadata))
        except (dcp.CheckpointException, OSError, RuntimeError, pickle.UnpicklingError, ValueError) as error:
            message = f"{self._folder}: tensor {name!r} cannot be read ({type(error).__name__}: {error})"
            raise UsageError(" ".join(message.split())) from error
        return tensors[name]

    def file_of(self, name: str) -> Path:
        """Name the folder of a tensor.

        Parameters
        ----------
        name
            One of `facts`.

        Returns
        -------
        Path
            The folder.
        """
        return self._folder


def _read_metadata(stream: IO[bytes]) -> Metadata:
    metadata: Metadata = _MetadataUnpickler(stream).load()
    return metadata


def _reader(folder: Path, metadata: Metadata) -> Any:
    import torch.distributed.checkpoint

    reader: Any = torch.distributed.checkpoint.FileSystemReader(folder)  # type: ignore[attr-defined]
    # torch would load the pickle.
    reader.read_metadata = lambda *args, **kwargs: metadata
    return reader
