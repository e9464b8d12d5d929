from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recorder.errors import UsageError
from recorder.patterns import select_names

NAMES = ["encoder.0.fc1.weight", "encoder.0.fc1.bias", "encoder.1.fc1.weight", "decoder.0.out.weight", "embedding"]


@pytest.mark.parametrize(
    ("patterns", "selected"),
    [
        ([], {0, 1, 2, 3, 4}),
        (["*"], {0, 1, 2, 3, 4}),
        (["embedding"], {4}),
        (["encoder.*"], {0, 1, 2}),
        (["encoder.?.fc1.weight"], {0, 2}),
        (["encoder.[!0].*", "embedding"], {2, 4}),
        (["!*.bias"], {0, 2, 3, 4}),
        (["encoder.*", "!*.bias"], {0, 2}),
        (["!encoder.*", "*.bias"], {1, 3, 4}),
        (["*.bias", "!encoder.*", "encoder.0.*"], {0, 1}),
        (["encoder.*", "!encoder.*"], set()),
    ],
)
def test_the_last_pattern_that_matches_a_name_decides(patterns: list[str], selected: set[int]) -> None:
    assert select_names(NAMES, patterns) == {NAMES[i] for i in selected}


pieces = st.sampled_from(["*", "a*", "*b", "?b", "[ab]*", "!*", "!a*", "!*b", "!?a"])


@given(patterns=st.lists(pieces, max_size=6))
def test_each_name_is_judged_by_itself(patterns: list[str]) -> None:
    names = ["aa", "ab", "ba", "bb"]
    for name in names:
        deciding = [pattern for pattern in patterns if fnmatchcase(name, pattern.removeprefix("!"))]
        first_excludes = not patterns or patterns[0].startswith("!")
        expected = not deciding[-1].startswith("!") if deciding else first_excludes
        assert (name in select_names(names, patterns)) == expected


def test_capitals_count() -> None:
    with pytest.raises(UsageError):
        select_names(NAMES, ["Embedding"])


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("encoder.layers.0.fc1.weight", "encoder.0.fc1.weight"),
        ("!encoder.*.fc1.wieght", "encoder.0.fc1.weight"),
        ("embeddings", "embedding"),
        ("decoder.*.out_proj.*", "decoder.0.out.weight"),
    ],
)
def test_a_pattern_without_a_match_is_refused_and_close_names_are_offered(pattern: str, meant: str) -> None:
    with pytest.raises(UsageError, match="matches no parameter; did you mean") as refused:
        select_names(NAMES, ["*", pattern])
    assert f"the pattern {pattern!r} matches no parameter" in str(refused.value)
    assert repr(meant) in str(refused.value)


@pytest.mark.parametrize("pattern", ["zzz", "", "!"])
def test_where_no_name_is_close_the_first_names_are_told(pattern: str) -> None:
    with pytest.raises(UsageError) as refused:
        select_names(NAMES, [pattern])
    assert str(refused.value) == (
        f"the pattern {pattern!r} matches no parameter; there are 5 names: "
        "'encoder.0.fc1.weight', 'encoder.0.fc1.bias', 'encoder.1.fc1.weight', ..."
    )
