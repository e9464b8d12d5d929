"""Turn text that is split into pieces into fairseq's binary data, with fairseq's own fairseq-preprocess."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from recorder import durable
from recorder.errors import LossledgerError

TRANSLATION = "translation"
LANGUAGE_MODEL = "language-model"

# The stock fairseq-preprocess cannot import fairseq on Python >= 3.11. Both runs share one process, since
# importing fairseq takes longer than either of them.
_PREPROCESS = """
import json, sys
import recorder.integrations.fairseq_import
from fairseq import options
from fairseq_cli import preprocess
for arguments in json.loads(sys.argv[1]):
    preprocess.main(options.get_preprocessing_parser().parse_args(arguments))
"""


def binarise(encoded: Path, made: Path, *, workers: int = 1) -> None:
    """Run fairseq-preprocess: once for translation, once for language models with the same dictionary.

    Parameters
    ----------
    encoded
        Folder of ``train.en``, ``train.de``, ``valid.en`` and ``valid.de``, pieces separated by spaces.
    made
        Folder to write `TRANSLATION` and `LANGUAGE_MODEL` into.
    workers
        Processes that binarise.

    Raises
    ------
    LossledgerError
        If fairseq is missing or fails.
    """
    encoded, made = encoded.absolute(), made.absolute()
    # No padding of the dictionary to a multiple of 8: its made-up words would never learn anything.
    shared = ["--workers", str(workers), "--padding-factor", "1"]
    translation = [
        *("--source-lang", "en", "--target-lang", "de", "--joined-dictionary"),
        *("--trainpref", str(encoded / "train"), "--validpref", str(encoded / "valid")),
        *("--destdir", str(made / TRANSLATION)),
    ]
    language_model = [
        *("--only-source", "--srcdict", str(made / TRANSLATION / "dict.en.txt")),
        *("--trainpref", str(encoded / "train.en"), "--validpref", str(encoded / "valid.en")),
        *("--destdir", str(made / LANGUAGE_MODEL)),
    ]
    runs = json.dumps([translation + shared, language_model + shared])
    search = [str(Path(durable.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    finished = subprocess.run(
        [sys.executable, "-c", _PREPROCESS, runs],
        cwd=encoded,  # whatever fairseq leaves in its working folder goes away with this one
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search)), "LOGLEVEL": "ERROR"},
        capture_output=True,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        last = (finished.stderr.strip() or finished.stdout.strip() or "it said nothing").splitlines()[-1]
        message = f"fairseq-preprocess failed with exit status {finished.returncode}: {last}"
        raise LossledgerError(message)
    for log in made.rglob("preprocess.log"):
        log.unlink()
