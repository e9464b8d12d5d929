"""How much of the split is lost between checkpoints: ``python -m benchmarks.chord``; docs/checkpoints.md has its table.

One training, recorded at every update; then its parameters every 10, 20, 50, ... updates as if they were all that is
left of it, imported. All are replayed on the same examples. The totals are the same; how they are split over components
is what the path decides.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

import recorder
from benchmarks.report import machine, table
from examples.import_checkpoints import workload
from recorder import commandline
from recorder.__main__ import main as recorder_main
from recorder.runformat import Run
from reduce import open_cube
from reduce.__main__ import main as reduce_main
from replay.__main__ import main as replay_main

PROGRAM = "python -m benchmarks.chord"
WORKLOAD = "examples.import_checkpoints:workload"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """What one path gave.

    Parameters
    ----------
    name
        The path, and how far its checkpoints are apart.
    components
        Component to its LCA summed over the training, in nats.
    cells
        LCA of every layer and component that has parameters, likewise.
    total
        Of all, in nats.
    evaluations
        Gradient evaluations.
    steps
        Steps or intervals.
    missed
        How many of them missed the tolerance.
    worst
        The largest |residual|, in nats.
    """

    name: str
    components: dict[str, float]
    cells: tuple[float, ...]
    total: float
    evaluations: int
    steps: int
    missed: int
    worst: float


def measure(*, updates: int, apart: Sequence[int], probe: int, scratch: Path) -> list[Split]:
    """Train, record, import and replay.

    Parameters
    ----------
    updates
        Of the training.
    apart
        Updates between two checkpoints, for every run of path ``chord``.
    probe
        Examples that the loss is measured on.
    scratch
        A folder for the runs.

    Returns
    -------
    list of Split
        The recorded path first.
    """
    run = scratch / "recorded"
    with _quiet():
        _record(run, updates)
        splits = [_split(run, f"recorded, {updates} updates", probe)]
        recorded = Run(run)
        for distance in apart:
            source, chord = scratch / f"every-{distance}", scratch / f"chord-{distance}"
            source.mkdir()
            for t in range(0, updates + 1, distance):
                save_file(recorded.parameters(t), source / f"step{t}.safetensors")
            recorder_main(["import", str(source), "--run", str(chord), "--workload", WORKLOAD])
            splits.append(_split(chord, f"chord, every {distance}", probe))
    return splits


@contextlib.contextmanager
def _quiet() -> Any:
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def _record(run: Path, updates: int) -> None:
    torch.manual_seed(0)
    task = workload()
    model: nn.Module = task.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader: Any = torch.utils.data.DataLoader(task.indices("train"), batch_size=64, shuffle=True)
    with recorder.watch(model, optimizer, run=run, workload=WORKLOAD, updates=updates) as rec:
        done = 0
        while done < updates:
            for indices in loader:
                batch = task.batch(indices.tolist(), split="train", epoch=1)
                rec.batch(indices, batch)
                loss_sum, predictions = task.loss(model, batch)
                (loss_sum / predictions).backward()
                optimizer.step()
                optimizer.zero_grad()
                done += 1
                if done == updates:
                    break


def _split(run: Path, name: str, probe: int) -> Split:
    replay_main(
        ["--run", str(run), "--workload", WORKLOAD, "--workers", "1", "--loss-data", f"probe:{probe}", "--threads", "1"]
    )
    reduce_main(["--run", str(run)])
    with open_cube(run / "lca.nc") as cube:
        lca = cube["lca"].sel(data="probe").sum("step").where(cube["n_parameters"] > 0)
        by_component = lca.sum("layer", min_count=1)
        cells = lca.to_numpy().ravel()
        return Split(
            name=name,
            components={
                str(component): float(amount)
                for component, amount in zip(cube["component"].to_numpy(), by_component.to_numpy(), strict=True)
                if np.isfinite(amount)
            },
            cells=tuple(cells[np.isfinite(cells)]),
            total=float(lca.sum()),
            evaluations=int(cube["evaluations"].sum()),
            steps=cube.sizes["step"],
            missed=int((cube["status"] != 0).sum()),
            worst=float(np.abs(cube["residual"]).max()),
        )


def tabulate(splits: Sequence[Split]) -> str:
    """Write the numbers as Markdown.

    Parameters
    ----------
    splits
        As `measure` gives them.

    Returns
    -------
    str
        A column for every path. **components moved**: half of Σ |LCA - LCA of the recorded path| over components, to
        the total: the share of it that stands in another component. **cells moved**: the same over layers and
        components.
    """
    first = splits[0]
    rows = [[component, *(f"{split.components[component]:+.3f}" for split in splits)] for component in first.components]
    rows.append(["**total**", *(f"{split.total:+.3f}" for split in splits)])
    rows.append(
        ["components moved", *(_moved(split.components.values(), first.components.values(), first) for split in splits)]
    )
    rows.append(["cells moved", *(_moved(split.cells, first.cells, first) for split in splits)])
    rows.append(["gradients a step or interval", *(f"{split.evaluations / split.steps:.1f}" for split in splits)])
    rows.append(["worst \\|residual\\|", *(f"{split.worst:.0e}" for split in splits)])
    rows.append(["beyond tolerance", *(f"{split.missed} of {split.steps}" for split in splits)])
    return table(["LCA in nats, probe", *(split.name for split in splits)], rows)


def _moved(amounts: Any, of_first: Any, first: Split) -> str:
    difference = np.abs(np.array(list(amounts)) - np.array(list(of_first))).sum()
    return f"{50 * difference / abs(first.total):.1f} %"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv
        The arguments without the program; None for those of the process.

    Returns
    -------
    int
        The exit code.
    """
    parser = argparse.ArgumentParser(prog=PROGRAM, description="How much of the split is lost between checkpoints.")
    parser.add_argument("--updates", type=int, default=400, help="of the training (default %(default)s)")
    parser.add_argument(
        "--apart", type=int, nargs="+", default=[10, 20, 50, 100, 200], help="updates between checkpoints"
    )
    parser.add_argument("--probe", type=int, default=256, help="examples (default %(default)s)")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        splits = measure(updates=options.updates, apart=options.apart, probe=options.probe, scratch=Path(scratch))
    commandline.result(f"{machine()}\n\n{tabulate(splits)}")
    return commandline.DONE


if __name__ == "__main__":
    sys.exit(main())
