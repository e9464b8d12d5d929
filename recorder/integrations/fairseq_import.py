"""Make ``import fairseq`` work on Python 3.11 and newer.

fairseq 0.12.2 uses dataclass instances as defaults of dataclass fields. Since Python 3.11 `dataclasses` refuses
a default that is not hashable, and a dataclass with ``eq=True`` is not. While fairseq is imported, and only then,
such dataclasses keep their inherited ``__hash__``. Turning the defaults into factories instead breaks omegaconf.

Importing this module imports fairseq; so a spawned worker that unpickles anything from a module which imports this one
at its top has fairseq too.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import types
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np

from recorder.errors import LossledgerError

SUPPORTED_VERSION = "0.12.2"

# (unsafe_hash, eq, frozen, has_explicit_hash): the case in which `dataclasses` sets ``__hash__ = None``.
_EQUALITY_WITHOUT_HASH = (False, True, False, False)


@contextmanager
def hashable_dataclasses() -> Iterator[None]:
    """Let dataclasses made inside the block keep a hash, so that their instances pass as field defaults.

    Yields
    ------
    None
        While the block runs.

    Raises
    ------
    LossledgerError
        If this Python's `dataclasses` no longer has the private table that this relies on.
    """
    table = getattr(dataclasses, "_hash_action", None)
    if not isinstance(table, dict) or _EQUALITY_WITHOUT_HASH not in table:
        message = (
            "fairseq 0.12.2 cannot be imported: this Python's `dataclasses` has no `_hash_action` table to adapt. "
            "Use Python 3.11, 3.12 or 3.13."
        )
        raise LossledgerError(message)
    before = table[_EQUALITY_WITHOUT_HASH]
    table[_EQUALITY_WITHOUT_HASH] = None
    try:
        yield
    finally:
        table[_EQUALITY_WITHOUT_HASH] = before


@contextmanager
def _untouched_root_logger() -> Iterator[None]:
    # Modules of fairseq call logging.basicConfig(stream=sys.stdout) when imported, and standard output is for
    # results. basicConfig does nothing where the root logger has a handler.
    handler = logging.NullHandler()
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


def _import_fairseq() -> ModuleType:
    try:
        with hashable_dataclasses(), _untouched_root_logger():
            module = importlib.import_module("fairseq")
    except ModuleNotFoundError as error:
        message = (
            f"fairseq cannot be imported ({error}). Install it with: pip install 'lossledger[fairseq]' "
            f"&& pip install --no-deps fairseq=={SUPPORTED_VERSION}"
        )
        raise LossledgerError(message) from error
    return module


def _restore_numpy_names() -> None:
    # fairseq still says np.compat.long (--sample-break-mode eos) and np.int (masks without overlap); numpy 2 does not.
    for name, value in {"compat": types.SimpleNamespace(long=int), "int": int}.items():
        if name not in vars(np):
            setattr(np, name, value)


_restore_numpy_names()
fairseq = _import_fairseq()
