"""Make tests/golden/run-v1-chord (``python -m tests.golden.make_chord_v1 FOLDER``): it must open for ever.

FOLDER/run is the run, of written files alone, for a link would lead out of it; FOLDER/values.json is what it must read
as.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from recorder.__main__ import main as recorder_main
from tests import checkpoints
from tests.recorder.importing.wrapped import normed

STEPS = (0, 10, 25)
VALUES_FILE = "values.json"


def states() -> dict[int, checkpoints.State]:
    """States of a small net with a buffer that changes and a parameter that never does."""
    model = normed().model()
    found = {}
    for t in STEPS:
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                if number:  # the first one stays
                    parameter.add_(torch.linspace(0.5, t, parameter.numel()).reshape(parameter.shape))
        model.get_buffer("norm.running_mean").add_(t)
        found[t] = checkpoints.copied(model)
    return found


def make(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Make the run, and return what each tensor of each checkpoint is."""
    of = states()
    source = checkpoints.as_fairseq(folder / "source", of)
    workload = "tests.recorder.importing.wrapped:normed"
    assert recorder_main(["import", str(source), "--run", str(folder / "run"), "--workload", workload]) == 0
    return {
        str(t): {name: tensor.double().flatten().tolist() for name, tensor in state.items()} for t, state in of.items()
    }


def main() -> None:
    folder = Path(sys.argv[1])
    values = make(folder)
    (folder / VALUES_FILE).write_text(json.dumps(values, indent=1) + "\n")
    for file in (folder / "source").iterdir():
        file.unlink()
    (folder / "source").rmdir()
    (folder / "run" / ".lock").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
