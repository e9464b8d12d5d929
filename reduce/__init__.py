"""Add shards up into the cube: loss data, step, layer, component and head.

``reduce.open_cube`` opens a cube; see `reduce.cube.open_cube`. The package is lazy: importing it imports nothing
else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reduce.cube import open_cube

__all__ = ["open_cube"]


def __getattr__(name: str) -> Any:
    if name == "open_cube":
        from reduce.cube import open_cube

        return open_cube
    message = f"module 'reduce' has no attribute {name!r}"
    raise AttributeError(message)
