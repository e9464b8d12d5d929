from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import recorder
from recorder.__main__ import main
from recorder.codec import bit_dtype
from recorder.estimate import STORED_SHARE, Estimate, estimate
from recorder.selection import StepSelection
from tests.cases import TinyTransformer

# The small models below have names that no naming rule knows.
pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")


def estimated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["estimate", "--json", *arguments]) == 0
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    return facts


# --- What it says ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("updates", "steps", "expected"),
    [
        ("125k", "all", 125_000),
        ("1000", "0:100,100::10", 190),
        ("1000", "0:50", 50),
        (None, "0:100:2", 50),
        (None, "log:1:1000:4:2", 8),
        (None, "all", None),
    ],
)
def test_the_number_of_steps_is_that_of_the_selection(
    capsys: pytest.CaptureFixture[str], updates: str | None, steps: str, expected: int | None
) -> None:
    chosen = [] if updates is None else ["--updates", updates]
    facts = estimated(capsys, "--parameters", "60M", "--steps", steps, *chosen)
    assert facts["steps"] == expected
    assert facts["total_bytes"] == (None if expected is None else pytest.approx(expected * facts["step_bytes"]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_step_takes_less_than_its_raw_parameters_by_the_share_of_their_dtype(
    capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    facts = estimated(capsys, "--parameters", "1e6", "--dtype", dtype)
    assert facts["raw_bytes"] == 10**6 * bit_dtype(dtype).itemsize
    share = facts["step_bytes"] / facts["raw_bytes"]
    assert STORED_SHARE[dtype] <= share <= STORED_SHARE[dtype] + 0.02


def test_the_seconds_grow_with_the_parameters_and_are_no_guess_of_zero() -> None:
    small, large = (estimate({"float32": size}, selection=StepSelection("all")) for size in (10**6, 10**9))
    assert 0 < small.copy_seconds < large.copy_seconds
    assert 0 < small.coding_seconds < large.coding_seconds


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (1.0, 1.01),  # coding is done before the next step
        (0.2, 2.0),  # the next step waits for it
        (0.4, 1.025),
    ],
)
def test_the_slowdown_counts_coding_only_as_far_as_it_takes_longer_than_the_step(step: float, expected: float) -> None:
    cost = Estimate(raw_bytes=1, step_bytes=1.0, steps=None, coding_seconds=0.4, copy_seconds=0.01, free_bytes=None)
    assert cost.slowdown(step) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("free", "told"),
    [(10**14, "(100 TB free)"), (10**10, "(more than the 10 GB that are free: select fewer steps, or set a quota)")],
)
def test_the_disk_is_told_to_be_too_small_before_it_is_full(
    free: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("recorder.estimate.shutil.disk_usage", lambda folder: usage._replace(free=free))
    assert main(["estimate", "--parameters", "65M", "--updates", "125k"]) == 0
    assert f" 18.2 TB for 125,000 steps {told};" in capsys.readouterr().out


def test_a_person_reads_bytes_and_the_slowdown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = str(tmp_path / "not" / "there" / "yet")
    arguments = ["--parameters", "65M", "--updates", "125k", "--step-seconds", "0.5", "--dir", folder]
    assert main(["estimate", *arguments]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("a step has 260 MB of parameters and takes about 146 MB on the disk, 18.2 TB for 125,000")
    assert second.startswith("expected slowdown of a training of 0.5 s a step: a factor of ")
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --parameters"),
        (["--parameters", "many"], "expected a number such as 60M or 2.5GB, not 'many'"),
        (["--parameters", "1", "--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_the_reason(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["estimate", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_a_selection_that_makes_no_sense_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--parameters", "1M", "--steps", "9:3"]) == 2
    assert "expected STOP above START" in capsys.readouterr().err


# --- Whether it is true ---------------------------------------------------------------------------------------------

WARM_UP, RECORDED = 60, 64


def language_model() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    model = TinyTransformer(vocabulary=512, width=96, heads=4, layers=2)

    def loss() -> torch.Tensor:
        tokens = torch.randint(512, (16, 16)).sort()[0]
        return functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss


def autoencoder() -> tuple[nn.Module, Callable[[], torch.Tensor]]:
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256))

    def loss() -> torch.Tensor:
        examples = torch.randn(32, 256)
        return functional.mse_loss(model(examples), examples)

    return model, loss


@pytest.mark.parametrize(("make", "rate"), [(language_model, 1e-3), (autoencoder, 1e-4)])
def test_the_estimated_size_is_within_a_fifth_of_what_a_run_takes(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[], tuple[nn.Module, Callable[[], torch.Tensor]]],
    rate: float,
) -> None:
    torch.manual_seed(0)
    model, loss = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    selection = f"{WARM_UP}:{WARM_UP + RECORDED}"
    with recorder.watch(model, optimizer, run=tmp_path / "run", steps=selection) as rec:
        for step in range(WARM_UP + RECORDED):
            rec.batch([step])
            loss().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
    taken = sum(file.stat().st_size for file in (tmp_path / "run").rglob("*") if file.is_file())
    parameters = sum(tensor.numel() for tensor in model.parameters())
    assert parameters > 150_000
    facts = estimated(capsys, "--parameters", str(parameters), "--steps", selection)
    assert facts["total_bytes"] == pytest.approx(taken, rel=0.2)
