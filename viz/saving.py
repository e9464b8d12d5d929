"""Put figures and text on disk: whole or not at all, and the same bytes for the same input."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from recorder import durable
from viz import style

# What matplotlib would stamp into a file by itself: the time, and who wrote it.
METADATA: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}
FORMATS = tuple(METADATA)


def save_figure(figure: Figure, path: Path, kind: str) -> None:
    """Save a figure.

    Parameters
    ----------
    figure
        From `viz.figures`.
    path
        Where to; an existing file is replaced.
    kind
        One of `FORMATS`.
    """
    with style.styled(), durable.replacing(path) as temporary:
        figure.savefig(temporary, format=kind, metadata=METADATA[kind])


def save_text(text: str, path: Path) -> None:
    """Save text as UTF-8.

    Parameters
    ----------
    text
        The whole content.
    path
        Where to; an existing file is replaced.
    """
    with durable.replacing(path) as temporary:
        temporary.write_bytes(text.encode())
