from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recorder import batches
from recorder.errors import FormatError

tensors = st.builds(
    lambda shape, dtype: torch.arange(math.prod(shape)).reshape(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=2),
    st.sampled_from([torch.float32, torch.int64, torch.bool, torch.bfloat16]),
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors
nests: st.SearchStrategy[Any] = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right or (left != left and right != right))  # NaN


@settings(max_examples=150, deadline=None)
@given(batch=nests)
def test_a_batch_comes_back_from_strict_json_and_its_tensors(batch: Any) -> None:
    nest, taken = batches.take_apart(batch)
    text = json.dumps(nest, allow_nan=False)
    assert same(batches.put_together(json.loads(text), taken.__getitem__), batch)


def test_the_tensors_are_named_by_their_path_and_are_copies_in_host_memory() -> None:
    ids, tokens = torch.tensor([3, 1]), torch.ones(2, 3).t()
    nest, taken = batches.take_apart({"id": ids, "net_input": {"src": [tokens, 7]}})
    assert set(taken) == {"batch.id", "batch.net_input.src.0"}
    assert nest["dict"]["net_input"]["dict"]["src"]["list"] == [{"tensor": "batch.net_input.src.0"}, {"value": 7}]
    ids.zero_()  # a loader that reuses its buffers
    assert taken["batch.id"].tolist() == [3, 1]
    assert taken["batch.net_input.src.0"].is_contiguous()


def test_keys_with_dots_never_make_two_tensors_one() -> None:
    batch = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}, "a.b'": torch.tensor(3)}
    nest, taken = batches.take_apart(batch)
    assert len(taken) == 3
    assert same(batches.put_together(nest, taken.__getitem__), batch)


def test_a_tensor_that_wants_a_gradient_is_recorded_without_its_graph() -> None:
    leaf = torch.ones(2, requires_grad=True)
    _, taken = batches.take_apart([leaf * 2])
    assert not taken["batch.0"].requires_grad


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_has_no_word_for_become_text(number: float) -> None:
    nest, _ = batches.take_apart({"weight": number, "numpy": np.float32(number)})
    assert nest == {"dict": {"weight": {"float": repr(number)}, "numpy": {"float": repr(number)}}}


def test_numpy_scalars_become_plain_numbers() -> None:
    nest, _ = batches.take_apart([np.int64(5), np.float64(0.5), np.bool_(True)])
    assert nest == {"list": [{"value": 5}, {"value": 0.5}, {"value": True}]}
    assert [type(entry["value"]) for entry in nest["list"]] == [int, float, bool]


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"a": [0, {1, 2}]}, r"a batch holds a set at 'batch\.a\.1'"),
        ({"net": {"x": np.zeros(2)}}, r"a batch holds a ndarray at 'batch\.net\.x'"),
        (object(), "a batch holds a object at 'batch'"),
        ([{"a": {1: 2}}], r"dict at 'batch\.0\.a' has keys that are no text"),
    ],
)
def test_what_cannot_be_recorded_is_named_with_its_path(batch: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        batches.take_apart(batch)


def test_a_node_of_unknown_kind_is_refused() -> None:
    with pytest.raises(FormatError, match="a node of unknown kind 'set'"):
        batches.put_together({"list": [{"set": []}]}, lambda path: torch.zeros(0))


def test_moving_to_a_device_keeps_the_nest() -> None:
    batch = {"a": [torch.ones(2), (None, 3)], "b": "text"}
    moved = batches.to_device(batch, torch.device("meta"))
    assert moved["a"][0].device.type == "meta"
    assert (moved["a"][1], moved["b"]) == ((None, 3), "text")
