"""Small fairseq trainings that the tests of this folder share, each done with the recorder and without it."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from recorder import durable

TASKS = ("translation", "causal", "masked")

_STOCK = """
import json, sys
import recorder.integrations.fairseq_import
import fairseq_cli.train
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["fairseq-train", *arguments]
    fairseq_cli.train.cli_main()
"""

_PREPROCESS = """
import json, sys
import recorder.integrations.fairseq_import
from fairseq_cli import preprocess
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["fairseq-preprocess", *arguments]
    preprocess.cli_main()
"""

_SHARED = [
    *("--optimizer", "adam", "--adam-betas", "(0.9,0.98)", "--lr", "0.01", "--clip-norm", "1.0"),
    *("--lr-scheduler", "inverse_sqrt", "--warmup-updates", "2", "--dropout", "0.1"),
    *("--update-freq", "2", "--max-update", "4", "--seed", "7", "--cpu", "--num-workers", "0"),
    *("--disable-validation", "--no-epoch-checkpoints", "--no-progress-bar"),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """One training of the three, done twice: 4 updates of 2 micro-batches, over the border of epochs 1 and 2."""

    task: str
    arguments: tuple[str, ...]
    """Of fairseq-train, without the place of the checkpoints."""
    run: Path
    recorded_checkpoint: Path
    stock_checkpoint: Path
    output: str
    errors: str


def _sentence(words: random.Random, language: str) -> str:
    return " ".join(f"{language}{words.randrange(20)}" for _ in range(words.randint(3, 9)))


def _call(program: list[str]) -> subprocess.Popen[str]:
    # One thread: the machine is shared, and the trainings run side by side.
    search = os.pathsep.join([str(Path(durable.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, *program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _wait(process: subprocess.Popen[str]) -> tuple[str, str]:
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-4000:]
    return output, errors


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 made-up sentence pairs, binarised by fairseq-preprocess into the folders mt and lm."""
    folder = tmp_path_factory.mktemp("fairseq-data")
    words = random.Random(1)
    for split, lines in {"train": 300, "valid": 30}.items():
        for language in ("en", "de"):
            text = "".join(f"{_sentence(words, language)}\n" for _ in range(lines))
            (folder / f"{split}.{language}").write_text(text)
    prefixes = [argument for split in ("train", "valid") for argument in (f"--{split}pref", str(folder / split))]
    translation = ["--source-lang", "en", "--target-lang", "de", "--joined-dictionary", *prefixes]
    only_source = ["--only-source", "--trainpref", str(folder / "train.en"), "--validpref", str(folder / "valid.en")]
    runs = [
        [*translation, "--destdir", str(folder / "mt")],
        [*only_source, "--destdir", str(folder / "lm")],
    ]
    _wait(_call(["-c", _PREPROCESS, json.dumps(runs)]))
    return folder


@pytest.fixture(scope="session")
def arguments(data: Path) -> dict[str, tuple[str, ...]]:
    """The arguments of fairseq-train for each of `TASKS`: width 16, 2 layers, 8 heads."""

    def stack(name: str) -> list[str]:
        return [
            *(f"--{name}-layers", "2", f"--{name}-embed-dim", "16", f"--{name}-ffn-embed-dim", "24"),
            *(f"--{name}-attention-heads", "8"),
        ]

    return {
        "translation": (
            *(str(data / "mt"), "--task", "translation", "--arch", "transformer", *stack("encoder"), *stack("decoder")),
            *("--share-all-embeddings", "--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"),
            *("--batch-size", "80", *_SHARED),
        ),
        "causal": (
            *(str(data / "lm"), "--task", "language_modeling", "--arch", "transformer_lm", *stack("decoder")),
            *("--decoder-input-dim", "16", "--decoder-output-dim", "16", "--share-decoder-input-output-embed"),
            *("--sample-break-mode", "eos", "--tokens-per-sample", "32", "--batch-size", "80", *_SHARED),
        ),
        "masked": (
            *(str(data / "lm"), "--task", "masked_lm", "--arch", "roberta", *stack("encoder")),
            *("--criterion", "masked_lm", "--sample-break-mode", "complete", "--tokens-per-sample", "32"),
            *("--max-positions", "40", "--batch-size", "24", *_SHARED),
        ),
    }


@pytest.fixture(scope="session")
def trainings(arguments: dict[str, tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Training]:
    """Every task trained by stock fairseq, and again by ``python -m recorder fairseq-train``, in other processes."""
    folder = tmp_path_factory.mktemp("fairseq-trainings")
    stock = _call(
        ["-c", _STOCK, json.dumps([[*arguments[task], "--save-dir", str(folder / task / "stock")] for task in TASKS])]
    )
    recorded = {
        task: _call(
            [
                *("-m", "recorder", "fairseq-train", "--record-dir", str(folder / task / "run")),
                *(*arguments[task], "--record-segment-steps", "3", "--save-dir", str(folder / task / "recorded")),
            ]
        )
        for task in TASKS
    }
    outputs = {task: _wait(process) for task, process in recorded.items()}
    _wait(stock)
    return {
        task: Training(
            task=task,
            arguments=arguments[task],
            run=folder / task / "run",
            recorded_checkpoint=folder / task / "recorded" / "checkpoint_last.pt",
            stock_checkpoint=folder / task / "stock" / "checkpoint_last.pt",
            output=outputs[task][0],
            errors=outputs[task][1],
        )
        for task in TASKS
    }
