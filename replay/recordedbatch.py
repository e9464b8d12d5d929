"""The updates' own batches: from their recorded tensors, or collated again from their indices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from recorder import tensorfile
from recorder.batches import take_apart, to_device
from recorder.errors import MismatchError
from recorder.steps import MicroBatch, Step
from recorder.workload import Workload


class RecordedBatch:
    """The update's own batch, from its recorded tensors or collated again from its indices.

    Parameters
    ----------
    name
        What it is called.
    workload
        Collates where tensors were not recorded.
    device
        Where the micro-batches go.
    """

    fixed = False
    sampled = False
    micro_batch: int | str = "recorded"

    def __init__(self, name: str, workload: Workload, device: torch.device) -> None:
        self.name = name
        self._workload = workload
        self._device = device
        self.settings: dict[str, Any] = {}

    def micro_batches(self, step: Step) -> Sequence[Any]:
        """Return the micro-batches of the recorded update.

        Parameters
        ----------
        step
            The recorded step.

        Returns
        -------
        list
            One batch for each micro-batch.
        """
        return [
            to_device(recorded_or_collated(self._workload, step, micro_batch), self._device)
            for micro_batch in step.micro_batches
        ]


def recorded_or_collated(workload: Workload, step: Step, micro_batch: MicroBatch) -> Any:
    """Return a recorded micro-batch, collated again from its indices if its tensors were not stored.

    Parameters
    ----------
    workload
        Collates.
    step
        The step the micro-batch belongs to.
    micro_batch
        What is recorded of it.

    Returns
    -------
    Any
        The batch in host memory.
    """
    if micro_batch.stored:
        return micro_batch.batch()
    batch = workload.batch(micro_batch.indices.tolist(), split="train", epoch=step.epoch)
    if micro_batch.checksums:
        verify_collation(batch, step, micro_batch)
    return batch


def verify_collation(batch: Any, step: Step, micro_batch: MicroBatch) -> None:
    """Compare a batch collated again with the checksums of the recorded one.

    Parameters
    ----------
    batch
        What the workload collated.
    step, micro_batch
        The record.

    Raises
    ------
    MismatchError
        If any tensor differs.
    """
    _, tensors = take_apart(batch)
    found = {path: tensorfile.checksum(tensor) for path, tensor in tensors.items()}
    different = sorted(
        path for path in set(found) | set(micro_batch.checksums) if found.get(path) != micro_batch.checksums.get(path)
    )
    if different:
        message = (
            f"step {step.step}: the batch collated again from its {len(micro_batch.indices)} recorded indices is not "
            f"the recorded one: {len(different)} of {len(micro_batch.checksums)} tensors differ, first "
            f"{different[0]!r}. "
            "Either the data has changed, or it is other data, or its rows are collated in another order"
        )
        raise MismatchError(message)
