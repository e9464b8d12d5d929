"""The three trainings of the demo: the paper's settings, at the size of a coffee break.

Vázquez et al. (COLING 2022) train a translation model, a causal and a masked language model of twelve layers each, with
Adam (0.9, 0.98, eps 1e-6), weight decay 0.01, polynomial decay with warm-up, dropout 0.1, no attention dropout, ReLU,
no gradient clipping and two micro-batches an update. Width, batch and length are ours, chosen to fit the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from demo.prepare import PreparedText

HEADS = 8
WIDTH = 64
FEED_FORWARD = 128
LAYERS = 12
TOKENS = 256
"""Source or target tokens to a micro-batch; an update has two."""
LENGTH = 64
"""Tokens to an example of a language model."""

SHARED = (
    *("--optimizer", "adam", "--adam-betas", "(0.9,0.98)", "--adam-eps", "1e-6", "--weight-decay", "0.01"),
    *("--lr-scheduler", "polynomial_decay", "--lr", "5e-4", "--dropout", "0.1", "--attention-dropout", "0"),
    *("--activation-fn", "relu", "--clip-norm", "0", "--update-freq", "2", "--max-tokens", str(TOKENS)),
    # What fairseq writes and prints of itself is not wanted here; the run is what the training leaves.
    *("--no-save", "--disable-validation", "--no-progress-bar", "--log-format", "simple", "--log-interval", "20"),
    *("--num-workers", "0", "--seed", "1"),
)


@dataclass(frozen=True, kw_only=True)
class Training:
    """One training of the demo.

    Parameters
    ----------
    name
        Of its run's folder.
    title
        For people.
    arguments
        For fairseq-train.
    """

    name: str
    title: str
    arguments: tuple[str, ...]


def trainings(text: PreparedText, out: Path, *, updates: int, layers: int = LAYERS) -> tuple[Training, ...]:
    """List the demo's trainings.

    Parameters
    ----------
    text
        The binarised data.
    out
        The demo's folder.
    updates
        Updates of each training; a quarter of them warm up.
    layers
        Layers of each model, half of them in the translation model's encoder.

    Returns
    -------
    tuple of Training
        Translation, causal language model, masked language model.
    """
    warm_up = max(2, updates // 4)
    schedule = ("--max-update", str(updates), "--total-num-update", str(updates), "--warmup-updates", str(warm_up))
    # fairseq makes the folder even where it saves nothing.
    shared = (*SHARED, *schedule, "--save-dir", str(out / "checkpoints"))
    return (
        Training(name="translation", title="translation", arguments=(*_translation(text.translation, layers), *shared)),
        Training(name="causal-lm", title="causal LM", arguments=(*_causal(text.language_model, layers), *shared)),
        Training(name="masked-lm", title="masked LM", arguments=(*_masked(text.language_model, layers), *shared)),
    )


def _size(stack: str, layers: int) -> tuple[str, ...]:
    return (
        *(f"--{stack}-layers", str(layers), f"--{stack}-embed-dim", str(WIDTH)),
        *(f"--{stack}-ffn-embed-dim", str(FEED_FORWARD), f"--{stack}-attention-heads", str(HEADS)),
    )


def _translation(data: Path, layers: int) -> tuple[str, ...]:
    return (
        *(str(data), "--task", "translation", "--source-lang", "en", "--target-lang", "de"),
        *("--arch", "transformer", "--share-all-embeddings", "--criterion", "cross_entropy"),
        *(*_size("encoder", layers // 2), *_size("decoder", layers // 2)),
    )


def _causal(data: Path, layers: int) -> tuple[str, ...]:
    return (
        *(str(data), "--task", "language_modeling", "--arch", "transformer_lm", "--criterion", "cross_entropy"),
        # Without the two dimensions fairseq projects from and to 512.
        *("--share-decoder-input-output-embed", "--decoder-input-dim", str(WIDTH), "--decoder-output-dim", str(WIDTH)),
        *("--tokens-per-sample", str(LENGTH), "--sample-break-mode", "none", *_size("decoder", layers)),
    )


def _masked(data: Path, layers: int) -> tuple[str, ...]:
    return (
        *(str(data), "--task", "masked_lm", "--arch", "roberta_base", "--criterion", "masked_lm"),
        *("--tokens-per-sample", str(LENGTH), "--max-positions", str(LENGTH), "--sample-break-mode", "none"),
        *_size("encoder", layers),
    )
