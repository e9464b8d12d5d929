"""The ready-made workload for a Trainer's language models: their own loss, as a sum, on batches that come out again."""

from __future__ import annotations

import os
import random
from typing import Any

import numpy as np
import pytest
import torch

from recorder.errors import UsageError
from recorder.workload import CollatesAtRandom, WeighsMicroBatches, Workload

os.environ["HF_HUB_OFFLINE"] = "1"
transformers: Any = pytest.importorskip("transformers")

from transformers.trainer_pt_utils import LabelSmoother  # noqa: E402

from recorder.integrations.hf_workload import TrainerWorkload  # noqa: E402
from tests.external.hf_models import LENGTH, Numbers, bert, gpt2, t5  # noqa: E402


def masked(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Draws from all three generators."""
    numbers = torch.stack([example["input_ids"] for example in examples])
    gaps = torch.rand(numbers.shape) < 0.2 + 0.1 * random.random() + 0.1 * np.random.rand()  # noqa: NPY002
    return {"input_ids": numbers.masked_fill(gaps, 0), "labels": numbers.masked_fill(~gaps, -100)}


@pytest.mark.parametrize("build", [gpt2, bert, t5])
def test_its_loss_is_the_models_own_summed(build: Any) -> None:
    workload = TrainerWorkload(build, Numbers(), Numbers(6))
    model = workload.model().eval()
    batch = workload.batch([3, 1, 4], split="valid", epoch=1)
    with torch.no_grad():
        loss_sum, predictions = workload.loss(model, batch)
        mean = model(**batch).loss
    asked = batch["labels"][:, 1:] if build is gpt2 else batch["labels"]
    assert int(predictions) == int((asked != -100).sum())
    assert float(loss_sum / predictions) == pytest.approx(float(mean), rel=1e-6)
    assert isinstance(workload, Workload)
    wide = model.double()
    assert workload.loss(wide, batch)[0].dtype == torch.float64


@pytest.mark.parametrize("build", [gpt2, bert])
def test_label_smoothing_is_the_trainers(build: Any) -> None:
    workload = TrainerWorkload(build, Numbers(), label_smoothing=0.3)
    model = workload.model().eval()
    batch = workload.batch(range(5), split="train", epoch=1)
    with torch.no_grad():
        loss_sum, predictions = workload.loss(model, batch)
        outputs = model(batch["input_ids"])
    expected = LabelSmoother(epsilon=0.3)(outputs, batch["labels"], shift_labels=build is gpt2)
    assert float(loss_sum / predictions) == pytest.approx(float(expected), rel=1e-6)


def test_a_micro_batch_weighs_what_it_weighs_in_the_trainers_gradient() -> None:
    for build, heeded in ((gpt2, True), (bert, False), (t5, False)):
        workload = TrainerWorkload(build, Numbers())
        model = workload.model().train()
        batches = [workload.batch(rows, split="train", epoch=1) for rows in ([0, 1], [2, 3, 4])]
        counts = [float(workload.loss(model, batch)[1]) for batch in batches]
        assert counts[0] != counts[1]
        weights = [workload.weight(model, batch) for batch in batches]
        assert weights == ([1, 1] if heeded else [pytest.approx(1 / count) for count in counts])
        assert model.training
        assert isinstance(workload, WeighsMicroBatches)


def test_columns_that_the_model_does_not_take_never_reach_the_collator() -> None:
    seen: list[dict[str, Any]] = []

    def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        seen.extend(examples)
        return {"labels": torch.zeros(1)}

    TrainerWorkload(gpt2, Numbers(), data_collator=collate).batch([0], split="train", epoch=1)
    TrainerWorkload(gpt2, Numbers(), data_collator=collate, remove_unused_columns=False).batch(
        [0], split="train", epoch=1
    )
    assert [sorted(example) for example in seen] == [["input_ids", "labels"], ["input_ids", "labels", "text"]]


class OwnGenerator:
    """A collator with a seed makes its generator when it is first called, as those of transformers."""

    def __init__(self) -> None:
        self.generator: torch.Generator | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(3)
        return {"labels": torch.rand(len(examples), generator=self.generator)}


@pytest.mark.parametrize("collator", [masked, OwnGenerator()])
def test_random_batches_come_out_again_and_draw_from_no_generator_of_others(collator: Any) -> None:
    workload = TrainerWorkload(bert, Numbers(), data_collator=collator)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True)  # noqa: NPY002
    batches = [workload.batch([5, 6, 7, 8], split="train", epoch=1) for _ in range(2)]
    assert torch.equal(batches[0]["labels"], batches[1]["labels"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert str(np.random.get_state(legacy=True)) == str(before[2])  # noqa: NPY002


def test_it_knows_whether_its_collator_draws_at_random() -> None:
    workload = TrainerWorkload(bert, Numbers(), data_collator=masked)
    assert isinstance(workload, CollatesAtRandom)
    assert workload.collates_at_random([5, 6, 7, 8], split="train")
    later = workload.batch([5, 6, 7, 8], split="train", epoch=2)
    assert not torch.equal(later["labels"], workload.batch([5, 6, 7, 8], split="train", epoch=1)["labels"])
    assert not TrainerWorkload(bert, Numbers()).collates_at_random([5, 6, 7, 8], split="train")


def test_the_splits_are_the_two_data_sets() -> None:
    workload = TrainerWorkload(gpt2, Numbers(), Numbers(6))
    assert (list(workload.indices("train")), list(workload.indices("valid"))) == (list(range(27)), list(range(6)))
    with pytest.raises(UsageError, match="has no data for the split 'valid': give TrainerWorkload an eval_dataset"):
        TrainerWorkload(gpt2, Numbers()).indices("valid")


def test_what_it_cannot_measure_is_refused_in_one_line() -> None:
    workload = TrainerWorkload(gpt2, Numbers())
    with pytest.raises(UsageError, match="expected a batch with labels; found input_ids: override"):
        workload.loss(workload.model(), {"input_ids": torch.zeros(1, 2, dtype=torch.int64)})

    class Another(transformers.GPT2PreTrainedModel):  # type: ignore[misc]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.inner = transformers.GPT2LMHeadModel(config)

        def forward(self, input_ids: torch.Tensor) -> Any:
            return self.inner(input_ids)

    model = Another(gpt2().config)
    batch = {"input_ids": torch.zeros(1, LENGTH, dtype=torch.int64), "labels": torch.full((1, LENGTH), 3)}
    with pytest.raises(UsageError, match="Another is neither a causal nor a masked language model"):
        workload.loss(model, batch)
    told = TrainerWorkload(gpt2, Numbers(), shift_labels=True)
    assert int(told.loss(model, batch)[1]) == LENGTH - 1
