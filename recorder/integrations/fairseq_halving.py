"""A fairseq sample cut in two, for one that does not fit into memory. Imports no fairseq."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from recorder.errors import MismatchError, UsageError


def halve_sample(sample: Any, pad: int) -> tuple[Any, Any]:
    """Cut a sample in two by its sentences.

    Parameters
    ----------
    sample
        As fairseq's collater makes it.
    pad
        What stands where there is no token.

    Returns
    -------
    tuple of dict
        Two samples whose numbers of sentences and of tokens, by which fairseq's criteria average, add up to the
        sample's.

    Raises
    ------
    UsageError
        If it is one sentence.
    """
    sentences = len(sample["id"])
    if sentences < 2:
        message = "a single sentence does not fit into memory; use a device with more of it, or fewer --workers"
        raise UsageError(message)
    tokens = _tokens_by_sentence(sample, pad)
    middle = (sentences + 1) // 2
    first, second = (
        {**_rows(sample, part, sentences), "nsentences": len(tokens[part]), "ntokens": int(tokens[part].sum())}
        for part in (slice(0, middle), slice(middle, sentences))
    )
    return first, second


def _tokens_by_sentence(sample: Any, pad: int) -> torch.Tensor:
    # ``ntokens`` counts the target in translation, the source in language models.
    held = [tokens for tokens in (sample["target"], sample["net_input"]["src_tokens"]) if tokens is not None]
    counts: list[torch.Tensor] = [tokens.ne(pad).sum(dim=1) for tokens in held]
    for count in counts:
        if int(count.sum()) == int(sample["ntokens"]):
            return count
    message = (
        f"a sample does not fit into memory and cannot be cut in two: expected its {int(sample['ntokens'])} tokens in "
        f"the target or the source, found {' and '.join(str(int(count.sum())) for count in counts)}; use a device with "
        "more memory, or replay on other --loss-data"
    )
    raise MismatchError(message)


def _rows(sample: Any, part: slice, sentences: int) -> Any:
    if isinstance(sample, torch.Tensor):
        return sample[part] if sample.dim() > 0 and len(sample) == sentences else sample
    if isinstance(sample, Mapping):
        return {key: _rows(value, part, sentences) for key, value in sample.items()}
    return sample
