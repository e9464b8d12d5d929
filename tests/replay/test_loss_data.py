"""On which examples the loss is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recorder.runformat import Run
from recorder.steps import Step
from replay.lossdata import LossData, build, parse
from tests import cases
from tests.replay import variants

CPU = torch.device("cpu")


def _build(run: Path, text: str) -> tuple[LossData, Step]:
    step = Run(run).step(0)
    return build(parse(text), cases.workload(), step, CPU), step


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
    ours = build(parse("probe:20"), cases.workload(), Run(recorded).step(0), CPU)
    others = build(parse("probe:20"), variants.other_text(), Run(recorded).step(0), CPU)
    assert {**ours.settings, "crc32": None} == {**others.settings, "crc32": None}
    assert ours.settings["crc32"] != others.settings["crc32"]


def test_batch_is_the_updates_own_from_the_recorded_tensors(recorded: Path) -> None:
    for t in (0, 3):
        step = Run(recorded).step(t)
        data = build(parse("batch"), cases.workload(), Run(recorded).step(0), CPU)
        words = cases.workload().batch(torch.cat([m.indices for m in step.micro_batches]).tolist(), split="", epoch=1)
        assert _rows(data.micro_batches(step)) == words["tokens"].tolist()
        assert not data.fixed
