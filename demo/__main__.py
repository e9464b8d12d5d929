"""``python -m demo``: text, three trainings, replay, cubes, figures, with the commands a user would type.

Every command is printed before it runs. A second call does only what is missing.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from demo.corpus import write_corpus
from demo.prepare import PreparedText, prepare
from demo.trainings import LAYERS, Training, trainings
from recorder import commandline
from recorder.errors import LossledgerError
from recorder.manifest import Manifest

PROGRAM = "python -m demo"
SEED = 1
PAIRS = 6000


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="The whole way, from text to the paper's first figure.")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), help="folder for all files (default %(default)s)")
    parser.add_argument(
        "--text", type=Path, help="folder of train.en, train.de, val.en, val.de, plain or .gz (default: made by Babel)"
    )
    parser.add_argument("--updates", type=int, default=60, help="updates of each training (default %(default)s)")
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers of each model (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="sentence pairs to train on (default %(default)s)")
    parser.add_argument("--probe", type=int, default=24, help="examples of the fixed probe set (default %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes of replay (default %(default)s)")
    return parser


def _command(*arguments: str, log: Path | None = None) -> int:
    commandline.say(f"$ python {shlex.join(arguments)}{f' > {log} 2>&1' if log else ''}")
    command = [sys.executable, *arguments]
    if log is None:
        finished = subprocess.run(command, check=False)
    else:
        with log.open("w", encoding="utf-8") as stream:
            finished = subprocess.run(command, check=False, stdout=stream, stderr=subprocess.STDOUT)
    if finished.returncode not in {commandline.DONE, commandline.TOLERANCE_NOT_MET}:
        told = f"; the end of {log}: {log.read_text(encoding='utf-8')[-500:]}" if log else ", as it says above"
        message = f"python {' '.join(arguments[:3])} ended with exit code {finished.returncode}{told}"
        raise LossledgerError(message)
    return finished.returncode


def _text(options: argparse.Namespace) -> PreparedText:
    text = options.text
    if text is None:
        text = options.out / "text"
        if not (text / "val.de").exists():
            write_corpus(text, train=options.pairs, seed=SEED)
    prepared = prepare(text, options.out / "prepared", limit=options.pairs)
    commandline.say(
        f"text: {prepared.train_sentences} sentence pairs to train on, {prepared.validation_sentences} to validate on, "
        f"{prepared.vocabulary} subwords"
    )
    return prepared


def _train(run: Path, training: Training) -> None:
    if (run / "manifest.json").exists():
        manifest = Manifest.read(run)
        if manifest.state == "complete" and manifest.trainer.arguments == training.arguments:
            return
    # A run of the demo that was stopped, or made with other settings, is of no use to anyone.
    shutil.rmtree(run, ignore_errors=True)
    run.parent.mkdir(parents=True, exist_ok=True)
    log = run.parent / f"{training.name}.log"
    _command("-m", "recorder", "fairseq-train", "--record-dir", str(run), *training.arguments, log=log)


def _demo(options: argparse.Namespace) -> int:
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    prepared = _text(options)
    runs, codes = [], []
    for training in trainings(prepared, options.out, updates=options.updates, layers=options.layers):
        run = options.out / "runs" / training.name
        _train(run, training)
        loss_data = ("--loss-data", "batch", "--loss-data", f"probe:{options.probe}")
        codes.append(_command("-m", "replay", "--run", str(run), *loss_data, "--workers", str(options.workers)))
        _command("-m", "reduce", "--run", str(run))
        runs += ["--run", f"{training.title}={run}"]
        commandline.say(f"{training.title}: done after {time.monotonic() - began:.0f} s")
    _command("-m", "viz", *runs, "--out", str(options.out / "figures"))
    commandline.say(f"{PROGRAM}: done in {time.monotonic() - began:.0f} s")
    # Books that do not balance are drawn all the same, marked where they don't.
    return max(codes)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo.

    Parameters
    ----------
    argv
        The arguments without the program; None for those of the process.

    Returns
    -------
    int
        The exit code; 3 if a replay's was 3: the books of some step do not balance.
    """
    options = _parser().parse_args(argv)
    return commandline.guarded(PROGRAM, lambda: _demo(options))


if __name__ == "__main__":
    sys.exit(main())
