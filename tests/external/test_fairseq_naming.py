"""The parameter tables of the three fairseq models, built by fairseq itself."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest

from recorder.manifest import Manifest
from recorder.parameters import parameter_table, warn_of_unmapped
from recorder.table import Parameter

if importlib.util.find_spec("fairseq") is None:
    pytest.skip("needs fairseq 0.12.2", allow_module_level=True)

pytestmark = pytest.mark.fairseq

# name: (layer, component, heads, unit axis)
TRANSLATION = {
    "encoder.embed_tokens.weight": ("model", "embedding", 0, 0),
    "encoder.layers.0.self_attn.k_proj.weight": ("encoder.0", "key", 8, 0),
    "encoder.layers.0.self_attn.k_proj.bias": ("encoder.0", "key", 8, 0),
    "encoder.layers.1.self_attn.q_proj.weight": ("encoder.1", "query", 8, 0),
    "encoder.layers.1.self_attn.v_proj.bias": ("encoder.1", "value", 8, 0),
    "encoder.layers.1.self_attn.out_proj.weight": ("encoder.1", "out", 8, 1),
    "encoder.layers.1.self_attn.out_proj.bias": ("encoder.1", "out", 0, 0),
    "encoder.layers.1.fc1.weight": ("encoder.1", "W1", 0, 0),
    "encoder.layers.1.fc1.bias": ("encoder.1", "W1", 0, 0),
    "encoder.layers.1.fc2.weight": ("encoder.1", "W2", 0, 1),
    "encoder.layers.1.fc2.bias": ("encoder.1", "W2", 0, 0),
    "encoder.layers.0.self_attn_layer_norm.bias": ("encoder.0", "norm", 0, 0),
    "decoder.layers.0.self_attn.q_proj.weight": ("decoder.0", "query", 8, 0),
    "decoder.layers.0.encoder_attn.k_proj.weight": ("decoder.0", "cross_key", 8, 0),
    "decoder.layers.0.encoder_attn.q_proj.bias": ("decoder.0", "cross_query", 8, 0),
    "decoder.layers.1.encoder_attn.v_proj.weight": ("decoder.1", "cross_value", 8, 0),
    "decoder.layers.1.encoder_attn.out_proj.weight": ("decoder.1", "cross_out", 8, 1),
    "decoder.layers.1.encoder_attn.out_proj.bias": ("decoder.1", "cross_out", 0, 0),
    "decoder.layers.1.encoder_attn_layer_norm.weight": ("decoder.1", "norm", 0, 0),
    "decoder.layers.1.final_layer_norm.weight": ("decoder.1", "norm", 0, 0),
}
CAUSAL = {
    "decoder.embed_tokens.weight": ("model", "embedding", 0, 0),
    "decoder.layers.0.self_attn.v_proj.weight": ("decoder.0", "value", 8, 0),
    "decoder.layers.1.self_attn.out_proj.weight": ("decoder.1", "out", 8, 1),
    "decoder.layers.1.fc2.weight": ("decoder.1", "W2", 0, 1),
}
MASKED = {
    "encoder.sentence_encoder.embed_tokens.weight": ("model", "embedding", 0, 0),
    "encoder.sentence_encoder.embed_positions.weight": ("model", "position", 0, 0),
    "encoder.sentence_encoder.layernorm_embedding.weight": ("model", "norm", 0, 0),
    "encoder.sentence_encoder.layers.0.self_attn.k_proj.bias": ("encoder.0", "key", 8, 0),
    "encoder.sentence_encoder.layers.1.fc1.weight": ("encoder.1", "W1", 0, 0),
    "encoder.lm_head.bias": ("model", "output", 0, 0),
    "encoder.lm_head.dense.weight": ("model", "output", 0, 0),
    "encoder.lm_head.dense.bias": ("model", "output", 0, 0),
    "encoder.lm_head.layer_norm.weight": ("model", "norm", 0, 0),
}
TIED = {
    "translation": {
        "encoder.embed_tokens.weight": ("decoder.embed_tokens.weight", "decoder.output_projection.weight"),
    },
    "causal": {"decoder.embed_tokens.weight": ("decoder.output_projection.weight",)},
    "masked": {"encoder.sentence_encoder.embed_tokens.weight": ("encoder.lm_head.weight",)},
}
COMPONENTS = {
    "translation": {
        *("key", "query", "value", "out", "cross_key", "cross_query", "cross_value", "cross_out"),
        *("W1", "W2", "embedding", "norm"),
    },
    "causal": {"key", "query", "value", "out", "W1", "W2", "embedding", "norm"},
    "masked": {"key", "query", "value", "out", "W1", "W2", "embedding", "position", "norm", "output"},
}
each_task = pytest.mark.parametrize("task", ["translation", "causal", "masked"])


def table(trainings: dict[str, Any], task: str) -> dict[str, Parameter]:
    return {parameter.name: parameter for parameter in Manifest.read(trainings[task].run).parameters}


@each_task
def test_every_trained_parameter_has_a_component_of_its_own(trainings: dict[str, Any], task: str) -> None:
    rows = table(trainings, task).values()
    assert {row.component for row in rows if row.trained} == COMPONENTS[task]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_unmapped(rows)


@pytest.mark.parametrize(("task", "expected"), [("translation", TRANSLATION), ("causal", CAUSAL), ("masked", MASKED)])
def test_parameters_stand_in_their_place(
    trainings: dict[str, Any], task: str, expected: dict[str, tuple[str, str, int, int]]
) -> None:
    rows = table(trainings, task)
    found = {
        name: (rows[name].layer, rows[name].component, rows[name].heads, rows[name].unit_axis) for name in expected
    }
    assert found == expected
    assert all(rows[name].trained for name in expected)
    assert all(row.layer == (f"{row.stack}.{row.depth}" if row.depth >= 0 else "model") for row in rows.values())


@each_task
def test_a_weight_and_its_bias_are_of_one_component_and_layer(trainings: dict[str, Any], task: str) -> None:
    rows = table(trainings, task)
    pairs = [
        (row, rows[f"{name.removesuffix('weight')}bias"])
        for name, row in rows.items()
        if name.endswith(".weight") and f"{name.removesuffix('weight')}bias" in rows
    ]
    assert len(pairs) > 10
    assert [
        weight.name for weight, bias in pairs if (weight.component, weight.layer) != (bias.component, bias.layer)
    ] == []


@each_task
def test_tied_weights_stand_once_with_their_aliases(trainings: dict[str, Any], task: str) -> None:
    aliases = {name: row.aliases for name, row in table(trainings, task).items() if row.aliases}
    assert aliases == TIED[task]


def test_untied_embeddings_and_learned_positions_of_a_translation_model_are_mapped_too(
    trainings: dict[str, Any],
) -> None:
    from recorder.integrations.fairseq_workload import FairseqWorkload
    from recorder.manifest import Trainer

    recorded = Manifest.read(trainings["translation"].run).trainer.arguments
    kept = [argument for argument in recorded if argument != "--share-all-embeddings"]
    trainer = Trainer(
        name="fairseq",
        version="0.12.2",
        directory="/",
        arguments=(
            *kept,
            "--encoder-learned-pos",
            "--decoder-learned-pos",
            "--encoder-normalize-before",
            "--decoder-normalize-before",
            "--layernorm-embedding",
        ),
    )
    model = FairseqWorkload(trainings["translation"].run, trainer, data=None, run_user_code=False).model()
    rows = {row.name: row for row in parameter_table(model)}
    expected = {
        "decoder.output_projection.weight": "output",
        "decoder.embed_tokens.weight": "embedding",
        "encoder.embed_positions.weight": "position",
        "decoder.embed_positions.weight": "position",
        "encoder.layernorm_embedding.weight": "norm",
        "decoder.layer_norm.bias": "norm",
    }
    assert {name: rows[name].component for name in expected} == expected
    unmapped = {name for name, row in rows.items() if row.component == "other"}
    assert all(".layers." in name and ("proj_" in name or "fc" in name) for name in unmapped)


def test_a_tied_embedding_has_two_uses_however_many_names(trainings: dict[str, Any]) -> None:
    uses = table(trainings, "translation")["encoder.embed_tokens.weight"].uses
    assert [(use.name, use.aliases, use.component) for use in uses] == [
        ("encoder.embed_tokens.weight", ("decoder.embed_tokens.weight",), "embedding"),
        ("decoder.output_projection.weight", (), "output"),
    ]
