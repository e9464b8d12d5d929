"""Record every optimizer step of a training: parameters, batch indices, losses.

``recorder.watch`` records a training loop; see `recorder.session.watch`.
The package is lazy: importing it, or its torch-free ground floor, does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recorder.session import watch

__all__ = ["watch"]


def __getattr__(name: str) -> Any:
    if name == "watch":
        from recorder.session import watch

        return watch
    message = f"module 'recorder' has no attribute {name!r}"
    raise AttributeError(message)
