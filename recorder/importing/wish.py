"""What the user asks an import for."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What the user asks for.

    Parameters
    ----------
    source
        A folder or a list of checkpoints; None where all are named.
    run
        The run's folder.
    workload
        ``module:function``, as the manifest keeps it.
    kind
        One of `recorder.importing.kinds.KINDS`; None to find out.
    named
        Checkpoints by number, each ``N=PATH``.
    prefix
        What names have before the model's; None to find out.
    ignored
        Patterns of names of tensors that the model need not have.
    """

    source: Path | None
    run: Path
    workload: str
    kind: str | None = None
    named: tuple[str, ...] = ()
    prefix: str | None = None
    ignored: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Names the source in messages."""
        return "--step" if self.source is None else str(self.source)
