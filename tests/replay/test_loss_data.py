"""On which examples the loss is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recorder.errors import UsageError
from recorder.runformat import Run
from recorder.steps import Step
from recorder.workload import Workload
from replay.lossdata import LossData, build, parse
from tests import cases
from tests.replay import variants

CPU = torch.device("cpu")


def _build(run: Path, text: str, workload: Workload | None = None) -> tuple[LossData, Step]:
    step = Run(run).step(0)
    (data,) = build(parse(text), workload or cases.workload(), step, CPU)
    return data, step


def _rows(batches: Any) -> list[list[int]]:
    return [row for batch in batches for row in batch["tokens"].tolist()]


@pytest.mark.parametrize(("text", "split"), [("probe:20", range(48)), ("valid:12", range(48, 64))])
def test_examples_are_drawn_once_with_the_seed_that_the_settings_tell(recorded: Path, text: str, split: range) -> None:
    data, step = _build(recorded, text)
    number = int(text.partition(":")[2])
    # As docs/formats/shards.md says it.
    drawn = sorted(np.random.default_rng(data.settings["seed"]).choice(len(split), size=number, replace=False))
    words = cases.workload().batch([split[position] for position in drawn], split="train", epoch=1)
    assert _rows(data.micro_batches(step)) == words["tokens"].tolist()
    assert [len(batch["tokens"]) for batch in data.micro_batches(step)] == [8] * (number // 8) + [number % 8]
    assert data.settings["examples"] == number
    assert data.fixed
    assert data.micro_batches(Run(recorded).step(5)) is data.micro_batches(step)


def test_other_examples_have_another_checksum(recorded: Path) -> None:
    ours, _ = _build(recorded, "probe:20")
    others, _ = _build(recorded, "probe:20", variants.other_text())
    assert {**ours.settings, "crc32": None} == {**others.settings, "crc32": None}
    assert ours.settings["crc32"] != others.settings["crc32"]


def test_batch_is_the_updates_own_from_the_recorded_tensors(recorded: Path) -> None:
    for t in (0, 3):
        step = Run(recorded).step(t)
        data, _ = _build(recorded, "batch")
        words = cases.workload().batch(torch.cat([m.indices for m in step.micro_batches]).tolist(), split="", epoch=1)
        assert _rows(data.micro_batches(step)) == words["tokens"].tolist()
        assert not data.fixed


def test_fresh_examples_are_drawn_for_every_step_with_its_number_as_the_seed(recorded: Path) -> None:
    data, _ = _build(recorded, "fresh:20")
    rows = []
    for t in (0, 3, 3):
        drawn = sorted(np.random.default_rng((data.settings["seed"], t)).choice(48, size=20, replace=False))
        words = cases.workload().batch([int(position) for position in drawn], split="train", epoch=1)
        rows.append(_rows(data.micro_batches(Run(recorded).step(t))))
        assert rows[-1] == words["tokens"].tolist()
    assert rows[0] != rows[1] == rows[2]
    assert (data.fixed, data.sampled) == (False, True)


def test_a_file_lists_the_examples_in_its_own_order(recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("5\n\n 3\n11\n")
    data, step = _build(recorded, f"mine=file:{tmp_path / 'ids'}")
    assert data.name == "mine"
    assert (
        _rows(data.micro_batches(step)) == cases.workload().batch([5, 3, 11], split="train", epoch=1)["tokens"].tolist()
    )
    assert (data.fixed, data.sampled) == (True, False)


def test_a_column_of_groups_makes_a_loss_data_of_each_and_one_of_all(recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "ids.csv").write_text("group,index\nverbs,5\nnouns,3\nverbs,11\n")
    step = Run(recorded).step(0)
    built = build(parse(f"words=file:{tmp_path / 'ids.csv'}"), cases.workload(), step, CPU)
    assert [data.name for data in built] == ["words/nouns", "words/verbs", "words"]
    rows = [_rows(data.micro_batches(step)) for data in built]
    assert rows[2] == rows[0] + rows[1]
    assert rows[1] == cases.workload().batch([5, 11], split="train", epoch=1)["tokens"].tolist()
    assert list(built[2].settings["groups"]) == ["words/nouns", "words/verbs"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "lists no example"),
        ("index,group\n", "lists no example"),
        ("1\n2\n1\n", "line 3: example 1 is listed twice"),
        ("index\n1\nx\n", "line 3: expected index, found 'x'"),
        ("index,group\n1,a\n2\n", "line 3: expected index and group, found '2'"),
        ("number,group\n1,a\n", "expected a column 'index' \\(and 'group' for groups\\), found number, group"),
        ("1\n900\n", "lists 1 examples that the split 'train' does not have, first 900; it has 48"),
    ],
)
def test_a_file_that_lists_no_examples_of_the_split_is_refused(
    recorded: Path, tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "ids").write_text(content)
    with pytest.raises(UsageError, match=message):
        _build(recorded, f"file:{tmp_path / 'ids'}")


def test_a_file_that_is_not_there_is_named(recorded: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere: cannot be read as a list of examples"):
        _build(recorded, f"file:{tmp_path / 'nowhere'}")


@pytest.mark.parametrize("text", ["probe", "probe:0", "probe:x", "batch:3", "file:", "=batch", "a b=batch", "other:3"])
def test_what_is_no_loss_data_is_answered_with_what_is(text: str) -> None:
    with pytest.raises(UsageError, match="expected batch, probe:N, valid:N, fresh:N or file:PATH"):
        parse(text)


def test_a_name_before_it_calls_a_loss_data_otherwise() -> None:
    assert (parse("early=probe:4").name, parse("early=probe:4").kind) == ("early", "probe")
    assert parse("file:a:b.csv:valid").file == "a:b.csv"
