"""The LCA of every entry, summed over windows of steps: right, whole, and the same bytes whatever happened."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recorder import durable
from recorder.errors import FormatError
from recorder.pruned import prune
from recorder.runformat import Run
from recorder.table import Parameter
from recorder.tensorfile import TensorFile
from replay import entries, work
from replay.allocation import Allocation
from replay.entries import EntryFolder
from replay.job import Receipt, Task
from replay.settings import Settings
from replay.shards import ShardFolder
from tests import cases
from tests.replay.test_brute_force import STEPS, TARGET, brute_force, record_for_brute_force
from tests.replay.variants import record

Command = Callable[..., int]
Find = Callable[[Path, str], ShardFolder]
Captured = pytest.CaptureFixture[str]


def _entries(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted(run.rglob("shards/*/entries-*"))}


def _loaded(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """By any safetensors reader; names without their folder, for runs replayed on one loss data."""
    return {file.name: load_file(file) for file in sorted(run.rglob("shards/*/entries-*"))}


@pytest.mark.parametrize("loss_data", ["batch", "probe"])
def test_every_entry_is_the_sum_of_brute_force_in_the_models_names_and_shapes(
    tmp_path: Path, loss_data: str, replay: Command
) -> None:
    record_for_brute_force(tmp_path / "run")
    chosen = "probe:16" if loss_data == "probe" else "batch"
    # The second window begins within a chunk.
    arguments = ("--chunk", "2", "--per-parameter", f"0:1,1:{STEPS}")
    assert replay(tmp_path / "run", *arguments, loss_data=(chosen,)) == 0
    found = _loaded(tmp_path / "run")
    assert list(found) == ["entries-00000000-00000001.safetensors", f"entries-00000001-{STEPS:08d}.safetensors"]
    truth = [step["lca"] for step in brute_force(tmp_path / "run", loss_data)]
    model = cases.workload_float64().model()
    for window, steps in zip(found.values(), (truth[:1], truth[1:]), strict=True):
        assert {name: tensor.shape for name, tensor in window.items()} == {
            name: tensor.shape for name, tensor in model.named_parameters()
        }
        size = sum(float(entries.abs().sum()) for step in steps for entries in step.values())
        for name, tensor in window.items():
            expected = torch.stack([step[name] for step in steps]).sum(dim=0)
            assert tensor.dtype == torch.float64
            torch.testing.assert_close(tensor, expected, rtol=10 * TARGET, atol=1e-14 * size)


def test_entries_add_up_to_the_shards_sums_over_their_window(run: Path, replay: Command, folder: Find) -> None:
    assert replay(run, "--chunk", "2", "--per-parameter", "0:3,3:6") == 0
    batch = folder(run, "batch")
    read = [batch.read(start, stop).per_unit["sum"] for start, stop in batch.finished()]
    for window, rows in zip(_loaded(run).values(), (slice(0, 3), slice(3, 6)), strict=True):
        parameters = [row for row in batch.trained if row.tied_to is None]
        assert window.keys() == {parameter.name for parameter in parameters}
        for parameter in parameters:
            uses = [row.name for row in batch.trained if parameter.name in (row.name, row.tied_to)]
            of_units = sum(np.concatenate([shard[name] for shard in read])[rows].sum(axis=0) for name in uses)
            units = window[parameter.name].movedim(parameter.unit_axis, 0).reshape(parameter.units, -1).sum(dim=1)
            np.testing.assert_allclose(units.numpy(), of_units, rtol=1e-12, atol=1e-15)


def test_the_length_of_chunks_changes_entries_within_rounding_alone(run: Path, replay: Command) -> None:
    found = []
    for chunk in ("1", "4"):
        assert replay(run, "--chunk", chunk, "--per-parameter", "all") == 0
        (window,) = _loaded(run).values()
        found.append(window)
        for path in run.rglob("shards/*/*.safetensors"):
            path.unlink()
    for name, one in found[0].items():
        torch.testing.assert_close(one, found[1][name], rtol=1e-12, atol=1e-17)


def test_the_files_are_named_among_the_results_and_in_the_json(run: Path, replay: Command, capsys: Captured) -> None:
    assert replay(run, "--chunk", "2", "--per-parameter", "4:6,0:4", loss_data=("batch", "probe:16")) == 0
    lines = capsys.readouterr().out.splitlines()
    batch, probe = lines[0], lines[3]
    names = ["entries-00000000-00000004.safetensors", "entries-00000004-00000006.safetensors"]
    assert lines == [batch, *(f"{batch}/{name}" for name in names), probe, *(f"{probe}/{name}" for name in names)]
    assert replay(run, "--chunk", "2", "--per-parameter", "all", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["batch"]["entries"] == [f"{batch}/entries-00000000-00000006.safetensors"]
    assert len(_entries(run)) == 5
    assert replay(run, "--chunk", "2", "--json") == 0
    assert "entries" not in json.loads(capsys.readouterr().out)["batch"]


@pytest.mark.cluster
def test_two_processes_give_the_bytes_of_one_also_with_dropout_as_recorded(tmp_path: Path, replay: Command) -> None:
    run = tmp_path
    record(run, steps=6)
    chosen = ["--chunk", "1", "--per-parameter", "0:1,1:6", "--dropout", "recorded"]
    command = [sys.executable, "-m", "replay", "--run", str(run), "--workload", "recorded", "--loss-data", "batch"]
    answer = subprocess.run([*command, *chosen, "--workers", "2"], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    by_two = {path: path.read_bytes() for path in run.rglob("shards/*/[!.]*")}
    assert len(by_two) == 1 + 6 + 2
    for path in run.rglob("shards/*/*.safetensors"):
        path.unlink()
    assert replay(run, *chosen) == 0
    assert {path: path.read_bytes() for path in run.rglob("shards/*/[!.]*")} == by_two


def test_after_an_interruption_the_bytes_are_those_of_a_replay_at_once(
    run: Path, replay: Command, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    chosen = ("--chunk", "1", "--per-parameter", "0:5")
    assert replay(run, *chosen) == 0
    at_once = _entries(run)
    for path in run.rglob("shards/*/*.safetensors"):
        path.unlink()
    compute = work.Replayer.replay

    def until_interrupted(self: work.Replayer, task: Task) -> Receipt:
        if task.start == 3:
            raise KeyboardInterrupt
        return compute(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(work.Replayer, "replay", until_interrupted)
        patch.setattr(entries, "PARTS_AT_ONCE", 2)
        assert replay(run, *chosen) == 130
    capsys.readouterr()
    parts = [name.rpartition(".part-")[2] for name in _entries(run)]
    assert parts == ["00000000-00000003.safetensors"]
    assert replay(run, *chosen, "--steps", "4:") == 0
    answer = capsys.readouterr()
    assert "batch: entries of steps 0:5 are there for 4 of 5 chunks; replay the others too" in answer.err
    assert "entries-" not in answer.out
    assert replay(run, *chosen) == 0
    assert _entries(run) == at_once


def test_asked_for_later_only_the_windows_steps_are_done_again_and_their_shards_keep_their_bytes(
    run: Path, replay: Command, capsys: Captured
) -> None:
    assert replay(run, "--chunk", "2") == 0
    shards = {file: file.read_bytes() for file in run.rglob("shards/*/*")}
    capsys.readouterr()
    assert replay(run, "--chunk", "2", "--per-parameter", "3:5") == 0
    assert "4 steps to do in 2 shards" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in shards} == shards
    assert len(_entries(run)) == 1
    assert replay(run, "--chunk", "2", "--per-parameter", "3:5") == 0
    assert "0 steps to do in 0 shards" in capsys.readouterr().err


def test_overwrite_makes_the_sums_of_the_chosen_steps_anew(run: Path, replay: Command, capsys: Captured) -> None:
    chosen = ("--chunk", "2", "--per-parameter", "0:2,2:6")
    assert replay(run, *chosen) == 0
    before = {path: path.stat().st_ino for path in run.rglob("shards/*/entries-*")}
    content = _entries(run)
    assert replay(run, *chosen, "--overwrite", "--steps", "4:6") == 0
    assert "entries of steps 2:6 are there for 1 of 2 chunks" in capsys.readouterr().err
    assert replay(run, *chosen) == 0
    assert _entries(run) == content
    renewed = [path.name for path, inode in before.items() if path.stat().st_ino != inode]
    assert renewed == ["entries-00000002-00000006.safetensors"]


def test_a_gap_in_the_record_is_left_out_of_a_window_and_the_file_says_which_steps_it_has(
    tmp_path: Path, replay: Command
) -> None:
    cases.train(tmp_path / "run", steps=9, steps_to_record="1:9:3", segment_steps=2)
    assert replay(tmp_path / "run", "--per-parameter", "all") == 0
    (file,) = tmp_path.rglob("shards/*/entries-*")
    assert file.name == "entries-00000001-00000008.safetensors"
    facts = TensorFile(file).facts
    assert facts == {
        "format": "lossledger-entries",
        "version": 1,
        "settings": file.parent.name,
        "start": 1,
        "stop": 8,
        "steps": [[1, 2], [4, 5], [7, 8]],
        "attempts": [[1, 1, 2], [1, 4, 5], [1, 7, 8]],
    }


def test_a_wrong_window_is_wrong_usage_and_a_dry_run_says_how_large_the_entries_will_be(
    run: Path, replay: Command, capsys: Captured
) -> None:
    assert replay(run, "--per-parameter", "0:7") == 2
    assert "--per-parameter 0:7: expected a window of recorded steps" in capsys.readouterr().err
    assert replay(run, "--per-parameter", "all", "--dry-run") == 0
    size = sum(tensor.numel() for tensor in cases.workload().model().parameters())
    assert f" of shards and {8 * size / 1e3:.1f} kB of single entries; " in capsys.readouterr().err
    assert not _entries(run)


def test_sums_outlive_the_pruning_of_their_steps_and_new_ones_of_these_are_refused(
    run: Path, replay: Command, capsys: Captured
) -> None:
    chosen = ("--chunk", "3", "--per-parameter", "0:5")
    assert replay(run, *chosen) == 0
    before = _entries(run)
    prune(run, Run(run).files_of(0, 3))
    assert Run(run).consecutive == [(3, 6)]
    work.replayer.cache_clear()
    assert replay(run, *chosen) == 0
    assert _entries(run) == before
    assert replay(run, "--chunk", "3", "--per-parameter", "4:6") == 0
    assert before.items() < _entries(run).items()
    assert replay(run, "--chunk", "3", "--per-parameter", "1:6") == 2
    assert (
        "--per-parameter: of steps 0-2 the entries on batch were not kept, and the steps were pruned since; ask for "
        "windows within steps 3-5"
    ) in capsys.readouterr().err


# The sums alone, without a replay.

PIECES = 7


@pytest.fixture
def sums(tmp_path: Path) -> EntryFolder:
    parameters = [Parameter(name="w", shape=(5, 3), dtype="float32"), Parameter(name="b", shape=(), dtype="float32")]
    settings = Settings(
        run_id="0" * 32,
        parameter_table="0" * 12,
        path="recorded",
        loss_data="batch",
        loss_data_settings={},
        rule="simpson",
        rtol=0.0,
        atol=0.0,
        dropout="off",
        chunk=2,
        recipe={},
    )
    folder = ShardFolder.create(tmp_path, settings, parameters, {})
    return EntryFolder(folder, [(1, 2 * PIECES)], [(0, 2 * PIECES)], lambda start, stop: [(1, start, stop)])


def _lca(t: int, shape: tuple[int, ...] = (5, 3)) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(t))


def _compute(folder: EntryFolder, chunk: int) -> None:
    collector = folder.collect(2 * chunk, 2 * chunk + 2)
    for t in (2 * chunk, 2 * chunk + 1):
        lca = {"w": _lca(t), "b": _lca(t, ())}
        one = {name: torch.ones_like(entries) for name, entries in lca.items()}
        collector.add(t, Allocation(gradient=lca, delta=one, loss_start=1.0, loss_end=0.0, evaluations=3, end=None))


def _content(folder: EntryFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.file((0, 1)).parent.glob("entries-*")}


@pytest.mark.parametrize("order", [range(PIECES), range(PIECES)[::-1], (3, 0, 6, 1, 5, 2, 4)])
@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_the_order_in_which_chunks_come_changes_no_bit(
    sums: EntryFolder, order: Sequence[int], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "PARTS_AT_ONCE", at_once)
    for done, chunk in enumerate(order):
        assert not sums.finished()
        assert sums.unfinished() == [((1, 2 * PIECES), done, PIECES)]
        assert sums.missing() == {(2 * rest, 2 * rest + 2) for rest in order[done:]}
        _compute(sums, chunk)
        sums.add_up()
    assert sums.unfinished() == []
    assert sums.missing() == set()
    (path,) = sums.finished()
    assert list(_content(sums)) == [path.name]
    total = torch.zeros((5, 3), dtype=torch.float64)
    for piece in ([1], *([2 * chunk, 2 * chunk + 1] for chunk in range(1, PIECES))):
        parts = [_lca(t) for t in piece]
        total = total + (parts[0] + parts[1] if len(parts) == 2 else parts[0])
    assert torch.equal(load_file(path)["w"], total)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_killed_at_any_rename_or_removal_the_sum_ends_with_the_same_bytes(
    sums: EntryFolder, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries, "PARTS_AT_ONCE", 2)

    def work_on() -> None:
        for chunk in range(PIECES):
            if (2 * chunk, 2 * chunk + 2) in sums.missing():
                _compute(sums, chunk)
            sums.add_up()

    work_on()
    at_once = _content(sums)
    assert len(at_once) == 1
    for moment in range(1, 100):
        sums.file((1, 2 * PIECES)).unlink()
        left = moment

        def dying(function: Any) -> Any:
            def wrapped(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0 and before:
                    raise _Killed
                result = function(*arguments, **options)
                if left == 0:
                    raise _Killed
                return result

            return wrapped

        with monkeypatch.context() as patch:
            patch.setattr(durable, "publish", dying(durable.publish))
            patch.setattr(Path, "unlink", dying(Path.unlink))
            try:
                work_on()
            except _Killed:
                assert left <= 0
            else:
                break
        work_on()
        assert _content(sums) == at_once
    assert moment > 2 * PIECES


def test_commands_side_by_side_add_up_one_after_the_other(sums: EntryFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(entries, "PARTS_AT_ONCE", 1)

    def work_on(chosen: range) -> None:
        for chunk in chosen:
            _compute(sums, chunk)
            sums.add_up()

    commands = [threading.Thread(target=work_on, args=(range(first, PIECES, 3),)) for first in range(3)]
    for command in commands:
        command.start()
    for command in commands:
        command.join()
    (path,) = sums.finished()
    assert [path.name] == list(_content(sums))
    together = path.read_bytes()
    path.unlink()
    work_on(range(PIECES))
    assert path.read_bytes() == together


def test_parts_that_nothing_needs_any_more_are_removed(sums: EntryFolder) -> None:
    for chunk in range(PIECES):
        _compute(sums, chunk)
    late = {path: path.read_bytes() for path in sums.file((0, 1)).parent.glob("entries-*.part-*")}
    sums.add_up()
    # A task may run twice; its second writer comes too late.
    for path, content in late.items():
        path.write_bytes(content)
    of_other_chunks = sums.file((1, 2 * PIECES)).with_suffix(".part-00000001-00000003.safetensors")
    of_other_chunks.write_bytes(b"")
    sums.add_up()
    assert len(_content(sums)) == 1


def test_a_part_of_other_settings_is_refused(sums: EntryFolder, tmp_path: Path) -> None:
    for chunk in range(PIECES):
        _compute(sums, chunk)
    settings = ShardFolder.open(next((tmp_path / "shards").iterdir())).settings
    other = ShardFolder.create(
        tmp_path, dataclasses.replace(settings, rule="euler"), [Parameter(name="w", shape=(), dtype="float32")], {}
    )
    for path in sums.file((0, 1)).parent.glob("entries-*"):
        path.rename(other.path / path.name)
    moved = EntryFolder(other, [(1, 2 * PIECES)], [(0, 2 * PIECES)], lambda start, stop: [(1, start, stop)])
    with pytest.raises(FormatError, match="it does not belong here: remove it and replay again"):
        moved.add_up()


def test_sums_of_steps_that_were_recorded_anew_are_removed(sums: EntryFolder) -> None:
    for chunk in range(PIECES):
        _compute(sums, chunk)
    folder = sums.file((0, 1)).parent
    assert entries.remove_stale(folder, [(0, 14)], lambda start, stop: [(1, start, stop)]) == 0
    again = [(1, 0, 6), (2, 6, 14)]

    def attempts_within(start: int, stop: int) -> list[tuple[int, int, int]]:
        cut = [(number, max(start, first), min(stop, last)) for number, first, last in again]
        return [entry for entry in cut if entry[1] < entry[2]]

    assert entries.remove_stale(folder, [(0, 14)], attempts_within) == 4
    assert [name.rpartition("-")[2] for name in sorted(_content(sums))] == [
        "00000002.safetensors",
        "00000004.safetensors",
        "00000006.safetensors",
    ]


def test_a_sum_that_lacks_steps_which_the_run_now_has_is_removed(sums: EntryFolder) -> None:
    for chunk in range(PIECES):
        _compute(sums, chunk)
    sums.add_up()
    folder = sums.file((0, 1)).parent
    with_gap = EntryFolder(
        ShardFolder.open(folder), [(0, 14)], [(0, 4), (6, 14)], lambda start, stop: [(1, start, stop)]
    )
    for chunk in (0, 1, 3, 4, 5, 6):
        _compute(with_gap, chunk)
    with_gap.add_up()
    assert with_gap.unfinished() == []
    attempts = lambda start, stop: [(1, start, stop)]  # noqa: E731
    assert entries.remove_stale(folder, [(0, 4), (6, 14)], attempts) == 1  # that of the fixture, without the gap
    assert [path.name for path in with_gap.finished()] == ["entries-00000000-00000014.safetensors"]
    assert entries.remove_stale(folder, [(0, 14)], attempts) == 1
    assert not _content(sums)
