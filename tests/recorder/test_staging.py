from __future__ import annotations

import threading

import pytest
import torch

from recorder.layout import Layout, Slot
from recorder.staging import Staging

LARGE = 1 << 16  # entries that torch would copy with several threads


def _staging(tensors: list[torch.Tensor], copies: int = 2) -> Staging:
    layout = Layout(tuple(Slot.of("parameters", f"{number}", tensor) for number, tensor in enumerate(tensors)))
    return Staging(layout, torch.device("cpu"), copies)


TENSORS = {
    "large": torch.randn(LARGE),
    "bfloat16": torch.randn(LARGE).to(torch.bfloat16),
    "transposed": torch.randn(4, LARGE).t(),
    "channels last": torch.randn(8, 64, 16, 16).to(memory_format=torch.channels_last),
    "part of another": torch.randn(2 * LARGE)[7 : LARGE + 7],
    "NaN": torch.full((LARGE,), torch.nan),
    "int64": torch.arange(2 * LARGE, dtype=torch.int64),
    "bool": torch.arange(LARGE) % 3 == 0,
    "parameter": torch.nn.Parameter(torch.randn(2, LARGE)),
    "single number": torch.tensor(3.5),
    "empty": torch.empty(0),
}


@pytest.mark.parametrize("tensor", TENSORS.values(), ids=TENSORS)
def test_a_copy_has_the_bits_of_the_tensors(tensor: torch.Tensor) -> None:
    tensors = [torch.randn(3), tensor, torch.randn(5, 2)]
    state = _staging(tensors).copy(7, tensors)
    expected = [one.detach().clone() for one in tensors]
    for one in tensors:
        one.detach().zero_()
    copied = state.layout.views(state.vectors)
    assert state.number == 7
    assert all(
        torch.equal(found.nan_to_num(1e9), one.nan_to_num(1e9)) for found, one in zip(copied, expected, strict=True)
    )


def test_when_all_copies_are_in_use_the_training_waits_for_one_and_the_wait_is_counted() -> None:
    tensors = [torch.randn(3)]
    staging = _staging(tensors, copies=1)
    state = staging.copy(0, tensors)
    assert staging.waited == 0
    threading.Timer(0.1, state.release).start()
    second = staging.copy(1, tensors)
    assert second.vectors["float32"] is state.vectors["float32"]
    assert staging.waited > 0
