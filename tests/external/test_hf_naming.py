"""The parameter tables of Transformers' model families, of tiny models built from a config."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from recorder.parameters import parameter_table
from tests.naming_properties import Family, NamingProperties, Softmax, gradients, units_of, with_gradient

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "vocab_size": 11,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT: dict[str, Any] = {
    "vocab_size": 11,
    "n_positions": 12,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_NEO: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 16,
    "num_layers": 3,
    "num_heads": 4,
    "max_position_embeddings": 12,
    "attention_types": [[["global"], 3]],
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT: dict[str, Any] = {
    "vocab_size": 11,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 20,
    "max_position_embeddings": 12,
    "word_embed_proj_dim": 6,
    "do_layer_norm_before": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
T5: dict[str, Any] = {
    "vocab_size": 11,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 20,
    "num_layers": 3,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
BART: dict[str, Any] = {
    "vocab_size": 11,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}
TOKENS = torch.tensor([[3, 7, 4, 9, 5, 3]])
SELF = {"query", "key", "value", "out"}
CROSS = {"cross_query", "cross_key", "cross_value", "cross_out"}


def layers_of(path: str) -> Callable[[nn.Module], nn.ModuleList]:
    def find(model: nn.Module) -> nn.ModuleList:
        layers = model.get_submodule(path)
        assert isinstance(layers, nn.ModuleList)
        return layers

    return find


def built(model: str, config: str, **sizes: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        settings = getattr(transformers, config)(**sizes, attn_implementation="eager")
        made: nn.Module = getattr(transformers, model)(settings)
        return made

    return build


def on_tokens(**more: Any) -> Callable[[nn.Module], torch.Tensor]:
    def loss(model: nn.Module) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=TOKENS, labels=TOKENS, **more).loss
        return found

    return loss


def of_class(model: nn.Module) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=TOKENS, labels=torch.tensor([1])).loss
    return loss


def pretraining(model: nn.Module) -> torch.Tensor:
    loss: torch.Tensor = model(input_ids=TOKENS, labels=TOKENS, next_sentence_label=torch.tensor([1])).loss
    return loss


def attentions(encoder: int = 0, decoder: int = 0, *, crossed: bool = False) -> tuple[tuple[str, str], ...]:
    kinds = ("", "cross_") if crossed else ("",)
    return (
        *((f"encoder.{depth}", "") for depth in range(encoder)),
        *((f"decoder.{depth}", kind) for depth in range(decoder) for kind in kinds),
    )


LM = frozenset({*SELF, "W1", "W2", "embedding", "norm", "output"})
TIED = ("embedding", "output")


def decoder_only(name: str, model: str, path: str, sizes: dict[str, Any], *more: str, **fields: Any) -> Family:
    return Family(
        name=name,
        build=built(f"{model}{fields.pop('head', 'ForCausalLM')}", f"{model}Config", **sizes),
        loss=fields.pop("loss", on_tokens()),
        attentions=attentions(decoder=3),
        stacks={"decoder": layers_of(path)},
        components=LM | set(more),
        **fields,
    )


def llama(model: str, **more: Any) -> Family:
    uses = TIED if more.pop("tied", False) else ()
    sizes = SIZES | {"num_key_value_heads": 2} | more
    return decoder_only(model, model, "model.layers", sizes, "gate", uses=uses, rotary=True)


def encoder_only(name: str, model: str, path: str, sizes: dict[str, Any] = SIZES, **fields: Any) -> Family:
    return Family(
        name=name,
        build=built(model, f"{path.split('.')[0]}Config", **sizes),
        loss=fields.pop("loss", on_tokens()),
        attentions=attentions(encoder=3),
        stacks={"encoder": layers_of(path.partition(".")[2])},
        components=LM | {"position"},
        **fields,
    )


def bart(model: str) -> Family:
    return Family(
        name=model,
        build=built(
            f"{model}{'MTModel' if model == 'Marian' else 'ForConditionalGeneration'}", f"{model}Config", **BART
        ),
        loss=on_tokens(),
        attentions=attentions(encoder=3, decoder=2, crossed=True),
        stacks={"encoder": layers_of("model.encoder.layers"), "decoder": layers_of("model.decoder.layers")},
        # Marian's positions are sinusoids: frozen
        components=LM | CROSS | ({"position"} if model != "Marian" else set()),
        uses=TIED,
    )


def t5(name: str, **more: Any) -> Family:
    return Family(
        name=name,
        build=built("T5ForConditionalGeneration", "T5Config", **T5, **more),
        loss=on_tokens(),
        attentions=attentions(encoder=3, decoder=3, crossed=True),
        stacks={"encoder": layers_of("encoder.block"), "decoder": layers_of("decoder.block")},
        components=LM | CROSS | {"position"} | ({"gate"} if more else set()),
        uses=TIED,
    )


def with_cross_attention(model: nn.Module) -> torch.Tensor:
    states = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    loss: torch.Tensor = model(input_ids=TOKENS, labels=TOKENS, encoder_hidden_states=states).loss
    return loss


FAMILIES = [
    decoder_only("GPT2", "GPT2", "transformer.h", GPT, "position", head="LMHeadModel", uses=TIED),
    Family(
        name="GPT2 with cross-attention",
        build=built("GPT2LMHeadModel", "GPT2Config", **GPT, add_cross_attention=True),
        loss=with_cross_attention,
        attentions=attentions(decoder=3, crossed=True),
        stacks={"decoder": layers_of("transformer.h")},
        components=LM | CROSS | {"position"},
        uses=TIED,
    ),
    decoder_only("GPTNeo", "GPTNeo", "transformer.h", GPT_NEO, "position", uses=TIED),
    decoder_only("GPTJ", "GPTJ", "transformer.h", GPT | {"rotary_dim": 2}, rotary=True),
    # no channel is rotary: so the bias tells query from key
    decoder_only("GPTNeoX", "GPTNeoX", "gpt_neox.layers", SIZES | {"rotary_pct": 0.0}),
    decoder_only("Pythia", "GPTNeoX", "gpt_neox.layers", SIZES | {"rotary_pct": 0.5}, rotary=True),
    llama("Llama", attention_bias=True, mlp_bias=True),
    llama("Mistral"),
    llama("Qwen2"),
    llama("Qwen3", head_dim=6),
    llama("Gemma", head_dim=6, tied=True),
    llama("Gemma2", head_dim=6, tied=True),
    llama("Phi3"),
    decoder_only("OPT", "OPT", "model.decoder.layers", OPT, "position", uses=TIED),
    encoder_only("BERT", "BertForMaskedLM", "Bert.bert.encoder.layer", uses=TIED),
    encoder_only("BERT pretraining", "BertForPreTraining", "Bert.bert.encoder.layer", loss=pretraining, uses=TIED),
    encoder_only("BERT classifier", "BertForSequenceClassification", "Bert.bert.encoder.layer", loss=of_class),
    encoder_only("RoBERTa", "RobertaForMaskedLM", "Roberta.roberta.encoder.layer", uses=TIED),
    encoder_only(
        "RoBERTa classifier", "RobertaForSequenceClassification", "Roberta.roberta.encoder.layer", loss=of_class
    ),
    encoder_only(
        "ELECTRA", "ElectraForMaskedLM", "Electra.electra.encoder.layer", SIZES | {"embedding_size": 6}, uses=TIED
    ),
    encoder_only(
        "DistilBERT",
        "DistilBertForMaskedLM",
        "DistilBert.distilbert.transformer.layer",
        {"vocab_size": 11, "dim": 16, "n_layers": 3, "n_heads": 4, "hidden_dim": 20, "max_position_embeddings": 12},
        uses=TIED,
    ),
    t5("T5"),
    t5("T5 v1.1", feed_forward_proj="gated-gelu"),
    bart("Marian"),
    bart("Bart"),
    bart("MBart"),
]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
class TestTransformers(NamingProperties):
    """Every property for every family."""


def test_the_columns_of_t5s_relative_positions_are_heads() -> None:
    family = next(each for each in FAMILIES if each.name == "T5")
    model = family.model()
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    row = next(row for row in parameter_table(model) if row.name == name)
    assert (row.layer, row.component, row.heads) == ("model", "position", 4)
    with Softmax().watched() as softmax:
        family.loss(model)
    for head, probabilities in enumerate(softmax.calls[0]):
        found = gradients(probabilities.square().sum(), model)[name]
        assert with_gradient(found, row) == units_of(row, "position")[head]


def test_a_model_inside_a_users_own_is_recognised() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = transformers.BertModel(transformers.BertConfig(**SIZES))
            self.tagger = nn.Linear(16, 3)

    table = {row.name: row for row in parameter_table(Tagger())}
    assert [name for name, row in table.items() if row.component == "other"] == ["tagger.weight", "tagger.bias"]
    query = table["bert.encoder.layer.2.attention.self.query.weight"]
    assert (query.layer, query.component, query.heads) == ("encoder.2", "query", 4)


@pytest.mark.parametrize(
    ("model", "sizes", "output"),
    [
        ("BertForTokenClassification", SIZES, "classifier.weight"),
        ("BertForQuestionAnswering", SIZES, "qa_outputs.weight"),
        ("BertForNextSentencePrediction", SIZES, "cls.seq_relationship.weight"),
        ("RobertaForSequenceClassification", SIZES, "classifier.out_proj.weight"),
        ("ElectraForPreTraining", SIZES, "discriminator_predictions.dense_prediction.weight"),
        ("ElectraForSequenceClassification", SIZES, "classifier.dense.weight"),
        (
            "DistilBertForSequenceClassification",
            {"vocab_size": 11, "dim": 12, "hidden_dim": 8},
            "pre_classifier.weight",
        ),
        ("GPT2ForSequenceClassification", GPT, "score.weight"),
        ("GPTNeoXForSequenceClassification", SIZES, "score.weight"),
        ("LlamaForSequenceClassification", SIZES, "score.weight"),
        ("BartForSequenceClassification", BART, "classification_head.out_proj.weight"),
        ("OPTForSequenceClassification", OPT, "score.weight"),
    ],
)
def test_layers_for_classification_are_output(model: str, sizes: dict[str, Any], output: str) -> None:
    table = parameter_table(built(model, f"{model.partition('For')[0]}Config", **sizes)())
    assert {row.name: row.component for row in table}[output] == "output"
    assert [row.name for row in table if row.component == "other"] == []


def test_a_cross_attending_bert_and_an_encoder_of_t5_are_mapped_whole() -> None:
    sizes = SIZES | {"is_decoder": True, "add_cross_attention": True}
    crossing = {row.component for row in parameter_table(built("BertLMHeadModel", "BertConfig", **sizes)())}
    assert crossing == {*SELF, *CROSS, "W1", "W2", "norm", "embedding", "position", "output"}
    encoder = parameter_table(built("T5EncoderModel", "T5Config", **T5)())
    assert {row.component for row in encoder} == {*SELF, "W1", "W2", "norm", "embedding", "position"}


def test_a_decoder_of_its_own_vocabulary_is_tied_to_its_output_alone() -> None:
    model = built(
        "MarianMTModel", "MarianConfig", **BART, share_encoder_decoder_embeddings=False, decoder_vocab_size=11
    )
    uses = {row.name: [use.name for use in row.uses] for row in parameter_table(model()) if row.uses}
    assert uses == {"model.decoder.embed_tokens.weight": ["model.decoder.embed_tokens.weight", "lm_head.weight"]}
