"""The folder of a run, opened for one attempt: made or taken up again, locked, its manifest kept true.

An attempt on a folder that holds a run is a training restarted from its checkpoint. What the earlier attempt recorded
from there on is replaced in the run's timeline and kept on the disk.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import shutil
import uuid
import zlib
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recorder import durable, recordedonce, tensorfile
from recorder.errors import UsageError
from recorder.joining import join
from recorder.lock import LOCK_FILE, RunLock
from recorder.manifest import MANIFEST_FILE, Attempt, Manifest, Trainer
from recorder.processes import this_process
from recorder.recipe import current_recipe
from recorder.recovery import recover_locked
from recorder.runformat import Run
from recorder.segments import SEGMENTS_FOLDER, list_segments

if TYPE_CHECKING:
    from recorder.modelbuffers import ModelBuffers
    from recorder.watched import Watched

TRAINER_FOLDER = "trainer"
BALLAST_FILE = ".ballast"
_SMALLEST_BALLAST = 1 << 16


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What the user asked to record; the same in all attempts of a run.

    Parameters
    ----------
    batches
        ``store`` or ``indices``.
    steps
        Text of the `recorder.selection.StepSelection`.
    workload
        ``module:function``, or None.
    trainer
        The training program.
    files
        What the trainer needs to be rebuilt: name in ``trainer/`` to where it is now.
    map
        What the run keeps of the user's map; None where none was given.
    """

    batches: str
    steps: str
    workload: str | None
    trainer: Trainer
    files: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    map: Mapping[str, str] | None = None


class RunFolder:
    """A run's folder, opened for an attempt by the process that records the parameters.

    Parameters
    ----------
    path
        The folder; made if there is none.
    settings
        What is recorded.
    first_step
        The first step of the attempt.

    Attributes
    ----------
    manifest : Manifest
        As it was last written.
    recovered : str
        In words, the steps of segments that a killed attempt had left in the making; empty if there were none.

    Raises
    ------
    UsageError
        If the folder holds something that is no run, is being recorded into, or holds a run of other settings.
    """

    def __init__(self, path: Path, settings: Settings, first_step: int) -> None:
        self.path = path
        self._settings = settings
        self._first_step = first_step
        self._before: Run | None = None
        self.manifest: Manifest | None = None
        self.recovered = ""
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"the run folder {path} cannot be made: {error.strerror}"
            raise UsageError(message) from error
        refuse_what_is_no_run(path)
        self._lock = RunLock(path)
        try:
            for folder in (path, path / TRAINER_FOLDER):
                durable.sweep(folder)
            if (path / MANIFEST_FILE).exists():
                self._take_up()
        except BaseException:
            self._lock.release()
            raise

    def _take_up(self) -> None:
        self.recovered = recover_locked(self.path)
        self._before = Run(self.path)
        found, wanted = self._before.manifest, self._settings
        pairs = {
            "batches": (found.batches, wanted.batches),
            "steps": (found.steps, wanted.steps),
            "trainer": (found.trainer.name, wanted.trainer.name),
            "workload": (found.workload, wanted.workload),
        }
        different = [f"{name} was {old!r} and is now {new!r}" for name, (old, new) in pairs.items() if old != new]
        if different:
            message = (
                f"{self.path} holds a run that was recorded otherwise: {'; '.join(different)}. "
                "Go on with the same settings, or give another folder"
            )
            raise UsageError(message)

    def begin(self, watched: Watched, buffers: ModelBuffers, step: int, autocast: str | None) -> Manifest:
        """Write what is recorded once, just before the first step that is recorded.

        Parameters
        ----------
        watched
            Model and optimizer, their table settled.
        buffers
            The model's buffers, settled.
        step
            That step: the first of the attempt, or the first of it that is selected.
        autocast
            The dtype that torch computes in, where it is another than the parameters'.

        Returns
        -------
        Manifest
            The manifest, with this attempt. A `JoinError` tells if the parameters are not those that the run recorded
            at this step.
        """
        joined = "first"
        if self._before is not None:
            own_map = self._settings.map is not None
            joined = join(self._before, watched, self._first_step, step, own_map=own_map)
        _, processes = this_process()
        earlier = self._before.manifest.attempts if self._before else ()
        attempt = Attempt(
            number=max([entry.number for entry in earlier] + [name.attempt for name in list_segments(self.path)] + [0])
            + 1,
            first_step=self._first_step,
            joined=joined,
            state="recording",
            processes=processes,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        (self.path / SEGMENTS_FOLDER).mkdir(exist_ok=True)
        replaces_all = self._before is None or not self._before.steps or self._first_step <= self._before.steps[0]
        run_id = self._before.manifest.run_id if self._before else uuid.uuid4().hex
        state = watched.optimizer_state()
        if replaces_all and state:
            recordedonce.write_optimizer_state(self.path, run_id, state, attempt.number)
        optimizer, recipe = watched.optimizer_facts(), current_recipe(watched.device)
        if autocast is not None:
            recipe = {**recipe, "autocast": autocast}
        if self._before is None:
            facts = recordedonce.once("untrained", run_id)
            tensorfile.write(self.path / recordedonce.UNTRAINED_FILE, watched.copies(trained=False), facts)
            self.manifest = Manifest(
                run_id=run_id,
                path="recorded",
                workload=self._settings.workload,
                trainer=self._settings.trainer,
                optimizer=optimizer,
                recipe=recipe,
                batches=self._settings.batches,
                steps=self._settings.steps,
                parameters=watched.table,
                attempts=(attempt,),
                buffers=buffers.changing,
                files=self._copy_files(),
                provenance={**_provenance(), **self._map()},
            )
        else:
            found = self._before.manifest
            self.manifest = dataclasses.replace(
                found,
                parameters=watched.table,
                attempts=(*found.attempts, attempt),
                buffers=tuple(dict.fromkeys((*found.buffers, *buffers.changing))),
                optimizer=optimizer if replaces_all else found.optimizer,
                recipe=recipe if replaces_all else found.recipe,
                provenance={**found.provenance, **self._map()},
            )
        self._keep_ballast()
        self.manifest.write(self.path)
        return self.manifest

    def _map(self) -> dict[str, Mapping[str, str]]:
        corrected = self._before is not None and self._before.manifest.correction is not None
        return {} if self._settings.map is None or corrected else {"map": self._settings.map}

    def _copy_files(self) -> dict[str, int]:
        checksums = {}
        for name, source in self._settings.files.items():
            target = self.path / TRAINER_FOLDER / name
            target.parent.mkdir(exist_ok=True)
            with durable.replacing(target) as temporary:
                shutil.copyfile(source, temporary)
            checksums[name] = zlib.crc32(target.read_bytes())
        return checksums

    def _keep_ballast(self) -> None:
        # Given back when the disk is full, so that the manifest can still say why the recording ended. It comes before
        # the manifest: a run that is there can always be brought to its end.
        assert self.manifest is not None
        size = max(_SMALLEST_BALLAST, 2 * len(json.dumps(self.manifest.to_dict(), indent=1)))
        durable.write(self.path / BALLAST_FILE, lambda stream: stream.write(b"\0" * size))

    def write(self, **changes: Any) -> None:
        """Change fields of the manifest on the disk.

        Parameters
        ----------
        **changes
            Fields of `Manifest`; ``state`` and ``stop`` are those of the attempt.
        """
        if self.manifest is None:
            return
        of_attempt = {name: changes.pop(name) for name in ("state", "stop") if name in changes}
        attempts = (*self.manifest.attempts[:-1], dataclasses.replace(self.manifest.attempt, **of_attempt))
        self.manifest = dataclasses.replace(self.manifest, attempts=attempts, **changes)
        self.manifest.write(self.path)

    def drop_ballast(self) -> None:
        """Give back the disk space kept for the end."""
        with suppress(OSError):
            (self.path / BALLAST_FILE).unlink(missing_ok=True)

    def release(self) -> None:
        """Let other recorders in; a second call does nothing."""
        self._lock.release()


def refuse_what_is_no_run(path: Path) -> None:
    """Refuse a folder that holds anything but a run, or what is left of one that was never begun.

    Parameters
    ----------
    path
        The folder, which need not exist.

    Raises
    ------
    UsageError
        If it holds anything else.
    """
    if (path / MANIFEST_FILE).exists() or not path.exists():
        return
    if not path.is_dir():
        message = f"{path} is a file; a run is a folder. Give another name"
        raise UsageError(message)
    # Nothing is removed before the folder is locked: it may be what another recorder is just writing.
    once = {recordedonce.UNTRAINED_FILE, recordedonce.optimizer_file(1)}
    ours = {LOCK_FILE, BALLAST_FILE, SEGMENTS_FOLDER, TRAINER_FOLDER, *once}
    foreign = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.name not in ours
        and not entry.name.startswith(f"{LOCK_FILE}-")
        and not (entry.name.startswith(".") and entry.name.endswith(durable.TEMPORARY_SUFFIX))
    )
    segments = path / SEGMENTS_FOLDER
    if not foreign and not (segments.exists() and any(segments.iterdir())):
        return
    # Asked again: another recorder may have begun meanwhile, and is in the lock's way alone.
    if not (path / MANIFEST_FILE).exists():
        message = (
            f"{path} is not empty and holds no run; nothing is overwritten. Give another folder, or remove this one"
        )
        raise UsageError(message)


def _provenance() -> Mapping[str, Any]:
    try:
        own = version("lossledger")
    except PackageNotFoundError:
        own = "unknown"
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "lossledger": own,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
