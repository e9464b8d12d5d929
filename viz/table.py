"""The table of totals: LCA by component and run beside the measured change of the loss and the worst residual.

One `Table` of text and numbers; a terminal, a Markdown file and a CSV file each show the same rows.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TextIO

import xarray as xr
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from viz import select, wording

CORNER = "LCA"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Parameters
    ----------
    name
        What it holds.
    units
        Of its cells; empty where they have none.
    cells
        One for every column; None where a run has nothing to say, such as a component that it lacks.
    form
        Format specification by which people are shown a number; files for machines hold all digits.
    closes
        Whether a part of the table ends here.
    """

    name: str
    units: str
    cells: tuple[float | int | str | None, ...]
    form: str = "+.6f"
    closes: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """The table of totals.

    Parameters
    ----------
    columns
        Run and loss data of every column.
    rows
        From top to bottom.
    notes
        What a reader must know of the columns.
    """

    columns: tuple[tuple[str, str], ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def totals_table(cubes: Mapping[str, xr.Dataset]) -> Table:
    """Tabulate the totals of every run and loss data.

    Parameters
    ----------
    cubes
        Cubes by run label.

    Returns
    -------
    Table
        A row for every component that any run has, in the cube's order; ``total``, their sum; the ``measured ΔL``
        it must equal and the difference; the worst |residual| of a step, and which; the path; the number of
        steps by status. Amounts in the cube's units, nats.
    """
    names = select.loss_data(cubes)
    columns = {
        (label, data): select.totals(cube, data)
        for label, cube in cubes.items()
        for data in names
        if data in cube["data"].to_numpy()
    }
    every = tuple(columns.values())
    units = every[0].units if every else ""
    order = dict.fromkeys(str(name) for cube in cubes.values() for name in cube["component"].to_numpy())
    present = [name for name in order if any(name in totals.by_component for totals in every)]
    flags = dict.fromkeys(name for totals in every for name in totals.statuses)
    rows = [
        Row(
            name=name,
            units=units,
            cells=tuple(totals.by_component.get(name) for totals in every),
            closes=name == present[-1],
        )
        for name in present
    ]
    rows += [
        Row(name="total", units=units, cells=tuple(totals.total for totals in every)),
        Row(name="measured ΔL", units=units, cells=tuple(totals.measured for totals in every)),
        Row(
            name="total \N{MINUS SIGN} measured ΔL",
            units=units,
            cells=tuple(totals.total - totals.measured for totals in every),
            form="+.2e",
            closes=True,
        ),
        Row(
            name="worst |residual| of a step",
            units=units,
            cells=tuple(totals.worst_residual for totals in every),
            form=".2e",
        ),
        Row(name="at step", units="", cells=tuple(totals.worst_step for totals in every), form="d", closes=True),
        Row(name="path", units="", cells=tuple(totals.path for totals in every), form="s"),
        Row(name="steps", units="", cells=tuple(totals.steps for totals in every), form="d"),
    ]
    rows += [
        Row(
            name=f"steps {flag.replace('_', ' ')}",
            units="",
            cells=tuple(totals.statuses.get(flag) for totals in every),
            form="d",
        )
        for flag in flags
    ]
    notes = (
        *(f"{data}: the loss is {wording.meaning(data)}." for data in names),
        *wording.of_paths(totals.path for totals in every),
    )
    return Table(columns=tuple(columns), rows=tuple(rows), notes=notes)


def to_csv(table: Table) -> str:
    """Write the table for machines.

    Parameters
    ----------
    table
        From `totals_table`.

    Returns
    -------
    str
        Comma-separated values; the header names ``run, loss data`` for every column; numbers with all their digits,
        an empty field where there is nothing.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([CORNER, "units", *(f"{run}, {data}" for run, data in table.columns)])
    for row in table.rows:
        writer.writerow([row.name, row.units, *("" if cell is None else cell for cell in row.cells)])
    return stream.getvalue()


def to_markdown(table: Table) -> str:
    """Write the table for a README or a paper's draft.

    Parameters
    ----------
    table
        From `totals_table`.

    Returns
    -------
    str
        A Markdown table, numbers to the right, and the notes beneath it.
    """
    lines = [
        [CORNER, "units", *(f"{run}, {data}" for run, data in table.columns)],
        ["---", "---", *("---:" for _ in table.columns)],
        *([row.name, row.units, *_shown(row)] for row in table.rows),
    ]
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([*body, "", *table.notes]) + "\n"


def show(table: Table, stream: TextIO) -> None:
    """Print the table for a person, aligned and never cut off; without colours where nobody looks.

    Parameters
    ----------
    table
        From `totals_table`.
    stream
        Where to; standard output, as the table is a result.
    """
    drawn = RichTable(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    drawn.add_column(Text(CORNER), no_wrap=True)
    drawn.add_column(Text("units"), no_wrap=True)
    for run, data in table.columns:
        drawn.add_column(Text(f"{run}\n{data}", justify="right"), justify="right", no_wrap=True)
    for row in table.rows:
        cells: Sequence[str] = [row.name, row.units, *_shown(row)]
        drawn.add_row(
            *(Text(cell) for cell in cells),
            style="bold" if row.name == "total" else None,
            end_section=row.closes,
        )
    console = Console(file=stream)
    # A file or a pipe has no width; a narrow terminal may wrap lines, but no digit gets lost.
    natural = Measurement.get(console, console.options.update(max_width=100_000), drawn).maximum
    console.width = max(natural, console.width)
    console.print(drawn)
    for note in table.notes:
        console.print(Text(note), soft_wrap=True)


def _shown(row: Row) -> list[str]:
    return ["" if cell is None else format(cell, row.form).replace("+nan", "nan") for cell in row.cells]
