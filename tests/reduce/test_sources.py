from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recorder.errors import FormatError, UsageError
from reduce import sources
from replay.shards import Parameter, ShardFolder

Build = Callable[..., ShardFolder]


def test_steps_are_the_union_and_gaps_are_named_along_it(
    tmp_path: Path, build: Build, parameters: list[Parameter]
) -> None:
    build(tmp_path, parameters, [(0, 4), (4, 8), (100, 101), (200, 201), (300, 301)])
    build(tmp_path, parameters, [(2, 3), (9, 10), (300, 301)], loss_data="probe")
    batch, probe = sources.choose(tmp_path)
    steps = sources.all_steps([batch, probe])
    assert steps.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 100, 200, 300]
    assert sources.missing(batch, steps) == "9"
    assert sources.missing(probe, steps) == "0-1, 3-7, 100-200"
    assert sources.missing(probe, np.array([2, 9, 300])) == ""


def test_many_gaps_are_cut_short(tmp_path: Path, build: Build, parameters: list[Parameter]) -> None:
    build(tmp_path, parameters, [(step, step + 1) for step in range(1, 40, 2)])
    (source,) = sources.choose(tmp_path)
    text = sources.missing(source, np.arange(40))
    assert text.startswith("0, 2, 4, ")
    assert text.endswith(", and 12 more ranges")


def test_ambiguous_loss_data_lists_the_candidates(tmp_path: Path, build: Build, parameters: list[Parameter]) -> None:
    simpson = build(tmp_path, parameters, [(0, 3)], rule="simpson")
    adaptive = build(tmp_path, parameters, [(0, 2)], rtol=1e-5)
    probe = build(tmp_path, parameters, [(0, 2)], loss_data="probe")
    with pytest.raises(UsageError) as caught:
        sources.choose(tmp_path)
    text = str(caught.value)
    assert "loss data 'batch' was replayed with 2 settings" in text
    assert f"{simpson.settings.hash} (loss data batch, rule simpson, rtol 0.001, 3 steps)" in text
    assert f"{adaptive.settings.hash} (loss data batch, rule adaptive, rtol 1e-05, 2 steps)" in text
    assert "--settings HASH" in text
    assert probe.settings.hash not in text

    chosen = sources.choose(tmp_path, [adaptive.settings.hash])
    assert [source.folder.settings.hash for source in chosen] == [adaptive.settings.hash, probe.settings.hash]


def test_two_hashes_for_one_loss_data_are_still_ambiguous(
    tmp_path: Path, build: Build, parameters: list[Parameter]
) -> None:
    hashes = [build(tmp_path, parameters, [(0, 1)], rule=rule).settings.hash for rule in ("simpson", "euler")]
    with pytest.raises(UsageError, match="loss data 'batch' was replayed with 2 settings"):
        sources.choose(tmp_path, hashes)


def test_an_unknown_hash_lists_what_there_is(tmp_path: Path, build: Build, parameters: list[Parameter]) -> None:
    folder = build(tmp_path, parameters, [(0, 3)])
    with pytest.raises(UsageError, match=rf"no shards of settings feed; there are: {folder.settings.hash} \(loss"):
        sources.choose(tmp_path, ["feed"])


def test_another_parameter_table_is_refused_by_name(tmp_path: Path, build: Build, parameters: list[Parameter]) -> None:
    build(tmp_path, parameters, [(0, 1)])
    build(tmp_path, parameters[:-1], [(0, 1)], loss_data="probe")
    with pytest.raises(FormatError, match=r"expected the parameter table of .* found another \(different: scale\)"):
        sources.choose(tmp_path)


def test_another_run_is_refused(tmp_path: Path, build: Build, parameters: list[Parameter]) -> None:
    build(tmp_path, parameters, [(0, 1)])
    build(tmp_path, parameters, [(0, 1)], loss_data="probe", run_id="run-2")
    with pytest.raises(FormatError, match=r"expected shards of run 'run-1' as in .*, found run 'run-2'"):
        sources.choose(tmp_path)


def test_two_paths_do_not_mix_in_a_cube(tmp_path: Path, build: Build, parameters: list[Parameter]) -> None:
    build(tmp_path, parameters, [(0, 1)])
    build(tmp_path, parameters, [(0, 1)], loss_data="probe", path="chord")
    with pytest.raises(UsageError, match=r"expected shards along one path, found .*recorded.*chord"):
        sources.choose(tmp_path)
