"""Groups of examples add up by weight, and the spread over micro-batches gives the standard error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from recorder.runformat import Run
from replay.shards import ShardFolder
from tests import cases

Command = Callable[..., int]
Find = Callable[[Path, str], ShardFolder]


@pytest.mark.parametrize(("rule", "rounding"), [("gauss2", 2e-6), ("adaptive", 1e-4)])
def test_the_lca_of_groups_adds_up_to_that_of_all_by_weight(
    run: Path, tmp_path: Path, replay: Command, folder: Find, rule: str, rounding: float
) -> None:
    groups = {"a": [0, 7, 9], "b": [1, 2, 3, 4, 30], "c": [40]}
    lines = [f"{index},{group}" for group, indices in groups.items() for index in indices]
    (tmp_path / "ids.csv").write_text("\n".join(["index,group", *lines]))
    (tmp_path / "ids").write_text("\n".join(str(index) for indices in groups.values() for index in indices))
    chosen = (f"g=file:{tmp_path / 'ids.csv'}", f"all=file:{tmp_path / 'ids'}")
    assert replay(run, "--rule", rule, "--workload", "tests.cases:workload", loss_data=chosen) == 0
    parts = [folder(run, f"g/{group}").read(0, 6) for group in groups]
    whole, direct = folder(run, "g").read(0, 6), folder(run, "all").read(0, 6)
    weights = np.stack([part.per_step["weight"] for part in parts])
    np.testing.assert_array_equal(weights.sum(axis=0), whole.per_step["weight"])
    np.testing.assert_array_equal(whole.per_step["weight"], direct.per_step["weight"])
    shares = weights / weights.sum(axis=0)
    for name, total in whole.per_unit["sum"].items():
        summed = sum(share[:, None] * part.per_unit["sum"][name] for share, part in zip(shares, parts, strict=True))
        np.testing.assert_allclose(total, summed, rtol=0, atol=1e-15)
        np.testing.assert_allclose(total, direct.per_unit["sum"][name], rtol=0, atol=rounding)
    for name in ("loss_start", "loss_end"):
        np.testing.assert_allclose(whole.per_step[name], direct.per_step[name], rtol=1e-6)
    assert (whole.per_step["status"] == 0).all()


def test_what_micro_batches_give_sums_to_the_parameters_lca_at_that_node(
    run: Path, replay: Command, folder: Find
) -> None:
    assert replay(run, "--rule", "midpoint", "--rtol", "1", loss_data=("probe:20", "fresh:16", "batch")) == 0
    for name, micro_batches in (("probe", 3), ("fresh", 2)):
        shard = folder(run, name).read(0, 6)
        assert shard.counts is not None
        assert shard.counts.shape == (6, micro_batches)
        np.testing.assert_array_equal(shard.counts.sum(axis=1), shard.per_step["weight"])
        for parameter, spread in shard.spread.items():
            mean = spread.sum(axis=1) / shard.counts.sum(axis=1)
            np.testing.assert_allclose(mean, shard.per_unit["sum"][parameter].sum(axis=1), rtol=1e-5, atol=1e-9)
    assert folder(run, "batch").read(0, 6).counts is None


def test_a_micro_batch_gives_what_the_gradient_of_its_own_loss_gives(run: Path, replay: Command, folder: Find) -> None:
    assert replay(run, "--rule", "euler", "--rtol", "10", "--tied-weights", "whole", loss_data=("probe:20",)) == 0
    shard, opened, task = folder(run, "probe").read(0, 6), Run(run), cases.workload()
    drawn = sorted(np.random.default_rng(0).choice(48, size=20, replace=False).tolist())
    model = task.model()
    for t in (0, 4):
        theta, after = opened.parameters(t), opened.parameters(t + 1)
        model.load_state_dict(theta, strict=False)
        for position, indices in enumerate((drawn[:8], drawn[8:16], drawn[16:])):
            model.zero_grad()
            loss_sum, _ = task.loss(model.eval(), task.batch(indices, split="train", epoch=1))
            loss_sum.backward()  # type: ignore[no-untyped-call]
            for name, parameter in model.named_parameters():
                if name not in shard.spread or parameter.grad is None:
                    continue
                expected = torch.dot((after[name] - theta[name]).double().view(-1), parameter.grad.double().view(-1))
                scale = float((after[name] - theta[name]).norm() * parameter.grad.norm())
                assert shard.spread[name][t, position] == pytest.approx(float(expected), abs=1e-5 * scale + 1e-12)
