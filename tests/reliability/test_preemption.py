from __future__ import annotations

import hashlib
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

import recorder
from recorder.errors import JoinError
from recorder.lock import LOCK_FILE
from recorder.runformat import Run
from tests.reliability.children import train_with_checkpoints
from tests.reliability.conftest import Promise
from tests.reliability.counts import PREEMPTIONS, SEED
from tests.reliability.readings import assert_prefix
from tests.reliability.trainings import DTYPES, OPTIMIZERS, build, expected_states, load, trained, update
from tests.reliability.warm import WarmProcess

pytestmark = pytest.mark.filterwarnings("ignore::recorder.parameters.UnmappedParameterWarning")

_STEPS = 24
_PLACES = ("before the update", "after the update", "before the checkpoint")


def _files(run: Path) -> dict[str, str]:
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in run.rglob("*")
        if file.is_file() and file.name != LOCK_FILE
    }


def test_a_training_restarted_from_its_checkpoint_leaves_the_timeline_of_one_that_ran_through(
    tmp_path: Path, promise: Promise, warm: WarmProcess
) -> None:
    run, checkpoint = tmp_path / "run", tmp_path / "checkpoint"
    expected = {
        pair: expected_states(*pair, _STEPS) for pair in ((name, dtype) for name in OPTIMIZERS for dtype in DTYPES)
    }
    chance = random.Random(SEED)
    with promise("R7", SEED) as tally:
        for number in range(PREEMPTIONS):
            optimizer, dtype = chance.choice(list(expected))
            kills = sorted(chance.sample(range(_STEPS), chance.randint(1, 3)))
            where = chance.choice(_PLACES)
            with tally.case(f"{number}: {optimizer} {dtype}, killed {where} at {kills}"):
                for kill_at in kills:
                    pid = warm.start(train_with_checkpoints, run, checkpoint, optimizer, dtype, _STEPS, kill_at, where)
                    assert warm.wait(pid) in (-signal.SIGKILL, 0), warm.log()
                warm.run(train_with_checkpoints, run, checkpoint, optimizer, dtype, _STEPS, -10, "")
                assert assert_prefix(run, expected[optimizer, dtype]) == _STEPS
                attempts = Run(run).manifest.attempts
                assert attempts[-1].state == "complete"
                # Killed in the very first steps, there is nothing yet to compare with.
                assert all(entry.joined in ("first", "verified") or entry.first_step == 0 for entry in attempts)
                for attempt in attempts:  # what an attempt recorded is kept, also where a later one did it again
                    for step in Run(run, attempt.number).steps:
                        Run(run, attempt.number).parameters(step)
            shutil.rmtree(run, ignore_errors=True)
            checkpoint.unlink(missing_ok=True)


@pytest.mark.parametrize("killed", [True, False], ids=["after a kill", "after an end"])
def test_a_wrong_checkpoint_is_refused_and_nothing_of_the_run_is_changed(
    tmp_path: Path, promise: Promise, warm: WarmProcess, killed: bool
) -> None:
    run, checkpoint = tmp_path / "run", tmp_path / "checkpoint"
    pid = warm.start(
        train_with_checkpoints, run, checkpoint, "adam", "float32", 14, 12 if killed else -10, "after the update"
    )
    assert warm.wait(pid) == (-signal.SIGKILL if killed else 0), warm.log()
    recorder.watch(*build("adam"), run=run, first_step=10).close()  # a killed attempt is made whole once
    before = _files(run)
    chance = random.Random(SEED)
    with promise("R7", SEED) as tally:
        for number in range(max(PREEMPTIONS // 4, 4)):
            model, optimizer = build("adam")
            updates = load(str(checkpoint), model, optimizer)
            assert updates == 10
            if number % 2:
                updates = chance.choice([t for t in range(12) if t != updates])
            else:
                _flip_a_bit(model, chance)
            with tally.case(f"{number}: as step {updates}"):
                with (
                    recorder.watch(model, optimizer, run=run, first_step=updates) as rec,
                    pytest.raises(JoinError, match="does not go on where the run was"),
                ):
                    update(model, optimizer, updates, rec)
                assert _files(run) == before


def _flip_a_bit(model: nn.Module, chance: random.Random) -> None:
    tensor = chance.choice(list(trained(model).values())).view(torch.int32).view(-1)
    tensor[chance.randrange(len(tensor))] ^= 1 << chance.randrange(31)
