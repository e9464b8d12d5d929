"""A process that has torch imported and does nothing but fork: a training of its own within milliseconds.

A fork of the process that runs the tests would not do: its threads are gone in the child, and torch needs them.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]


class WarmProcess:
    """Starts functions of modules in processes of their own, and waits for them."""

    def __init__(self, log: Path, prefix: Sequence[str] = ()) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "tests.reliability.warm"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=_ROOT,
                text=True,
            )

    def start(self, function: Callable[..., None], *arguments: Any) -> int:
        """Call a function in a new process, with arguments that JSON can hold or paths; return its process id."""
        return self._ask(
            {
                "module": function.__module__,
                "function": function.__qualname__,
                "arguments": [str(argument) if isinstance(argument, Path) else argument for argument in arguments],
            }
        )

    def wait(self, pid: int) -> int:
        """Wait until a process ends; return its exit code, or minus the signal that killed it."""
        return self._ask({"wait": pid})

    def run(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call a function in a new process and wait until it has done its work."""
        code = self.wait(self.start(function, *arguments))
        assert code == 0, f"{function.__qualname__}{arguments} ended with {code}\n{self.log()}"

    def log(self) -> str:
        """The end of what the processes wrote to their standard error."""
        return self._log.read_text(errors="replace")[-4000:]

    def _ask(self, request: dict[str, Any]) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the warm process is gone\n{self.log()}"
        return int(answer)

    def close(self) -> None:
        """End it, and whatever it started that still runs."""
        self._process.communicate()


def wait_until(reached: Callable[[], object]) -> None:
    """Wait for what another process is about to do."""
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline, "it did not happen within a minute"
        time.sleep(0.001)


def _call(request: dict[str, Any]) -> None:
    code = 1
    try:
        os.dup2(2, 1)
        with Path(os.devnull).open() as nothing:
            os.dup2(nothing.fileno(), 0)
        function = getattr(importlib.import_module(request["module"]), request["function"])
        function(*request["arguments"])
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    import torch._dynamo  # the first update of any optimizer imports it

    import tests.reliability.children  # noqa: F401

    torch.set_num_threads(1)
    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            running.discard(request["wait"])
            answer = os.waitstatus_to_exitcode(status)
        else:
            answer = os.fork()
            if answer == 0:
                _call(request)
            running.add(answer)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    _serve()
