from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import overhead, recorder, report, storedshare
from benchmarks.interleaved import Arm, interleave
from benchmarks.trainings import LanguageModelTraining


def _small_training() -> LanguageModelTraining:
    text = torch.arange(2000) % 37
    return LanguageModelTraining(text, vocabulary=37, layers=1, width=64, sequences=2, length=8)


def test_trainings_take_turns_in_blocks_and_each_block_is_drained() -> None:
    calls: list[str] = []
    arms = {
        name: Arm(
            step=lambda name=name: calls.append(name),  # type: ignore[misc]
            drain=lambda name=name: calls.append(f"drain {name}"),  # type: ignore[misc]
            end=lambda name=name: calls.append(f"end {name}"),  # type: ignore[misc]
        )
        for name in "xy"
    }
    timings = interleave(arms, steps=6, block=3, seed=1)
    blocks = [calls[start : start + 4] for start in range(4, len(calls), 4)]
    assert calls[:4] == ["x", "drain x", "y", "drain y"]
    assert sorted(blocks) == [[name] * 3 + [f"{last} {name}"] for name in "xy" for last in ("drain", "end")]
    assert all(len(timing.steps) == 4 and len(timing.first_steps) == 2 for timing in timings.values())


def test_the_recorder_leaves_the_trainings_of_a_benchmark_alike(tmp_path: Path) -> None:
    found = overhead.measure(_small_training, steps=6, block=3, seed=1, scratch=tmp_path)
    assert found.same
    assert found.raw_bytes == sum(weight.nbytes for weight in _small_training().model.parameters())
    assert found.stored_bytes > 0
    assert found.writer_cpu > 0
    assert not (tmp_path / "run").exists()


def test_sizes_are_measured_for_every_dtype_and_all_is_read_back(tmp_path: Path) -> None:
    rows = storedshare.measure(_small_training(), first=1, steps=4, scratch=tmp_path)
    assert [row.dtype for row in rows] == ["float32", "bfloat16", "float16"]
    assert all(row.steps == 4 and row.share > 0 for row in rows)


def test_the_page_says_what_was_reached_and_what_was_not_measured(tmp_path: Path) -> None:
    found = overhead.measure(_small_training, steps=4, block=2, seed=1, scratch=tmp_path)
    page = report.text(
        {
            "a": dataclasses.replace(found, ratio=1.029),
            "b": dataclasses.replace(found, ratio=1.101),
            "c": None,
        }
    )
    assert "≤ 1.03: reached" in page
    assert "≤ 1.1: NOT reached" in page
    assert "no GPU here: not measured" in page


def test_without_a_gpu_its_case_is_null_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert recorder.main(["--case", "c", "--json"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert printed["cases"] == {"c": None}
    assert printed["machine"]
