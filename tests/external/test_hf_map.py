"""The tables of real model families in a few lines, and written as rules that need no live model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import pytest

from recorder.correction import correct
from recorder.maplines import lines, shape_in_words
from recorder.mapskeleton import skeleton
from recorder.namingrules import parse_naming_rules
from recorder.parameters import parameter_table
from recorder.placing import Place

transformers: Any = pytest.importorskip("transformers")

MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_layer=12, n_embd=8, n_head=2, vocab_size=9, n_positions=4, bos_token_id=0, eos_token_id=0
        )
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            num_hidden_layers=12, hidden_size=8, num_attention_heads=2, intermediate_size=8, vocab_size=9
        )
    ),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(num_layers=12, d_model=8, num_heads=2, d_kv=4, d_ff=8, vocab_size=9)
    ),
}
MOST_LINES = {"gpt2": 16, "gpt_neox": 16, "t5": 23}


@pytest.mark.parametrize("family", MODELS)
def test_a_familys_table_is_read_back_from_its_skeleton_and_twelve_layers_stand_in_one_line(family: str) -> None:
    table = parameter_table(MODELS[family]())
    blank = [dataclasses.replace(row, uses=(), **Place().fields()) for row in table]
    rules = parse_naming_rules(skeleton(table), family)
    assert correct(blank, rules).parameters == table
    found = lines(table)
    assert len(found) <= MOST_LINES[family]
    assert sum(len(line.rows) for line in found) == len(table)
    assert all(re.match(r"\d|rows: |columns: |entries: ", shape_in_words(line)) for line in found)
