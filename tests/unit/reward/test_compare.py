"""Comparison of answers and of printed text."""

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.reward.guest import compare


def test_equal_looks_at_types_all_the_way_down() -> None:
    """1.0 and True passed for 1."""
    assert compare.equal([1, {"a": (2, {3})}], [1, {"a": (2, {3})}])
    for answer, expected in (
        (1.0, 1),
        (True, 1),
        ((1,), [1]),
        ([1.0], [1]),
        ({1: 2}, {1.0: 2}),
        ({1: 2}, {1: 2.0}),
        ({1}, {True}),
        (frozenset(), set()),
        (math.nan, math.nan),
        ([1, 2], [1]),
        ({"a": 1}, {"a": 1, "b": 2}),
    ):
        assert not compare.equal(answer, expected), (answer, expected)


FLOATS = st.floats(allow_nan=True, allow_infinity=True, width=64)


@given(st.lists(st.tuples(FLOATS, st.sampled_from([0.0, 1e-9, 1e-7, 1e-6, 1e-3])), max_size=5), st.booleans())
@settings(max_examples=300, deadline=None)
def test_close_agrees_with_numpys_allclose(pairs: list[tuple[float, float]], scaled: bool) -> None:
    """Infinities and tolerances differed from those of the evaluator that this rule is taken from."""
    expected = [value for value, _ in pairs]
    answer = [value + shift * (value if scaled else 1.0) for value, shift in pairs]
    with np.errstate(all="ignore"):
        want = answer == expected or (bool(expected) and bool(np.allclose(answer, expected, rtol=1e-7, atol=1e-6)))
    assert compare.close(answer, expected, 0.0) == want


def test_close_as_evalplus_has_it() -> None:
    """Hand-computed cases of EvalPlus's rule."""
    assert compare.close(True, 1, 0)  # `==` comes first
    assert compare.close([1, 2.0], [1.0, 2], 0)
    assert compare.close(1.0000001, 1.0, 0)
    assert not compare.close(1.00001, 1.0, 0)
    assert not compare.close(3, 4, 0)
    assert compare.close(3, 4, 1)
    assert not compare.close([1.0], (1.0000001,), 0)
    assert not compare.close("a", 1.0, 1e-3)
    assert not compare.close(10**400, 1.0, 1e-3)
    assert not compare.close({"a": 1.0}, {"a": 1.0000001}, 1e-3)


def test_json_takes_tuples_for_lists_and_numbers_by_value() -> None:
    """Expected values come from JSON, which has no tuples."""
    assert compare.as_json((1, (2.0, "a")), [1, [2, "a"]])
    assert compare.as_json({"a": (1,)}, {"a": [1]})
    assert not compare.as_json([1, 2], [2, 1])
    assert not compare.as_json("1", 1)


@pytest.mark.parametrize(
    ("printed", "expected", "lines", "tokens", "numbers"),
    [
        ("1 2\n3\n", "1 2\n3", True, True, True),
        ("1 2\r\n3  \n\n\n", "1 2\n3\n", True, True, True),
        ("1  2\n3", "1 2\n3", False, True, True),
        ("1 2 3", "1 2\n3", False, True, True),
        (" 1", "1", False, True, True),
        ("1\n\n2", "1\n2", False, True, True),
        ("1.0", "1", False, False, True),
        ("0.33333333", "0.333333333333", False, False, True),
        ("nan", "1", False, False, False),
        ("nan", "nan", True, True, True),
        ("inf", "1e308", False, False, False),
        ("1e9", "1000000000", False, False, True),
        ("YES", "yes", False, False, False),
        ("1 2", "1", False, False, False),
        ("", "1", False, False, False),
        ("", "\n", True, True, True),
        ("1 2 3", "1 2", False, False, False),
    ],
)
def test_printed_text(printed: str, expected: str, lines: bool, tokens: bool, numbers: bool) -> None:
    """Missing final newline, Windows line ends and spaces at line ends are no errors; anything more is."""
    results: dict[str, Any] = {
        rule: compare.text(printed, expected, rule, 1e-6) == "" for rule in ("lines", "tokens", "numbers")
    }
    assert results == {"lines": lines, "tokens": tokens, "numbers": numbers}
