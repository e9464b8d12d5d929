"""The names of a checkpoint's tensors against those of the model that the workload builds.

Wrappers put prefixes before names (``module.``, ``model.``) or words into them (``_orig_mod``): what makes the names
match is found from the names themselves. Whatever does not match is named, with what may have become of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from recorder.errors import UsageError
from recorder.importing.weights import Facts

if TYPE_CHECKING:
    from torch import nn

    from recorder.table import Parameter

_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Words that torch's own wrappers put into a name; no module of a user is called so."""

_NUMBERS = frozenset({"float64", "float32", "float16", "bfloat16"})
_MOST_NAMED = 6
_LOOKED_AT = 64


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """What a model expects of a checkpoint.

    Parameters
    ----------
    parameters
        Name of every parameter to its aliases and facts; tied weights once.
    buffers
        Name of every buffer that a ``state_dict`` holds to its facts.
    others
        Names of the other buffers: older versions of a library may have saved them.
    """

    parameters: Mapping[str, tuple[tuple[str, ...], Facts]]
    buffers: Mapping[str, Facts]
    others: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, table: Iterable[Parameter]) -> Model:
        """Take from a live model what it expects.

        Parameters
        ----------
        model
            The model.
        table
            Its parameter table.

        Returns
        -------
        Model
            Names and facts.
        """
        saved = set(model.state_dict(keep_vars=True))
        buffers = {
            name: Facts(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for name, tensor in model.named_buffers(remove_duplicate=False)
        }
        return cls(
            parameters={row.name: (row.aliases, Facts(row.shape, row.computed_dtype)) for row in table},
            buffers={name: facts for name, facts in buffers.items() if name in saved},
            others=frozenset(set(buffers) - saved),
        )

    @property
    def names(self) -> set[str]:
        """Every name of a parameter, aliases included."""
        return {name for first, (aliases, _) in self.parameters.items() for name in (first, *aliases)}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Match:
    """How a checkpoint's tensors belong to a model.

    Parameters
    ----------
    tensors
        Name of a parameter or buffer of the model to the tensor's name in the checkpoint.
    facts
        The same names to what is known of these tensors.
    duplicates
        Name of a parameter to further tensors of the checkpoint that are the same by the model: tied weights.
    prefix
        What the checkpoint's names have before the model's; empty if nothing.
    added
        What the model's names have before the checkpoint's; empty if nothing.
    outside
        Number of tensors that do not have the prefix: they belong to something around the model.
    problems
        What does not match, each in words.
    """

    tensors: Mapping[str, str]
    facts: Mapping[str, Facts]
    duplicates: Mapping[str, tuple[str, ...]]
    prefix: str
    added: str
    outside: int
    problems: tuple[str, ...]

    @property
    def said(self) -> str:
        """The prefix in words; empty where names are the same."""
        parts = [f"names without their {self.prefix!r}"] if self.prefix else []
        parts += [f"names with {self.added!r} before them"] if self.added else []
        parts += [f"{self.outside} tensors outside it left out"] if self.outside else []
        return ", ".join(parts)


def match(model: Model, facts: Mapping[str, Facts], *, prefix: str | None, ignored: Sequence[str]) -> Match:
    """Find for every parameter and buffer of a model its tensor in a checkpoint.

    Parameters
    ----------
    model
        What the model expects.
    facts
        The checkpoint's tensors.
    prefix
        What its names have before the model's; None to find it.
    ignored
        Patterns, as of a shell, of names of tensors that the model need not have.

    Returns
    -------
    Match
        The tensors found, and what is wrong in words.
        A `UsageError` tells if several prefixes match equally well.
    """
    plain = _without_wrappers(facts)
    known = model.names
    unwrapped = {_unwrapped(name): name for name in (*known, *model.buffers, *model.others)}
    prefix, added = (prefix, "") if prefix is not None else _prefix(set(map(_unwrapped, known)), plain)
    inside: dict[str, str] = {}
    outside = 0
    for name, original in plain.items():
        if name.startswith(prefix):
            ours = added + name.removeprefix(prefix)
            inside[unwrapped.get(ours, ours)] = original
        else:
            outside += 1
    tensors: dict[str, str] = {}
    duplicates: dict[str, tuple[str, ...]] = {}
    missing = []
    for name, (aliases, _) in model.parameters.items():
        held = [inside.pop(other) for other in (name, *aliases) if other in inside]
        if held:
            tensors[name] = held[0]
            duplicates |= {name: tuple(held[1:])} if held[1:] else {}
        else:
            missing.append(name)
    for name in model.buffers:
        if name in inside:
            tensors[name] = inside.pop(name)
    left = {
        name: facts[original]
        for name, original in inside.items()
        if name not in model.others and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored)
    }
    of_model = {name: facts[original] for name, original in tensors.items()}
    return Match(
        tensors=tensors,
        facts=of_model,
        duplicates=duplicates,
        prefix=prefix,
        added=added,
        outside=outside,
        problems=(
            *_missing(missing, left, model),
            *_extra(left, missing),
            *_shapes(of_model, model),
        ),
    )


def _unwrapped(name: str) -> str:
    return ".".join(word for word in name.split(".") if word not in _WRAPPERS)


def _without_wrappers(names: Iterable[str]) -> dict[str, str]:
    return {_unwrapped(name): name for name in names}


def _prefix(known: Collection[str], found: Collection[str]) -> tuple[str, str]:
    # What stands before the model's names in the checkpoint, and what before the checkpoint's in the model.
    names = set(known)
    candidates = {("", "")}
    # A part of the names is enough to see every prefix by which most of them match.
    for name in sorted(names)[:: 1 + len(names) // _LOOKED_AT]:
        candidates |= {(other.removesuffix(name), "") for other in found if other.endswith(f".{name}")}
        words = name.split(".")
        heads = (".".join(words[:depth]) + "." for depth in range(1, len(words)))
        candidates |= {("", head) for head in heads if name.removeprefix(head) in found}
    scores = {
        (before, added): sum(before + name.removeprefix(added) in found for name in names if name.startswith(added))
        for before, added in candidates
    }
    best = max(scores.values())
    if scores["", ""] == best:
        return "", ""
    chosen = [candidate for candidate, score in scores.items() if score == best]
    if len(chosen) > 1:
        options = " and ".join(sorted(repr(before or f"without {added}") for before, added in chosen))
        message = (
            f"{best} of the model's {len(names)} names are there behind each of the prefixes {options}; say which "
            "holds the model: --prefix PREFIX"
        )
        raise UsageError(message)
    return chosen[0]


def _missing(missing: Sequence[str], left: Mapping[str, Facts], model: Model) -> list[str]:
    if not missing:
        return []
    named = []
    for name in missing[:_MOST_NAMED]:
        shape = model.parameters[name][1].shape
        alike = [other for other, facts in left.items() if facts.shape == shape]
        near = difflib.get_close_matches(name, alike, n=1, cutoff=0.5) or difflib.get_close_matches(name, left, n=1)
        named.append(f"{name!r} {shape}" + (f" (renamed? there is {near[0]!r} {left[near[0]].shape})" if near else ""))
    return [f"{len(missing)} parameters are missing: {_some(named, len(missing))}"]


def _extra(left: Mapping[str, Facts], missing: Sequence[str]) -> list[str]:
    if not left:
        return []
    named = [f"{name!r} {facts.shape}" for name, facts in list(left.items())[:_MOST_NAMED]]
    remedy = "" if missing else "; if the loss does not need them pass --ignore PATTERN"
    return [f"{len(left)} tensors are not the model's: {_some(named, len(left))}{remedy}"]


def _shapes(found: Mapping[str, Facts], model: Model) -> list[str]:
    expected = {name: facts for name, (_, facts) in model.parameters.items()} | dict(model.buffers)
    shapes = [
        f"{name!r} is {facts.shape}, the model's {expected[name].shape}"
        for name, facts in found.items()
        if facts.shape != expected[name].shape
    ]
    dtypes = [
        f"{name!r} is {facts.dtype}"
        for name, facts in found.items()
        if name in model.parameters and facts.dtype not in _NUMBERS
    ]
    problems = []
    if shapes:
        problems.append(f"{len(shapes)} shapes differ: {_some(shapes[:_MOST_NAMED], len(shapes))}")
    if dtypes:
        problems.append(
            f"{len(dtypes)} parameters are in none of {', '.join(sorted(_NUMBERS))}: "
            f"{_some(dtypes[:_MOST_NAMED], len(dtypes))}"
        )
    return problems


def _some(named: Sequence[str], of: int) -> str:
    return ", ".join(named) + (f" and {of - len(named)} more" if of > len(named) else "")
