"""What is handed to the background writer: copies of θ, in the layout that the moment asks for, and steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from recorder.layout import BUFFERS, PARAMETERS, Layout, Slot
from recorder.modelbuffers import ModelBuffers
from recorder.segmentwriter import SegmentWriter
from recorder.sharded import whole
from recorder.staging import Staging
from recorder.steps import Step
from recorder.watched import Watched
from recorder.writer import BackgroundWriter

SEGMENT_STEPS = 64
"""Steps to a segment: its first parameters are stored whole, 1.6 % of every step's."""

NARROW_SEGMENT_STEPS = 128
"""For 16-bit parameters, whose differences are far smaller than they are."""

Tensors = list[tuple[str, str, torch.Tensor]]


class Capture:
    """Takes the parameters and buffers of a live model, and gives them to the writer.

    Parameters
    ----------
    watched
        Model and optimizer.
    buffers
        The model's buffers.
    parameters_too
        Whether this process records the parameters, or its micro-batches alone.
    """

    def __init__(self, watched: Watched, buffers: ModelBuffers, *, parameters_too: bool) -> None:
        self._watched = watched
        self._buffers = buffers
        self._parameters_too = parameters_too
        self._writer: BackgroundWriter | None = None
        self._staging: Staging | None = None
        self._ready_for: int | None = None
        self._waited = 0.0

    @property
    def begun(self) -> bool:
        """Whether `begin` was called."""
        return self._writer is not None

    @property
    def stop(self) -> int | None:
        """One more than the last step written; None if there is none."""
        return self._writer.stop if self._writer else None

    @property
    def failed_at(self) -> int | None:
        """The step that the writer could not write."""
        return self._writer.failed_at if self._writer else None

    @property
    def waited(self) -> float:
        """Seconds that the training has waited for the writer to give a copy's memory back."""
        return self._waited + (self._staging.waited if self._staging else 0.0)

    def begin(self, run: Path, run_id: str, attempt: int, rank: int, steps: int | None, quota: int | None) -> Layout:
        """Start the writer.

        Parameters
        ----------
        run, run_id, attempt, rank
            Where it writes.
        steps
            Steps to a segment; None for the default of what is recorded.
        quota
            Bytes that it may write.

        Returns
        -------
        Layout
            What is recorded with every step; empty where the parameters are not recorded.
        """
        layout = Layout(())
        if self._parameters_too:
            parameters = [Slot.of(PARAMETERS, name, tensor) for name, tensor in self._watched.live().items()]
            buffers = [Slot.of(BUFFERS, name, tensor) for name, tensor in self._buffers.at_start().items()]
            layout = Layout((*parameters, *buffers))
        segments = SegmentWriter(run, run_id, attempt, rank, steps or _segment_steps(layout), quota)
        self._writer = BackgroundWriter(segments)
        return layout

    def holds_start_of(self, step: int) -> bool:
        """Tell whether θ_t is recorded already.

        Parameters
        ----------
        step
            t.

        Returns
        -------
        bool
            True where the step before has ended with it.
        """
        return self._ready_for == step

    def before_update(self) -> None:
        """Let the device finish the last copy before the optimizer overwrites what is copied."""
        if self._staging is not None:
            self._staging.before_update()

    def before_step(self, step: int, *, changed: bool) -> None:
        """Record θ_t, unless the step before has ended with it.

        Parameters
        ----------
        step
            t, a step that is recorded.
        changed
            Whether parameters have joined, which the step before does not hold.
        """
        self.before_update()  # now, for a new layout brings a staging of its own
        if changed or not self.holds_start_of(step):
            self._put(step, self._tensors(self._buffers.at_start()), None)
            self.before_update()

    def after_step(self, step: int) -> Callable[[Callable[[], Step]], None]:
        """Take the parameters after step t.

        Parameters
        ----------
        step
            t.

        Returns
        -------
        callable
            Records them, with the step that it is given to make.
        """
        tensors = self._tensors(self._buffers.now())
        return lambda make_step: self._put(step + 1, tensors, make_step)

    def _tensors(self, buffers: dict[str, torch.Tensor]) -> Tensors:
        # Where parameters are sharded, all processes put them together now.
        return [
            *((PARAMETERS, name, whole(tensor)) for name, tensor in self._watched.live().items()),
            *((BUFFERS, name, tensor) for name, tensor in buffers.items()),
        ]

    def _put(self, number: int, tensors: Tensors, make_step: Callable[[], Step] | None) -> None:
        assert self._writer is not None
        state = None
        if self._parameters_too:
            layout = Layout(tuple(Slot.of(*entry) for entry in tensors))
            if self._staging is None or self._staging.layout != layout:
                self._waited = self.waited
                self._staging = Staging(layout, self._watched.device)
            state = self._staging.copy(number, [tensor for _, _, tensor in tensors])
        if state is not None or make_step is not None:
            self._writer.put(state, make_step)
        self._ready_for = number

    def raise_failure(self) -> None:
        """Raise what has stopped the writer, if anything has."""
        if self._writer is not None and self._writer.failure is not None:
            raise self._writer.failure

    def flush(self) -> None:
        """Wait until every step so far is on the disk."""
        if self._writer is not None:
            self._writer.flush()
            self.raise_failure()

    def close(self) -> None:
        """Write what is left, and let go of the copies' memory."""
        if self._writer is not None:
            self._writer.close()
        self._waited, self._staging = self.waited, None

    def cost(self, steps: int) -> str:
        """Say what the recording has cost.

        Parameters
        ----------
        steps
            Steps recorded.

        Returns
        -------
        str
            Bytes and seconds.
        """
        assert self._writer is not None
        steps = max(steps, 1)
        return (
            f"{self._writer.bytes / steps / 1e6:.3g} MB a step; coding and writing took "
            f"{self._writer.busy / steps * 1e3:.3g} ms a step beside the training, "
            f"which waited {self.waited:.3g} s for it"
        )


def _segment_steps(layout: Layout) -> int:
    narrow = all(dtype in {"float16", "bfloat16"} for dtype in layout.sizes)
    return NARROW_SEGMENT_STEPS if narrow and layout.sizes else SEGMENT_STEPS
