"""Small language models of transformers, and numbers for them to predict."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch.utils.data import Dataset

VOCABULARY, LENGTH, EXAMPLES = 40, 10, 27


class Numbers(Dataset[dict[str, Any]]):
    """Random numbers, of which the first few are to be predicted: from 2 to all of an example."""

    def __init__(self, examples: int = EXAMPLES) -> None:
        self.numbers = torch.randint(2, VOCABULARY, (examples, LENGTH), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        numbers = self.numbers[index]
        asked = torch.arange(LENGTH) < 2 + index * 7 % (LENGTH - 1)
        return {"input_ids": numbers, "labels": numbers.masked_fill(~asked, -100), "text": f"example {index}"}


def gpt2(dropout: float = 0.1) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=16,
        n_layer=2,
        n_head=2,
        bos_token_id=None,
        eos_token_id=None,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout),
    )
    return transformers.GPT2LMHeadModel(config)


def bert(dropout: float = 0.1) -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=LENGTH,
        **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), dropout),
    )
    return transformers.BertForMaskedLM(config)


def t5(dropout: float = 0.1) -> Any:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=dropout,
    )
    return transformers.T5ForConditionalGeneration(config)
