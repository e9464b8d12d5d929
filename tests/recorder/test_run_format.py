"""The run as docs/formats/run.md and step-coding.md describe it: read with json, struct, zlib, NumPy and zstd alone."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import recorder
from recorder.manifest import Attempt, Manifest, OptimizerFacts, Trainer
from recorder.ranges import describe_ranges
from recorder.runformat import Run
from recorder.selection import GRAMMAR
from recorder.table import COMPONENTS, Parameter, Part
from recorder.tensorfile import _DTYPE_CODES, content
from tests.cases import train
from tests.recorder.test_codec import decoded_by_the_page

# The small models below have names that no naming rule knows.
pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")

PAGE = (Path(__file__).parents[2] / "docs" / "formats" / "run.md").read_text(encoding="utf-8")

_LETTERS = {"F64": "d", "F32": "f", "I64": "q", "U8": "B", "BOOL": "?"}
_WIDTHS = {"float64": 8, "float32": 4, "bfloat16": 2, "int64": 8, "bool": 1}

Tensors = dict[str, tuple[list[int], bytes]]
Theta = dict[str, bytes]


def read_manifest(run: Path) -> dict[str, Any]:
    """The manifest, its checksum checked as the page asks."""
    text = (run / "manifest.json").read_bytes()
    covered, digits = text.split(b',\n "crc32": "')
    assert re.fullmatch(rb'[0-9a-f]{8}"\n}\n', digits)
    assert int(digits[:8], 16) == zlib.crc32(covered)
    document: dict[str, Any] = json.loads(text, parse_constant=pytest.fail)
    assert (document["format"], document["version"]) == ("lossledger-run", 1)
    return document


def read_tensor_file(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Facts, and of every tensor its shape and its bytes, all checked as the page asks."""
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    assert length % 8 == 0
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
        tensors[name] = (entry["shape"], data[start:stop])
    assert len(data) == max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    facts = json.loads(metadata["facts"], parse_constant=pytest.fail)
    assert (facts["format"], facts["version"]) == ("lossledger-run", 1)
    return facts, tensors


def numbers(tensor: tuple[list[int], bytes], code: str) -> list[float]:
    count = len(tensor[1]) // struct.calcsize(f"<{_LETTERS[code]}")
    return list(struct.unpack(f"<{count}{_LETTERS[code]}", tensor[1]))


def read_thetas(facts: dict[str, Any], tensors: Tensors) -> dict[int, dict[str, Theta]]:
    """Every θ of a segment: T → parameters or buffers → name → bytes."""
    slots = [(kind, name, dtype, int(np.prod(shape, dtype=int))) for kind, name, dtype, shape in facts["layout"]]
    dtypes = list(dict.fromkeys(dtype for _, _, dtype, _ in slots))
    first, *others = facts["states"]
    keyframe = dict.fromkeys(dtypes, b"")
    for kind, name, dtype, _ in slots:
        keyframe[dtype] += tensors[f"{kind}/{first:08d}/{name}"][1]
    vectors = {first: {dtype: np.frombuffer(raw, f"<u{_WIDTHS[dtype]}") for dtype, raw in keyframe.items()}}
    previous, before = vectors[first], None
    for t in others:
        now = {}
        for dtype in dtypes:
            _, coded = tensors[f"coded/{t:08d}/{dtype}"]
            decoded = decoded_by_the_page(coded, dtype, previous[dtype], before[dtype] if before else None)
            now[dtype] = np.array(decoded, f"<u{_WIDTHS[dtype]}")
        vectors[t], before, previous = now, previous, now
    thetas: dict[int, dict[str, Theta]] = {}
    for t, of_dtype in vectors.items():
        thetas[t], used = {"parameters": {}, "buffers": {}}, dict.fromkeys(dtypes, 0)
        for kind, name, dtype, size in slots:
            thetas[t][kind][name] = of_dtype[dtype][used[dtype] : used[dtype] + size].tobytes()
            used[dtype] += size
        assert all(used[dtype] == len(of_dtype[dtype]) for dtype in dtypes)
    return thetas


def read_timeline(run: Path) -> dict[int, Path]:
    """Step → the segment of process 0 that it is read from."""
    timeline: dict[int, Path] = {}
    for attempt in read_manifest(run)["attempts"]:
        own: dict[int, Path] = {}
        for file in sorted((run / "segments").glob(f"{attempt['number']:03d}-*.safetensors")):
            facts, _ = read_tensor_file(file)
            own |= {row["step"]: file for row in facts["steps"]}
        if own:
            timeline = {t: file for t, file in timeline.items() if t < attempt["first_step"]} | own
    return timeline


def assert_read_alike(run: Path) -> None:
    """What the pages say and what `Run` reads are the same, for every step and θ of the run."""
    opened = Run(run)
    timeline = read_timeline(run)
    assert sorted(timeline) == opened.steps
    untrained = {name: raw for name, (_, raw) in read_tensor_file(run / "untrained.safetensors")[1].items()}
    read = {file: read_thetas(*read_tensor_file(file)) for file in set(timeline.values())}
    for t, file in timeline.items():
        for number in (t, t + 1):
            found = read[timeline.get(number, file)][number]
            parameters = {name: bytes(content(tensor)) for name, tensor in opened.parameters(number).items()}
            assert parameters == {name: found["parameters"].get(name, untrained.get(name)) for name in parameters}
            assert set(found["parameters"]) <= set(parameters)
            assert found["buffers"] == {name: bytes(content(tensor)) for name, tensor in opened.buffers(number).items()}


# --- A run of one attempt -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("format") / "run"
    train(folder, steps=3, segment_steps=2, micro_batches=2)
    return folder


def test_the_folder_holds_what_the_page_shows(run: Path) -> None:
    files = sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
    assert files == [
        ".lock",
        "manifest.json",
        "segments/001-00000000-00000002.safetensors",
        "segments/001-00000002-00000003.safetensors",
        "untrained.safetensors",
    ]


def test_a_segment_is_read_without_any_library_of_ours(run: Path) -> None:
    opened = Run(run)
    facts, tensors = read_tensor_file(run / "segments" / "001-00000000-00000002.safetensors")
    assert (facts["start"], facts["stop"], facts["attempt"], facts["rank"]) == (0, 2, 1, 0)
    assert (facts["run_id"], facts["states"]) == (opened.manifest.run_id, [0, 1, 2])
    names = {parameter.name for parameter in opened.manifest.parameters}
    expected = {f"parameters/00000000/{name}" for name in names} | {f"coded/{t:08d}/float32" for t in (1, 2)}
    expected |= {f"{kind}/{t:08d}/{m}" for kind in ("indices", "rng_cpu") for t in (0, 1) for m in (0, 1)}
    expected |= {f"batches/{t:08d}/{m}/batch.tokens" for t in (0, 1) for m in (0, 1)}
    assert set(tensors) == expected
    for row in facts["steps"]:
        step = opened.step(row["step"])
        assert (row["epoch"], row["seed"], row["learning_rates"]) == (1, 1, [0.01])
        assert row["gradient_norm"] == step.gradient_norm
        for number, (entry, micro_batch) in enumerate(zip(row["micro_batches"], step.micro_batches, strict=True)):
            prefix = f"{row['step']:08d}/{number}"
            assert entry["nest"] == {"dict": {"tokens": {"tensor": "batch.tokens"}}}
            tokens = tensors[f"batches/{prefix}/batch.tokens"]
            assert entry["checksums"] == {"batch.tokens": zlib.crc32(tokens[1])}
            assert micro_batch.batch()["tokens"].flatten().tolist() == numbers(tokens, "I64")
            assert tokens[0] == [8, 7]
            indices = tensors[f"indices/{prefix}"]
            assert (indices[0], numbers(indices, "I64")) == ([8], micro_batch.indices.tolist())
            assert (entry["loss_sum"], entry["predictions"]) == (micro_batch.loss_sum, 48.0)


def test_every_theta_is_read_without_any_library_of_ours(run: Path) -> None:
    assert_read_alike(run)


def test_two_segments_hold_their_border_with_the_same_bits(run: Path) -> None:
    first = read_thetas(*read_tensor_file(run / "segments" / "001-00000000-00000002.safetensors"))
    second = read_thetas(*read_tensor_file(run / "segments" / "001-00000002-00000003.safetensors"))
    assert first[2]["parameters"]
    assert first[2] == second[2]


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
    assert (facts["kind"], facts["scalars"]) == ("optimizer", {})
    assert set(found) == {f"{i}/{key}" for i in range(len(tensors)) for key in ("step", "exp_avg", "exp_avg_sq")}
    assert (found["0/step"][0], numbers(found["0/step"], "F32")) == ([], [1.0])
    assert found["0/exp_avg"][0] == list(tensors[0].shape)
    assert numbers(found["0/exp_avg"], "F32") == pytest.approx([0.2] * tensors[0].numel())


# --- Attempts, selections, buffers, dtypes --------------------------------------------------------------------------


class Counting(nn.Module):
    """Parameters of several dtypes, a branch that joins late, and buffers that change."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.linear = nn.Linear(4, 4).to(torch.bfloat16)
        self.norm = nn.BatchNorm1d(4)
        self.late = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.register_buffer("odd", torch.tensor([True, False, True]))
        self.joined = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.odd.logical_not_()  # type: ignore[operator]
        x = self.norm(self.linear(x.to(torch.bfloat16)).float())
        return (self.late(x) if self.joined else x).double() * self.scale


def record(run: Path, model: Counting, span: range, **watch_arguments: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorder.watch(model, optimizer, run=run, first_step=span.start, segment_steps=3, **watch_arguments) as rec:
        for t in span:
            model.joined = t >= 4
            rec.batch([t])
            model(torch.randn(5, 4, generator=torch.Generator().manual_seed(t))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_attempts_late_parameters_buffers_and_other_dtypes_are_read_without_any_library_of_ours(tmp_path: Path) -> None:
    model, again = Counting(), Counting()
    record(tmp_path / "run", model, range(7))
    record(tmp_path / "other", again, range(3))
    record(tmp_path / "run", again, range(3, 6))
    document = read_manifest(tmp_path / "run")
    assert [attempt["first_step"] for attempt in document["attempts"]] == [0, 3]
    assert set(document["buffers"]) == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "odd"}
    assert max(read_timeline(tmp_path / "run")) == 5
    assert_read_alike(tmp_path / "run")


def test_selected_steps_are_read_without_any_library_of_ours(tmp_path: Path) -> None:
    record(tmp_path / "run", Counting(), range(14), steps="0:3,6::4")
    assert list(read_timeline(tmp_path / "run")) == [0, 1, 2, 6, 10]
    facts, _ = read_tensor_file(tmp_path / "run" / "segments" / "001-00000006-00000011.safetensors")
    assert facts["states"] == [6, 7, 10, 11]
    assert_read_alike(tmp_path / "run")


# --- A segment in the making ----------------------------------------------------------------------------------------


def test_a_segment_in_the_making_is_recovered_as_the_page_says(tmp_path: Path) -> None:
    model = Counting()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorder.watch(model, optimizer, run=tmp_path) as rec:
        for t in range(3):
            rec.batch([t])
            model(torch.randn(5, 4, generator=torch.Generator().manual_seed(t))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        rec.flush()
        data = (tmp_path / "segments" / ".001-00000000.growing").read_bytes()
        journal = (tmp_path / "segments" / ".001-00000000.journal").read_bytes()
    lines = []
    for line in journal.splitlines():
        digits, text = line[:8], line[9:]
        assert int(digits, 16) == zlib.crc32(text)
        lines.append(json.loads(text, parse_constant=pytest.fail))
    start = lines[0]["data_start"]
    assert data[:start] == b" " * start
    appends = lines[1:]
    tensors = {}
    for append in appends:
        for name, entry in append["tensors"].items():
            first, stop = entry["data_offsets"]
            tensors[name] = (entry["shape"], data[start + first : start + stop])
            assert zlib.crc32(tensors[name][1]) == append["crc32"][name]
    rows = [append["row"] for append in appends]
    recovered = {
        **rows[0]["segment"],
        "layout": rows[0]["layout"],
        "states": [row["state"] for row in rows if row["state"] is not None],
        "steps": [row["step"] for row in rows if row["step"] is not None],
    }
    facts, sealed = read_tensor_file(tmp_path / "segments" / "001-00000000-00000003.safetensors")
    assert tensors == sealed
    assert facts == {**recovered, "format": "lossledger-run", "version": 1, "start": 0, "stop": 3}
    assert list(read_thetas(recovered, tensors)) == [0, 1, 2, 3]


# --- The page -------------------------------------------------------------------------------------------------------


def test_the_page_names_every_field_of_the_manifest_and_its_rows(run: Path) -> None:
    documented = set(re.findall(r"`([a-z_0-9]+)`", PAGE))
    kinds = (Manifest, Trainer, OptimizerFacts, Parameter, Part, Attempt)
    fields = {field.name for kind in kinds for field in dataclasses.fields(kind)}
    facts, tensors = read_tensor_file(run / "segments" / "001-00000000-00000002.safetensors")
    fields |= set(facts) | set(facts["steps"][0]) | set(facts["steps"][0]["micro_batches"][0])
    document = read_manifest(run)
    fields |= set(document) | set(document["recipe"]) | set(document["provenance"]) | set(document["parameters"][0])
    fields |= set(document["attempts"][0]) | set(read_tensor_file(run / "untrained.safetensors")[0])
    assert fields - documented == set()
    kinds_of_tensors = {name.split("/")[0] for name in tensors} | {"rng_cuda", "buffers"}
    assert {kind for kind in kinds_of_tensors if f"| `{kind}/TTTTTTTT/" not in PAGE} == set()
    assert f"`{' '.join(COMPONENTS)}`" in PAGE
    assert f"`{' '.join(sorted(_DTYPE_CODES.values(), key=PAGE.find))}`" in PAGE
    assert [term for term in re.split(", | or ", GRAMMAR) if f"| `{term}` |" not in PAGE] == []


def test_the_manifest_begins_with_format_and_version(run: Path) -> None:
    document = read_manifest(run)
    assert list(document.items())[:2] == [("format", "lossledger-run"), ("version", 1)]
    assert document["optimizer"]["fresh"] is True
    assert document["optimizer"]["groups"][0]["betas"] == [0.9, 0.999]
    assert describe_ranges(Run(run).segments) == "steps 0-2"
