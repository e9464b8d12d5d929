"""The numbers as a page of Markdown: what was measured, what was to be reached, and where the time goes."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Iterable, Mapping

import torch

from benchmarks.overhead import Overhead
from benchmarks.storedshare import StoredShare
from recorder.estimate import STORED_SHARE
from recorder.recipe import current_recipe

TITLES = {
    "a": "60 million float32 parameters, 1.4 s a step off the host's cores",
    "b": "a language model of 12 layers on all cores, 4,000 tokens an update",
    "c": "Transformer-base in bfloat16 on a GPU",
    "d": "steps of a real language model from its update 500 on",
}

REACH = {"a": 1.03, "b": 1.10, "c": 1.03}
"""The most that the ratio of median step times should be."""

REACH_SPEED = 300
"""The least MB a second of one core to encode, and to decode."""


def machine() -> str:
    """Describe the machine and the day.

    Returns
    -------
    str
        One line.
    """
    day = datetime.datetime.now(tz=datetime.UTC).date()
    devices = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    cores = f"{current_recipe(torch.device('cpu'))['device_name']}, {os.cpu_count()} cores"
    return ", ".join([str(day), cores, *devices, f"Python {platform.python_version()}", f"torch {torch.__version__}"])


def text(results: Mapping[str, Overhead | list[StoredShare] | None]) -> str:
    """Write the page.

    Parameters
    ----------
    results
        Case to what it gave; None where it could not be measured.

    Returns
    -------
    str
        Markdown, without a last newline.
    """
    parts = ["# What recording every step costs", machine() + "."]
    overheads = {case: result for case, result in results.items() if case in REACH}
    if overheads:
        parts += ["## Steps with and without the recorder", _times(overheads), _titles(overheads), _costs(overheads)]
        parts += [_where(case, result) for case, result in overheads.items() if isinstance(result, Overhead)]
    for case, result in results.items():
        if isinstance(result, list):
            parts += [f"## Size and speed: {TITLES[case]}", _sizes(result)]
    return "\n\n".join(parts)


def _titles(results: Iterable[str]) -> str:
    return "; ".join(f"({case}) {TITLES[case]}" for case in results) + "."


def _times(results: Mapping[str, Overhead | list[StoredShare] | None]) -> str:
    rows: list[tuple[object, ...]] = []
    for case, result in results.items():
        if not isinstance(result, Overhead):
            rows.append((f"({case})", "no GPU here: not measured", *[""] * 3, f"≤ {REACH[case]}", "", "", ""))
            continue
        rows.append(
            (
                f"({case})",
                result.steps,
                f"{result.step:.4g} s",
                f"{result.recorded_step:.4g} s",
                f"**{result.ratio:.3f}**",
                f"≤ {REACH[case]}: {verdict(result.ratio <= REACH[case])}",
                f"{result.whole_ratio:.3f}",
                f"{result.saved_ratio:.3f}",
                "yes" if result.same else "NO",
            )
        )
    head = (
        "case", "steps", "median step", "recorded", "ratio", "reach", "whole ratio", "`save_file` ratio", "same bits"
    )  # fmt: skip
    return table(head, rows)


def _costs(results: Mapping[str, Overhead | list[StoredShare] | None]) -> str:
    rows = [
        (
            f"({case})",
            f"{result.raw_bytes / 1e6:.4g} MB",
            f"{result.stored_bytes / 1e6:.4g} MB",
            f"{result.stored_bytes / result.raw_bytes:.3f}",
            f"{result.waited * 1e3:.3g} ms",
            f"{result.hooks * 1e3:.3g} ms",
            f"{result.writer_cpu * 1e3:.3g} ms",
            f"{result.drain:.3g} s",
        )
        for case, result in results.items()
        if isinstance(result, Overhead)
    ]
    head = (
        "case", "parameters", "stored a step", "share", "training waited", "recorder's calls", "writer's core time",
        "drain at the end",
    )  # fmt: skip
    return table(head, rows)


def _where(case: str, result: Overhead) -> str:
    more = (result.recorded_step - result.step) * 1e3
    calls, waited = result.hooks * 1e3, result.waited * 1e3
    if more > calls:
        found = (
            f"A recorded step takes {more:.3g} ms longer, {calls:.3g} of them in the recorder's own calls; the other "
            f"{more - calls:.3g} are the training's own work, slower beside the writer's thread."
        )
    else:
        found = (
            f"A recorded step takes {more:+.3g} ms, less than the {calls:.3g} ms that it is in the recorder's calls: "
            "the difference is smaller than what the machine does by itself."
        )
    return (
        f"({case}) {found} Of the calls, the copy above all, {waited:.3g} ms are waiting for the writer, whose thread "
        f"takes {result.writer_cpu * 1e3:.3g} ms of a core. All threads together use {result.cpu * 1e3:.4g} ms of core "
        f"time a step without the recorder and {result.recorded_cpu * 1e3:.4g} with it."
    )


def _sizes(results: Iterable[StoredShare]) -> str:
    rows = [
        (
            result.dtype,
            result.steps,
            f"{result.raw_bytes / 1e6:.3g} MB",
            f"**{result.share:.3f}**",
            f"≤ {STORED_SHARE[result.dtype]}: {verdict(result.share <= STORED_SHARE[result.dtype])}",
            f"{result.encode:.0f}",
            f"{result.decode:.0f}",
            f"≥ {REACH_SPEED}: {verdict(min(result.encode, result.decode) >= REACH_SPEED)}",
            f"{result.write:.0f}",
        )
        for result in results
    ]
    head = (
        "dtype", "steps", "parameters", "share", "reach", "encode", "decode", "reach", "coding, checksums, writing"
    )  # fmt: skip
    return table(head, rows) + "\n\nSpeeds in MB of parameters a second of one core's time."


def verdict(reached: bool) -> str:
    """Say whether something was reached.

    Parameters
    ----------
    reached
        Whether it was.

    Returns
    -------
    str
        For a table.
    """
    return "reached" if reached else "NOT reached"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Write a table of Markdown.

    Parameters
    ----------
    head
        Names of the columns.
    rows
        Their cells.

    Returns
    -------
    str
        Without a last newline.
    """
    lines = [tuple(head), ("---",) * len(tuple(head)), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
