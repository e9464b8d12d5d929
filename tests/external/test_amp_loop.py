"""A plain loop with torch.amp: what autocast computed is done again under it, the ledger is kept in float32."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import torch

from recorder.errors import MismatchError
from recorder.runformat import Run
from replay.selfcheck import check_update
from tests.external.whole_way import go_the_whole_way

# Which component a parameter belongs to is another matter.
pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")

example = importlib.import_module("examples.amp_loop")


def test_the_loop_of_the_example_goes_the_whole_way_with_balanced_books(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    go_the_whole_way("amp_loop.py", "runs/amp", run, capsys, steps=example.UPDATES)
    assert Run(run).manifest.recipe["autocast"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_recorded_losses_come_out_again_under_autocast(tmp_path: Path, dtype: torch.dtype) -> None:
    example.train(str(tmp_path / "run"), dtype=dtype, updates=2)
    run = Run(tmp_path / "run")
    name = str(dtype).removeprefix("torch.")
    assert run.manifest.recipe["autocast"] == name
    report = check_update(run, example.workload(), data=True)
    assert report.text.startswith(
        f"step 0 done again: losses and parameters are the recorded ones within rounding of {name}"
    )
    assert report.text.endswith(name)  # nothing is left out


def test_of_an_autocast_that_was_not_seen_the_self_check_tells_by_how_much_losses_differ_and_why(
    tmp_path: Path,
) -> None:
    example.train(str(tmp_path / "run"), updates=1)
    run = Run(tmp_path / "run")
    recipe = {key: value for key, value in run.manifest.recipe.items() if key != "autocast"}
    run.manifest = dataclasses.replace(run.manifest, recipe=recipe)
    with pytest.raises(MismatchError, match=re.escape("torch.autocast that the recorder did not see")) as found:
        check_update(run, example.workload(), data=True)
    pattern = r"a loss of (\S+) nats over 32 predictions, .* gives (\S+) \(difference (\S+), allowed"
    numbers = re.search(pattern, str(found.value))
    assert numbers is not None
    recorded, again, difference = map(float, numbers.groups())
    assert recorded == run.step(0).micro_batches[0].loss_sum
    assert abs(recorded - again) == pytest.approx(difference, rel=0.01)


def test_updates_that_the_scaler_skips_are_no_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # So large a scale overflows in float16 until it has been halved a few times.
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: scaler(device, 2.0**24, enabled=enabled))
    example.train(str(tmp_path / "run"), dtype=torch.float16, updates=12)
    run = Run(tmp_path / "run")
    assert 0 < len(run.steps) < 12
    assert all(len(run.step(t).micro_batches) == 2 for t in run.steps)
    check_update(run, example.workload(), data=True)
