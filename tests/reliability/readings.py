"""What a run must hold, read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recorder.runformat import Run
from recorder.verify import verify
from tests.reliability.trainings import fingerprint, indices


def assert_prefix(path: Path, states: Sequence[str], safe: Mapping[int, str] | None = None) -> int:
    """The run is whole, holds steps 0 to n without gap, each as the training made it; return n."""
    verdict = verify(path)
    assert not verdict.damages, verdict
    assert not verdict.unfinished, verdict
    run = Run(path)
    steps = run.steps
    assert steps == list(range(len(steps)))
    for step in steps:
        (micro_batch,) = run.step(step).micro_batches
        assert micro_batch.indices.tolist() == indices(step)
        assert micro_batch.stored
        assert fingerprint(run.parameters(step)) == states[step], f"θ_{step} differs"
    if steps:
        assert fingerprint(run.parameters(len(steps))) == states[len(steps)], "the last θ differs"
    for number, digest in (safe or {}).items():
        assert number <= len(steps), f"θ_{number} was safe, the run ends with θ_{len(steps)}"
        assert digest == states[number]
    return len(steps)


def content_of(path: Path) -> str:
    """SHA-256 of all that reading a run can give."""
    run = Run(path)
    digest = hashlib.sha256(json.dumps(run.manifest.to_dict()).encode())
    digest.update(fingerprint(run.untrained()).encode())
    digest.update(repr(sorted(_flat(run.optimizer_state() or {}))).encode())
    for name in sorted(run.manifest.files):
        digest.update((path / "trainer" / name).read_bytes())
    for attempt in run.manifest.attempts:
        of_attempt = Run(path, attempt.number)
        for step in of_attempt.steps:
            digest.update(fingerprint(of_attempt.parameters(step)).encode())
            digest.update(fingerprint(of_attempt.buffers(step)).encode())
            digest.update(repr(of_attempt.step(step)).encode())
        if of_attempt.steps:
            digest.update(fingerprint(of_attempt.parameters(of_attempt.steps[-1] + 1)).encode())
    return digest.hexdigest()


def _flat(state: Mapping[Any, Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [
        (f"{index}/{key}", fingerprint({"": value}) if isinstance(value, torch.Tensor) else repr(value))
        for index, entries in state.items()
        for key, value in entries.items()
    ]
