from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from recorder.errors import UsageError
from recorder.lock import LOCK_FILE
from recorder.manifest import MANIFEST_FILE
from recorder.verify import verify
from tests.reliability.conftest import Promise
from tests.reliability.readings import content_of
from tests.reliability.trainings import record_twice

pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("recorded") / "run"
    record_twice(run)
    return run


def _call(*command: object) -> None:
    if shutil.which(str(command[0])) is None:
        pytest.skip(f"{command[0]} is not installed")
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


def _cp(run: Path, target: Path) -> None:
    _call("cp", "-r", run, target)


def _rsync(run: Path, target: Path) -> None:
    _call("rsync", "-r", f"{run}/", target)


def _tar(run: Path, target: Path) -> None:
    with tarfile.open(target.with_suffix(".tar.gz"), "w:gz") as archive:
        archive.add(run, arcname=".")
    with tarfile.open(target.with_suffix(".tar.gz")) as archive:
        archive.extractall(target, filter="data")


def _zip(run: Path, target: Path) -> None:
    with zipfile.ZipFile(target.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        for file in run.rglob("*"):
            archive.write(file, file.relative_to(run))
    with zipfile.ZipFile(target.with_suffix(".zip")) as archive:
        archive.extractall(target)


def _git(run: Path, target: Path) -> None:
    origin = target.with_name("origin")
    shutil.copytree(run, origin)
    _call("git", "init", "--quiet", origin)
    _call("git", "-C", origin, "add", "--all")
    author = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    _call("git", "-C", origin, *author, "commit", "--quiet", "--message", "a run")
    _call("git", "clone", "--quiet", origin, target)
    shutil.rmtree(target / ".git")


def _rename(run: Path, target: Path) -> None:
    shutil.copytree(run, target.with_name("Lauf mit Leerzeichen und ü"))
    target.with_name("Lauf mit Leerzeichen und ü").rename(target)


def _times(run: Path, target: Path) -> None:
    shutil.copytree(run, target)
    for age, entry in enumerate(sorted(target.rglob("*"), reverse=True)):
        os.utime(entry, (age, 10**9 - age))


def _modes(run: Path, target: Path) -> None:
    shutil.copytree(run, target)
    for entry in target.rglob("*"):
        entry.chmod(0o555 if entry.is_dir() else 0o444)


def _link(run: Path, target: Path) -> None:
    shutil.copytree(run, target.with_name("elsewhere"))
    target.symlink_to(target.with_name("elsewhere"))


@pytest.mark.parametrize("move", [_cp, _rsync, _tar, _zip, _git, _rename, _times, _modes, _link])
def test_a_run_that_was_moved_is_whole(
    tmp_path: Path, promise: Promise, recorded: Path, move: Callable[[Path, Path], None]
) -> None:
    target = tmp_path / "moved"
    move(recorded, target)
    with promise("F3") as tally, tally.case(move.__name__):
        assert verify(target).damages == ()
        assert content_of(target) == content_of(recorded)


def test_a_file_that_stayed_behind_is_missed_by_name(tmp_path: Path, promise: Promise, recorded: Path) -> None:
    files = [file.relative_to(recorded) for file in sorted(recorded.rglob("*")) if file.is_file()]
    needed = [file for file in files if file.name != LOCK_FILE]
    assert len(needed) == 7
    with promise("F3") as tally:
        for left in needed:
            with tally.case(f"{left} stayed behind"):
                target = tmp_path / left.name
                shutil.copytree(recorded, target, ignore=lambda folder, names: {left.name} & set(names))  # noqa: B023
                _assert_missed(target, left)
        with tally.case("the lock stayed behind"):
            target = tmp_path / "unlocked"
            shutil.copytree(recorded, target, ignore=shutil.ignore_patterns(LOCK_FILE))
            assert verify(target).damages == ()


def _assert_missed(target: Path, left: Path) -> None:
    if left.name == MANIFEST_FILE:
        with pytest.raises(UsageError, match=MANIFEST_FILE):
            verify(target)
        return
    damages = verify(target).damages
    assert damages
    told = " ".join(f"{damage.file} {damage.found}" for damage in damages)
    if left.parent.name == "segments":
        attempt, start, stop = (int(part) for part in left.stem.split("-"))
        assert f"(attempt {attempt})" in told
        assert any(lost == (start, stop) for damage in damages for lost in damage.lost)
    else:
        assert left.name in told
