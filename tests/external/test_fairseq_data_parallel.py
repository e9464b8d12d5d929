"""Stock fairseq-train in two processes of the CPU, recorded: started by torchrun, and by fairseq itself."""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from recorder import durable
from recorder.__main__ import main
from recorder.loading import load_workload
from recorder.runformat import Run
from recorder.verify import verify
from replay.selfcheck import check_update

if importlib.util.find_spec("fairseq") is None:
    pytest.skip("needs fairseq 0.12.2", allow_module_level=True)

pytestmark = [pytest.mark.fairseq, pytest.mark.cluster]

UPDATES = 3
PROCESSES = 2

_STOCK = "import recorder.integrations.fairseq_import, fairseq_cli.train; fairseq_cli.train.cli_main()"

# fairseq starts as many processes as there are GPUs, and none on a machine without one.
_WITH_DEVICES = f"""
import sys, torch
torch.cuda.device_count = lambda: {PROCESSES}
from recorder.__main__ import main
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def _start(program: Sequence[str], **variables: str) -> subprocess.Popen[str]:
    search = os.pathsep.join([str(Path(durable.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *program],
        env=environment | {"GLOO_SOCKET_IFNAME": "lo"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _wait(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[str, str]]:
    outputs = []
    try:
        for process in processes:
            outputs.append(process.communicate(timeout=240))
            assert process.returncode == 0, outputs[-1][1][-4000:]
    finally:
        for process in processes:
            process.kill()
    return outputs


def _torchrun(folder: Path, program: Sequence[str]) -> list[str]:
    # torchrun itself finds a free port, and ends both processes if one fails.
    return [
        *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES), "--log-dir", str(folder)),
        *program,
    ]


@pytest.fixture(scope="module")
def runs(arguments: Mapping[str, tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The translation model trained by stock fairseq, and recorded, by torchrun and by fairseq's own processes."""
    folder = tmp_path_factory.mktemp("fairseq-two-processes")
    shared = [*arguments["translation"], "--max-update", str(UPDATES), "--distributed-backend", "gloo"]
    # torch's own DDP takes no model on the CPU from fairseq, which always names a GPU for it.
    shared += ["--ddp-backend", "legacy_ddp"]
    stock = folder / "stock.py"
    stock.write_text(_STOCK)
    own = folder / "own.py"
    own.write_text(_WITH_DEVICES)
    recorded = ["fairseq-train", "--record-segment-steps", "2", "--record-dir"]
    training = {
        "stock": _torchrun(folder, [str(stock), *shared, "--save-dir", str(folder / "stock")]),
        "torchrun": _torchrun(
            folder,
            [
                *("-m", "recorder", *recorded, str(folder / "torchrun" / "run"), *shared),
                *("--save-dir", str(folder / "torchrun")),
            ],
        ),
        "own": [
            *(str(own), *recorded, str(folder / "own" / "run"), *shared, "--save-dir", str(folder / "own")),
            *("--distributed-world-size", str(PROCESSES)),
        ],
    }
    outputs: dict[str, tuple[str, str]] = {}
    for name, program in training.items():
        (outputs[name],) = _wait([_start(program)])
    return {name: {"folder": folder / name, "output": output} for name, output in outputs.items()}


def checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        model: dict[str, torch.Tensor] = torch.load(folder / "checkpoint_last.pt", weights_only=True)["model"]
    return {name: tensor for name, tensor in model.items() if not name.endswith("._float_tensor")}


each_start = pytest.mark.parametrize("start", ["torchrun", "own"])


@each_start
def test_the_training_of_two_processes_ends_bit_identical_to_stock_fairseq(runs: dict[str, Any], start: str) -> None:
    recorded, stock = checkpoint(runs[start]["folder"]), checkpoint(runs["stock"]["folder"])
    assert list(recorded) == list(stock)
    assert [name for name in stock if not torch.equal(recorded[name], stock[name])] == []
    run = Run(runs[start]["folder"] / "run")
    assert (run.manifest.state, run.manifest.attempt.processes) == ("complete", PROCESSES)
    assert run.steps == list(range(UPDATES))
    final = run.parameters(UPDATES)
    assert [name for name in final if not torch.equal(final[name], stock[name])] == []
    assert verify(run.path).damages == ()


@each_start
def test_the_examples_of_an_update_are_those_of_both_processes(runs: dict[str, Any], start: str) -> None:
    run = Run(runs[start]["folder"] / "run")
    epochs: dict[int, list[int]] = {}
    taking_part: list[set[int]] = []
    for t in run.steps:
        step = run.step(t)
        ranks = [micro_batch.rank for micro_batch in step.micro_batches]
        assert ranks == sorted(ranks)
        taking_part.append(set(ranks))
        for micro_batch in step.micro_batches:
            epochs.setdefault(step.epoch, []).extend(micro_batch.indices.tolist())
            padding = 1
            assert micro_batch.predictions == int((micro_batch.batch()["target"] != padding).sum())
    # Five batches for two processes do not come out even: where process 1 has none left, fairseq lets it repeat one
    # without a gradient. Each example of the epoch is recorded once.
    assert {0, 1} in taking_part
    assert {0} in taking_part
    assert sorted(epochs[1]) == list(range(300))


@each_start
def test_one_line_tells_the_result_once(runs: dict[str, Any], start: str) -> None:
    output, errors = runs[start]["output"]
    assert [line for line in output.splitlines() if line.endswith("/run")] == [str(runs[start]["folder"] / "run")]
    assert errors.count(f"python -m recorder: recorded steps 0-{UPDATES - 1} (complete)") == 1


@each_start
def test_the_recorded_updates_of_both_processes_come_out_in_one(runs: dict[str, Any], start: str) -> None:
    run = Run(runs[start]["folder"] / "run")
    report = check_update(run, load_workload(run.path, run.manifest, None, None), data=True)
    assert report.text.startswith("steps 0, 1 done again: losses and parameters are the recorded ones")


@pytest.mark.parametrize(
    "flags",
    [("--ddp-backend", "fully_sharded"), ("--zero-sharding", "os"), ("--ddp-backend", "slowmo"), ("--use-bmuf",)],
)
def test_a_training_without_whole_parameters_in_a_process_is_refused(
    arguments: Mapping[str, tuple[str, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    given = [*arguments["translation"], *flags, "--save-dir", str(tmp_path / "out")]
    assert main(["fairseq-train", "--record-dir", str(tmp_path / "run"), *given]) == 2
    said = capsys.readouterr().err
    assert f"{' '.join(flags)}: no process of this training has all parameters" in said
    assert "Train with --ddp-backend pytorch_ddp or legacy_ddp" in said
    assert not (tmp_path / "run").exists()
