"""``python -m viz``: every figure and the table of totals for one run or several."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import xarray as xr

from recorder.commandline import DONE, guarded, result
from recorder.errors import UsageError
from reduce.cube import open_cube
from viz import figures, saving, select, table
from viz.sources import sources

PROGRAM = "python -m viz"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        Arguments without the program's name; by default those of this process.

    Returns
    -------
    int
        The exit code: 0 done, 1 failed, 2 wrong usage.
    """
    arguments = _parser().parse_args(argv)
    return guarded(PROGRAM, lambda: _command(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Draw the paper's Figure 1, the check that the books balance, and the table of totals. "
        "The table and the paths of the written files go to standard output. Cubes are only read.",
    )
    parser.add_argument(
        "--run",
        action="append",
        required=True,
        metavar="[LABEL=]RUN",
        help="a run's folder, whose cube is RUN/lca.nc, or a cube's .nc file; give it again for more runs",
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the files (default: RUN/figures for one run, else ./figures)"
    )
    parser.add_argument(
        "--format",
        action="append",
        metavar="|".join(saving.FORMATS),
        help="file format of the figures; give it again for more (default: png and pdf)",
    )
    return parser


def _command(arguments: argparse.Namespace) -> int:
    kinds = list(dict.fromkeys(arguments.format or ("png", "pdf")))
    unknown = [kind for kind in kinds if kind not in saving.FORMATS]
    if unknown:
        message = f"--format: expected one of {', '.join(saving.FORMATS)}, found {unknown[0]!r}"
        raise UsageError(message)
    found = sources(arguments.run)
    out = arguments.out or (found[0].cube.parent / "figures" if len(found) == 1 else Path("figures"))
    with contextlib.ExitStack() as stack:
        cubes = {source.label: stack.enter_context(open_cube(source.cube)) for source in found}
        _draw(cubes, out, kinds)
    return DONE


def _draw(cubes: Mapping[str, xr.Dataset], out: Path, kinds: Sequence[str]) -> None:
    # A user names loss data; what cannot stand in a file's name becomes "_".
    files = {data: re.sub(r"[^\w.-]", "_", data) for data in select.loss_data(cubes)}
    drawn = {f"figure1-{file}": figures.plot_figure1(cubes, data=data) for data, file in files.items()}
    drawn["balance"] = figures.plot_balance(cubes)
    totals = table.totals_table(cubes)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        message = f"--out: expected a folder, found a file: {out}"
        raise UsageError(message) from error
    written = []
    for name, figure in drawn.items():
        for kind in kinds:
            written.append(out / f"{name}.{kind}")
            saving.save_figure(figure, written[-1], kind)
    for name, text in (("table.csv", table.to_csv(totals)), ("table.md", table.to_markdown(totals))):
        written.append(out / name)
        saving.save_text(text, written[-1])
    table.show(totals, sys.stdout)
    for path in written:
        result(str(path))


if __name__ == "__main__":
    sys.exit(main())
