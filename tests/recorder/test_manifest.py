from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recorder.errors import DamagedFileError, FormatError, UsageError
from recorder.manifest import MANIFEST_FILE, Attempt, Manifest, OptimizerFacts, Trainer
from recorder.table import COMPONENTS, Parameter

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=4,
)
json_objects = st.dictionaries(st.text(), json_values, max_size=3)
names = st.text(min_size=1, max_size=20)

parameters = st.builds(
    Parameter,
    name=names,
    aliases=st.lists(names, max_size=2).map(tuple),
    shape=st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    status=st.sampled_from(["trained", "untrained", "not_recorded"]),
    layer=names,
    stack=names,
    depth=st.integers(-1, 99),
    component=st.sampled_from(COMPONENTS),
)
attempts = st.builds(
    Attempt,
    number=st.integers(1, 999),
    first_step=st.integers(0, 99),
    joined=names,
    state=names,
    processes=st.integers(1, 8),
    created=st.text(),
    stop=st.none() | st.integers(0, 99),
)
manifests = st.builds(
    Manifest,
    run_id=names,
    path=st.just("recorded"),
    workload=st.none() | names,
    trainer=st.builds(
        Trainer, name=names, version=names, arguments=st.lists(st.text(), max_size=3).map(tuple), directory=st.text()
    ),
    optimizer=st.builds(
        OptimizerFacts, name=names, groups=st.lists(json_objects, max_size=2).map(tuple), fresh=st.booleans()
    ),
    recipe=json_objects,
    batches=st.sampled_from(["store", "indices"]),
    parameters=st.lists(parameters, max_size=3).map(tuple),
    attempts=st.lists(attempts, min_size=1, max_size=3).map(tuple),
    steps=names,
    buffers=st.lists(names, max_size=2).map(tuple),
    files=st.dictionaries(names, st.integers(0, 2**32 - 1), max_size=2),
    unrecorded_changes=st.lists(names, max_size=2).map(tuple),
    provenance=json_objects,
)

EXAMPLE = Manifest(
    run_id="0" * 32,
    path="recorded",
    workload="my_project.train:workload",
    trainer=Trainer(name="torch", version="2.13.0"),
    optimizer=OptimizerFacts(name="torch.optim.adam.Adam", groups=({"lr": 0.1, "parameters": ["w"]},), fresh=True),
    recipe={"threads": 2},
    batches="store",
    parameters=(Parameter(name="w", shape=(2, 3), dtype="float32", aliases=("v",)),),
    attempts=(Attempt(number=1, first_step=0, joined="first", state="complete", stop=9),),
    provenance={},
)


@settings(max_examples=60, deadline=None)
@given(manifest=manifests)
def test_a_manifest_comes_back_from_its_file_as_it_was(
    manifest: Manifest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = tmp_path_factory.mktemp("run")
    manifest.write(run)
    assert Manifest.read(run) == manifest


def test_writing_again_replaces_the_manifest_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    EXAMPLE.write(tmp_path)
    ended = dataclasses.replace(EXAMPLE.attempt, state="incomplete: training ended with KeyboardInterrupt")
    later = dataclasses.replace(EXAMPLE, attempts=(ended,))
    later.write(tmp_path)
    assert Manifest.read(tmp_path) == later
    assert [file.name for file in tmp_path.iterdir()] == [MANIFEST_FILE]


def test_trained_lists_only_what_is_in_the_ledger() -> None:
    frozen = dataclasses.replace(EXAMPLE.parameters[0], name="u", status="untrained")
    manifest = dataclasses.replace(EXAMPLE, parameters=(frozen, *EXAMPLE.parameters))
    assert manifest.trained == EXAMPLE.parameters


def test_the_state_of_a_run_is_that_of_its_last_attempt() -> None:
    second = Attempt(number=2, first_step=4, joined="verified", state="recording")
    manifest = dataclasses.replace(EXAMPLE, attempts=(*EXAMPLE.attempts, second))
    assert manifest.attempt == second
    assert (EXAMPLE.state, manifest.state) == ("complete", "recording")


def test_a_flipped_bit_anywhere_in_the_file_is_noticed(tmp_path: Path) -> None:
    EXAMPLE.write(tmp_path)
    file = tmp_path / MANIFEST_FILE
    whole = file.read_bytes()
    unnoticed = []
    for position in range(len(whole)):
        bit = (1 << (position % 8), 0x20, 0x80)[position % 3]  # 0x20 turns a letter's case, 0x80 leaves ASCII
        damaged = bytearray(whole)
        damaged[position] ^= bit
        file.write_bytes(damaged)
        try:
            Manifest.read(tmp_path)
        except FormatError:
            continue
        unnoticed.append((position, bit))
    assert unnoticed == []


def test_a_manifest_changed_by_hand_is_refused_as_damaged(tmp_path: Path) -> None:
    EXAMPLE.write(tmp_path)
    file = tmp_path / MANIFEST_FILE
    file.write_text(file.read_text().replace('"complete"', '"recording"'))
    with pytest.raises(DamagedFileError, match=r"manifest\.json: is damaged: it fails its own CRC-32"):
        Manifest.read(tmp_path)


def test_all_missing_and_unknown_fields_are_named_at_once() -> None:
    document = EXAMPLE.to_dict() | {"colour": "red", "zeal": 1}
    del document["recipe"], document["batches"], document["unrecorded_changes"]  # the last has a default
    expected = "there: missing fields ['batches', 'recipe'], unknown fields ['colour', 'zeal']"
    with pytest.raises(FormatError, match=f"^{re.escape(expected)}$"):
        Manifest.from_dict(document, "there")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"version": 2}, "'lossledger-run' version 2"),
        ({"version": "1"}, "'lossledger-run' version '1'"),
        ({"format": "lossledger-shards"}, "'lossledger-shards' version 1"),
        ({"format": None, "version": None}, "None version None"),
    ],
)
def test_another_format_or_version_is_refused_with_expected_and_found(changes: dict[str, Any], found: str) -> None:
    document = EXAMPLE.to_dict() | changes | {"unknown": "a newer version's field is not the problem to name"}
    expected = f"there: expected format lossledger-run version 1, found {found}"
    with pytest.raises(FormatError, match=f"^{re.escape(expected)}$"):
        Manifest.from_dict(document, "there")


@pytest.mark.parametrize(
    "changes",
    [
        {"trainer": {"name": "torch"}},
        {"trainer": {"name": "torch", "version": "2", "colour": "red"}},
        {"trainer": None},
        {"optimizer": {"name": "Adam", "fresh": True}},
        {"optimizer": []},
        {"parameters": 5},
        {"parameters": ["w"]},
        {"parameters": [{"name": "w", "shape": 3, "dtype": "float32"}]},
        {"attempts": 1},
        {"attempts": [{"number": 1}]},
        {"attempts": [{**dataclasses.asdict(EXAMPLE.attempt), "colour": "red"}]},
        {"buffers": 1},
        {"unrecorded_changes": 1},
    ],
    ids=str,
)
def test_a_manifest_with_an_entry_of_the_wrong_kind_is_a_format_error(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=r"there: .* not understood"):
        Manifest.from_dict(EXAMPLE.to_dict() | changes, "there")


def test_a_missing_folder_and_a_folder_that_is_no_run_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such run folder: .*nowhere"):
        Manifest.read(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"is no run: it holds no manifest\.json.*recorder\.watch"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": "lossled', r"manifest\.json: cannot be read as JSON"),
        (b"\xff\xfe", r"manifest\.json: cannot be read as JSON"),
        (b"[1]", r"manifest\.json: expected a JSON object, found list"),
    ],
)
def test_a_broken_manifest_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / MANIFEST_FILE).write_bytes(content)
    with pytest.raises(FormatError, match=message):
        Manifest.read(tmp_path)


def test_a_manifest_is_strict_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        dataclasses.replace(EXAMPLE, recipe={"threads": float("inf")}).write(tmp_path)
    EXAMPLE.write(tmp_path)
    assert json.loads((tmp_path / MANIFEST_FILE).read_text(), parse_constant=pytest.fail)["version"] == 1
