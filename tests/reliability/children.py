"""What the forked processes do: train and be killed, fill a disk, hold a run, race for it."""

from __future__ import annotations

import atexit
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import recorder
from recorder import capture
from recorder.errors import UsageError
from recorder.recording import RecorderWarning
from recorder.writer import BackgroundWriter
from tests.reliability.trainings import FILES, Oracle, build, fingerprint, load, save, trained, update


class InlineWriter(BackgroundWriter):
    """Codes and writes in the training's own thread, so that every call to the system is of one thread."""

    def put(self, state: Any, step: Any) -> None:
        self._add(state, step)

    def flush(self) -> None:
        if self.failure is None:
            self._segments.sync()

    def close(self) -> None:
        self._segments.seal()


def in_one_thread() -> None:
    """Let all recordings of this process write in the training's thread."""
    assert "BackgroundWriter" in vars(capture)
    vars(capture)["BackgroundWriter"] = InlineWriter


def train(
    run: str,
    oracle: str,
    optimizer: str,
    dtype: str,
    first_step: int = 0,
    stop: int = 10**9,
    segment_steps: int = 5,
    *,
    inline: bool = False,
    flush_every: int = 3,
) -> None:
    """Record updates up to `stop`, or for ever, telling the oracle what is safe."""
    if inline:
        in_one_thread()
    model, made = build(optimizer, dtype)
    for step in range(first_step):
        update(model, made, step)
    log = Oracle(Path(oracle))
    with recorder.watch(model, made, run=run, first_step=first_step, segment_steps=segment_steps, files=FILES) as rec:
        for step in range(first_step, stop):
            update(model, made, step, rec)
            log.made(step + 1, model)
            if step % flush_every == flush_every - 1:
                rec.flush()
                log.safe()
    log.safe()


def train_inline(run: str, oracle: str, first_step: int, stop: int) -> None:
    """Record a few updates in one thread, once told to."""
    os.kill(os.getpid(), signal.SIGSTOP)
    train(run, oracle, "adam", "float32", first_step, stop, 2, inline=True, flush_every=1)


def train_threaded(run: str, oracle: str, first_step: int, stop: int) -> None:
    """Record a few updates as a training does, once told to."""
    os.kill(os.getpid(), signal.SIGSTOP)
    train(run, oracle, "adam", "float32", first_step, stop, 2, flush_every=1)


WIDE = 400
"""Width of the model that fills disks: 20 kB a state."""


def train_to_the_end(run: str, result: str, steps: int, width: int = WIDE) -> None:
    """Record updates, and write down what has become of the model and of the recording."""
    model, optimizer = build("adam", width=width)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rec = None
        refusal = ""
        try:
            rec = recorder.watch(model, optimizer, run=run, segment_steps=8)
        except UsageError as error:
            refusal = str(error)
        for step in range(steps):
            update(model, optimizer, step, rec)
        if rec is not None:
            rec.close()
    warned = [str(entry.message) for entry in caught if entry.category is RecorderWarning]
    outcome = {"model": fingerprint(trained(model)), "refusal": refusal, "warned": warned}
    Path(result).write_text(json.dumps(outcome))


def train_on_a_disk_of_its_own(options: str, disk: str, saved: str, result: str, steps: int) -> None:
    """Record onto a disk of some size, and save what is on it when the training has ended."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=True)
    try:
        train_to_the_end(f"{disk}/run", result, steps)
        if Path(disk, "run").exists():
            shutil.copytree(f"{disk}/run", saved)
    finally:
        subprocess.run(["umount", disk], check=True)


def train_with_a_largest_file(size: int, run: str, result: str, steps: int) -> None:
    """Record where no file may have more than `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    train_to_the_end(run, result, steps)


def train_with_checkpoints(
    run: str, checkpoint: str, optimizer: str, dtype: str, stop: int, kill_at: int, where: str
) -> None:
    """Go on from the checkpoint, if there is one, saving it every few updates; be killed somewhere in one of them."""
    model, made = build(optimizer, dtype)
    first_step = 0
    if Path(checkpoint).exists():
        first_step = load(checkpoint, model, made)
    with recorder.watch(model, made, run=run, first_step=first_step, segment_steps=4) as rec:
        for step in range(first_step, stop):
            if step == kill_at and where == "before the update":
                os.kill(os.getpid(), signal.SIGKILL)
            update(model, made, step, rec)
            if step == kill_at and where == "after the update":
                os.kill(os.getpid(), signal.SIGKILL)
            if (step + 1) % 5 == 0:
                rec.flush()
                if step >= kill_at - 4 and where == "before the checkpoint":
                    os.kill(os.getpid(), signal.SIGKILL)
                save(checkpoint, model, made, step + 1)


def hold(run: str, ready: str, children: int) -> None:
    """Record a step into a run and keep it open, with processes forked as a DataLoader forks its workers."""
    model, optimizer = build("adam")
    rec = recorder.watch(model, optimizer, run=run)
    update(model, optimizer, 0, rec)
    rec.flush()
    pids = []
    for _ in range(children):
        pid = os.fork()
        if pid == 0:
            signal.pause()
        pids.append(pid)
    Path(f"{ready}.new").write_text(json.dumps(pids))
    Path(f"{ready}.new").rename(ready)
    signal.pause()


def hold_after_children(run: str, ready: str) -> None:
    """The same, with children that have ended in every way a child can end."""
    model, optimizer = build("adam")
    rec = recorder.watch(model, optimizer, run=run)
    update(model, optimizer, 0, rec)
    rec.flush()
    for ending in (sys.exit, os._exit, lambda _: rec.close(), lambda _: gc.collect()):
        pid = os.fork()
        if pid == 0:
            try:
                ending(0)
                atexit._run_exitfuncs()
            except SystemExit:
                atexit._run_exitfuncs()
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
    Path(ready).write_text("[]")
    signal.pause()


def race(run: str, start: str, result: str) -> None:
    """Begin to record at the same moment as others."""
    model, optimizer = build("adam")
    while not Path(start).exists():
        time.sleep(0.0001)
    try:
        rec = recorder.watch(model, optimizer, run=run)
    except UsageError as error:
        Path(result).write_text(str(error))
        return
    update(model, optimizer, 0, rec)
    rec.flush()
    Path(result).write_text("recording")
    signal.pause()


def train_long(run: str, result: str, steps: int) -> None:
    """Record many updates with few handles, looking now and then at what the process holds."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    model, optimizer = build("sgd")
    handles, memory = [], []
    with recorder.watch(model, optimizer, run=run) as rec:
        for step in range(steps):
            update(model, optimizer, step, rec)
            if step % (steps // 30) == steps // 60:
                handles.append(sum(1 for _ in Path("/proc/self/fd").iterdir()))
                memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    Path(result).write_text(json.dumps({"handles": handles, "memory": memory, "model": fingerprint(trained(model))}))
