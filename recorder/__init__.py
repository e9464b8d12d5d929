"""Record every optimizer step of a training: parameters, batch indices, losses.

``recorder.watch`` records a training loop, see `recorder.session.watch`; ``recorder.announced`` tells it the batches of
a data loader, see `recorder.announcing`. The package is lazy: importing it, or its torch-free ground floor, does not
import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recorder.announcing import RecordedBatchSampler, announced
    from recorder.session import watch

__all__ = ["RecordedBatchSampler", "announced", "watch"]

_ROOMS = {
    "RecordedBatchSampler": "recorder.announcing",
    "announced": "recorder.announcing",
    "watch": "recorder.session",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        message = f"module 'recorder' has no attribute {name!r}"
        raise AttributeError(message)
    return getattr(importlib.import_module(_ROOMS[name]), name)
