"""A transformers.Trainer with the recorder on, and the workload from which replay rebuilds its training.

    python examples/hf_trainer.py runs/gpt2
    python -m replay --run runs/gpt2 --workload examples.hf_trainer:gpt2
    python -m reduce --run runs/gpt2
    python -m viz --run runs/gpt2

    python examples/hf_trainer.py runs/bert --model bert
    python -m replay --run runs/bert --workload examples.hf_trainer:bert
    python -m reduce --run runs/bert
    python -m viz --run runs/bert

A small GPT-2 learns to continue arithmetic progressions modulo 23, a small BERT to fill gaps in them. Both are built
from their configuration, so nothing is downloaded. It needs ``pip install 'lossledger[hf]'``.
"""

from __future__ import annotations

import argparse
import tempfile
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

from recorder.integrations.hf_callback import RecorderCallback
from recorder.integrations.hf_workload import TrainerWorkload

MODULUS = 23
GAP = MODULUS
LENGTH = 12
TRAIN = range(2000)
VALID = range(2000, 2200)
UPDATES = 12


class Progressions(torch.utils.data.Dataset[dict[str, Any]]):
    """Arithmetic progressions; the model takes no ``step``, so the Trainer drops that column.

    Parameters
    ----------
    which
        Progression i starts at i, with a step of 1, 2 or 3.
    """

    def __init__(self, which: range) -> None:
        self._which = which

    def __len__(self) -> int:
        return len(self._which)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start = self._which[index]
        step = 1 + start // MODULUS % 3
        numbers = (start + step * torch.arange(LENGTH)) % MODULUS
        return {"input_ids": numbers, "labels": numbers, "step": step}


def continued(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collate examples: each number is to be predicted from those before it.

    Parameters
    ----------
    examples
        From `Progressions`.

    Returns
    -------
    dict
        ``input_ids`` and ``labels``, both of shape (examples, LENGTH).
    """
    return {name: torch.stack([example[name] for example in examples]) for name in ("input_ids", "labels")}


def with_gaps(examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collate examples with gaps at random: the numbers in there are to be predicted.

    Parameters
    ----------
    examples
        From `Progressions`.

    Returns
    -------
    dict
        As of `continued`, with -100 among the labels where there is no gap.
    """
    batch = continued(examples)
    gaps = torch.rand(batch["labels"].shape) < 0.2
    return {
        "input_ids": batch["input_ids"].masked_fill(gaps, GAP),
        "labels": batch["labels"].masked_fill(~gaps, -100),
    }


def build_gpt2() -> PreTrainedModel:
    """Build the causal language model.

    Returns
    -------
    transformers.PreTrainedModel
        Two layers, two heads.
    """
    size = {"n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(vocab_size=MODULUS, bos_token_id=None, eos_token_id=None, **size))


def build_bert() -> PreTrainedModel:
    """Build the masked language model.

    Returns
    -------
    transformers.PreTrainedModel
        Two layers, two heads.
    """
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForMaskedLM(BertConfig(vocab_size=MODULUS + 1, max_position_embeddings=LENGTH, **size))


def gpt2() -> TrainerWorkload:
    """Return the workload of GPT-2: what ``--workload examples.hf_trainer:gpt2`` names.

    Returns
    -------
    TrainerWorkload
        The workload.
    """
    return TrainerWorkload(build_gpt2, Progressions(TRAIN), Progressions(VALID), continued)


def bert() -> TrainerWorkload:
    """Return the workload of BERT: what ``--workload examples.hf_trainer:bert`` names.

    Returns
    -------
    TrainerWorkload
        The workload.
    """
    return TrainerWorkload(build_bert, Progressions(TRAIN), Progressions(VALID), with_gaps)


def train(run: str, model: str) -> None:
    """Train for a few updates of two micro-batches, and record each of them.

    Parameters
    ----------
    run
        The folder of the run to make.
    model
        ``gpt2`` or ``bert``.
    """
    set_seed(0)
    build, collate = {"gpt2": (build_gpt2, continued), "bert": (build_bert, with_gaps)}[model]
    with tempfile.TemporaryDirectory() as checkpoints:
        arguments = TrainingArguments(
            output_dir=checkpoints,
            per_device_train_batch_size=128,
            gradient_accumulation_steps=2,
            max_steps=UPDATES,
            learning_rate=1e-2,
            warmup_steps=2,
            eval_strategy="steps",
            eval_steps=6,
            report_to=[],
        )
        Trainer(
            model=build(),
            args=arguments,
            train_dataset=Progressions(TRAIN),
            eval_dataset=Progressions(VALID),
            data_collator=collate,
            callbacks=[RecorderCallback(run=run, workload=f"examples.hf_trainer:{model}")],
        ).train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train a small language model with the recorder on.")
    parser.add_argument("run", help="the folder to record into")
    parser.add_argument("--model", choices=("gpt2", "bert"), default="gpt2")
    chosen = parser.parse_args()
    train(chosen.run, chosen.model)
