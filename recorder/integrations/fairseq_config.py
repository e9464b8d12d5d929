"""From fairseq's command-line arguments to its configuration, quietly and without side effects."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recorder.errors import UsageError
from recorder.integrations.fairseq_import import fairseq
from recorder.parameters import UnmappedParameterWarning
from recorder.recording import RecorderWarning

from fairseq import options, utils  # isort: skip (the shim above must come first)
from fairseq.dataclass.utils import convert_namespace_to_omegaconf  # isort: skip

__all__ = ["DICTIONARIES_FOLDER", "fairseq", "fairseq_config", "quietly", "user_directory"]

DICTIONARIES_FOLDER = "trainer"
"""The dictionaries stand here in the run, so that the model can be rebuilt without the data."""


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the deprecation warnings that hydra and torch give for fairseq 0.12.2's own code.

    Yields
    ------
    None
        While the block runs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # What the recorder itself has to say is not fairseq's.
        warnings.simplefilter("default", RecorderWarning)
        warnings.simplefilter("default", UnmappedParameterWarning)
        yield


def user_directory(arguments: Sequence[str]) -> str | None:
    """Find ``--user-dir`` among the arguments of fairseq-train.

    Parameters
    ----------
    arguments
        The command line, without the program.

    Returns
    -------
    str or None
        The folder of the user's own code.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--user-dir", default=None)
    found: str | None = parser.parse_known_args(list(arguments))[0].user_dir
    return found


def fairseq_config(arguments: Sequence[str], directory: Path, *, run_user_code: bool) -> Any:
    """Parse the arguments of fairseq-train as fairseq itself does.

    Parameters
    ----------
    arguments
        The command line, without the program.
    directory
        Where relative paths of the data and of ``--user-dir`` start.
    run_user_code
        Whether ``--user-dir`` may be imported.

    Returns
    -------
    omegaconf.DictConfig
        fairseq's configuration, with the path of the data made absolute.

    Raises
    ------
    UsageError
        If the arguments name a ``--user-dir`` that may not be imported, or fairseq refuses them.
    """
    user_dir = user_directory(arguments)
    if user_dir is not None:
        if not run_user_code:
            message = (
                f"the recorded training used --user-dir {user_dir}; a run is data, and nothing it names is imported "
                "unless you say so: pass --workload recorded"
            )
            raise UsageError(message)
        place = str(directory / user_dir)
        utils.import_user_module(argparse.Namespace(user_dir=place))
        arguments = [*arguments, "--user-dir", place]  # fairseq imports it once more, and from the current folder
    try:
        with quietly():
            parser = options.get_training_parser()
            parsed = options.parse_args_and_arch(parser, input_args=list(arguments))
            config = convert_namespace_to_omegaconf(parsed)
    except SystemExit as error:
        message = "fairseq refuses these arguments (its own message stands above); see fairseq-train --help"
        raise UsageError(message) from error
    if config.task is not None and getattr(config.task, "data", None):
        config.task.data = ":".join(str(directory / part) for part in config.task.data.split(":"))
    return config
