"""The run as docs/formats/run.md describes it: read with nothing but json, struct and zlib."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from recorder.manifest import Manifest, OptimizerFacts, Trainer
from recorder.ranges import describe_ranges
from recorder.runformat import Run
from recorder.table import COMPONENTS, Parameter
from recorder.tensorfile import _DTYPE_CODES
from tests.cases import train

PAGE = (Path(__file__).parents[2] / "docs" / "formats" / "run.md").read_text(encoding="utf-8")

_LETTERS = {"F64": "d", "F32": "f", "I64": "q", "U8": "B", "BOOL": "?"}


def read_tensor_file(path: Path) -> tuple[dict[str, Any], dict[str, tuple[list[int], list[float]]]]:
    """Facts, and of every tensor its shape and its entries in row-major order, all checked as the page asks."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header, data = raw[8 : 8 + length].rstrip(b" "), raw[8 + length :]
    assert re.fullmatch(rb'[0-9a-f]{8}"}}', header[-11:])
    assert int(header[-11:-3], 16) == zlib.crc32(header[:-11])
    entries = json.loads(header, parse_constant=pytest.fail)
    metadata = entries.pop("__metadata__")
    assert list(metadata) == ["facts", "crc32", "header_crc32"]
    checksums = json.loads(metadata["crc32"])
    assert set(checksums) == set(entries)
    tensors = {}
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        assert zlib.crc32(data[start:stop]) == checksums[name]
        letter = _LETTERS[entry["dtype"]]
        number = (stop - start) // struct.calcsize(f"<{letter}")
        tensors[name] = (entry["shape"], list(struct.unpack(f"<{number}{letter}", data[start:stop])))
    assert len(data) == max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    return json.loads(metadata["facts"], parse_constant=pytest.fail), tensors


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("format") / "run"
    train(folder, steps=3, segment_steps=2, micro_batches=2)
    return folder


def test_the_folder_holds_what_the_page_shows(run: Path) -> None:
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert files == [
        "manifest.json",
        "segments/00000000-00000002.safetensors",
        "segments/00000002-00000003.safetensors",
        "untrained.safetensors",
    ]


def test_a_segment_is_read_without_any_library(run: Path) -> None:
    opened = Run(run)
    facts, tensors = read_tensor_file(run / "segments" / "00000000-00000002.safetensors")
    assert (facts["format"], facts["version"], facts["start"], facts["stop"]) == ("lossledger-run", 1, 0, 2)
    names = {parameter.name for parameter in opened.manifest.parameters}
    expected = {f"parameters/{t:08d}/{name}" for t in (0, 1, 2) for name in names}
    expected |= {f"{kind}/{t:08d}/{m}" for kind in ("indices", "rng_cpu") for t in (0, 1) for m in (0, 1)}
    expected |= {f"batches/{t:08d}/{m}/batch.tokens" for t in (0, 1) for m in (0, 1)}
    assert set(tensors) == expected
    for t in (0, 1, 2):
        for name, tensor in opened.parameters(t).items():
            assert tensors[f"parameters/{t:08d}/{name}"] == (list(tensor.shape), tensor.flatten().tolist())
    for row in facts["steps"]:
        step = opened.step(row["step"])
        assert (row["epoch"], row["seed"], row["learning_rates"]) == (1, 1, [0.01])
        assert row["gradient_norm"] == step.gradient_norm
        for number, (entry, micro_batch) in enumerate(zip(row["micro_batches"], step.micro_batches, strict=True)):
            prefix = f"{row['step']:08d}/{number}"
            assert entry["nest"] == {"dict": {"tokens": {"tensor": "batch.tokens"}}}
            shape, tokens = tensors[f"batches/{prefix}/batch.tokens"]
            assert entry["checksums"] == {"batch.tokens": zlib.crc32(struct.pack(f"<{len(tokens)}q", *tokens))}
            assert micro_batch.batch()["tokens"].flatten().tolist() == tokens
            assert shape == [8, 7]
            assert tensors[f"indices/{prefix}"] == ([8], micro_batch.indices.tolist())
            assert (entry["loss_sum"], entry["predictions"]) == (micro_batch.loss_sum, 48.0)


def test_two_segments_hold_their_border_with_the_same_bits(run: Path) -> None:
    _, first = read_tensor_file(run / "segments" / "00000000-00000002.safetensors")
    _, second = read_tensor_file(run / "segments" / "00000002-00000003.safetensors")
    border = {name: entries for name, entries in first.items() if name.startswith("parameters/00000002/")}
    assert border
    assert border == {name: entries for name, entries in second.items() if name in border}


def test_a_resumed_optimizers_state_is_read_without_any_library(tmp_path: Path) -> None:
    tensors: list[torch.Tensor] = []

    def resumed(parameters: Any) -> torch.optim.Optimizer:
        tensors.extend(parameters)
        optimizer = torch.optim.Adam(tensors, lr=0.01)
        for tensor in tensors:
            tensor.grad = torch.full_like(tensor, 2.0)
        optimizer.step()
        optimizer.zero_grad()
        return optimizer

    train(tmp_path / "run", steps=1, make_optimizer=resumed)
    facts, found = read_tensor_file(tmp_path / "run" / "optimizer.safetensors")
    assert (facts["format"], facts["version"], facts["scalars"]) == ("lossledger-run", 1, {})
    assert set(found) == {f"{i}/{key}" for i in range(len(tensors)) for key in ("step", "exp_avg", "exp_avg_sq")}
    assert found["0/step"] == ([], [1.0])
    shape, average = found["0/exp_avg"]
    assert shape == list(tensors[0].shape)
    assert average == pytest.approx([0.2] * tensors[0].numel())


def test_the_page_names_every_field_of_the_manifest_and_its_rows(run: Path) -> None:
    documented = set(re.findall(r"`([a-z_0-9]+)`", PAGE))
    fields = {
        field.name for kind in (Manifest, Trainer, OptimizerFacts, Parameter) for field in dataclasses.fields(kind)
    }
    facts, _ = read_tensor_file(run / "segments" / "00000000-00000002.safetensors")
    fields |= set(facts) | set(facts["steps"][0]) | set(facts["steps"][0]["micro_batches"][0])
    document = json.loads((run / "manifest.json").read_text())
    fields |= set(document) | set(document["recipe"]) | set(document["provenance"]) | set(document["parameters"][0])
    assert fields - documented == set()
    assert f"`{' '.join(COMPONENTS)}`" in PAGE
    assert f"`{' '.join(sorted(_DTYPE_CODES.values(), key=PAGE.find))}`" in PAGE


def test_the_manifest_begins_with_format_and_version(run: Path) -> None:
    document = json.loads((run / "manifest.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert list(document.items())[:2] == [("format", "lossledger-run"), ("version", 1)]
    assert document["optimizer"]["fresh"] is True
    assert document["optimizer"]["groups"][0]["betas"] == [0.9, 0.999]
    assert describe_ranges(Run(run).segments) == "steps 0-2"
