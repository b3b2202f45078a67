"""Comparisons of answers with expectations: plain data and printed text, on the trusted side only."""

import math
from typing import Any


def equal(answer: Any, expected: Any) -> bool:
    """Whether two plain values are equal and of the same types throughout."""
    if type(answer) is not type(expected):
        return False
    if isinstance(expected, (list, tuple)):
        return len(answer) == len(expected) and all(map(equal, answer, expected))
    if isinstance(expected, dict):
        if len(answer) != len(expected):
            return False
        # Keys by type too: 1, 1.0 and True are one key to a dict.
        keys = {(type(k), k): k for k in expected}
        return all((type(k), k) in keys and equal(answer[k], expected[k]) for k in answer)
    if isinstance(expected, (set, frozenset)):
        return {(type(item), item) for item in answer} == {(type(item), item) for item in expected}
    return bool(answer == expected)


_NUMBERS = (bool, int, float, complex)


def close(answer: Any, expected: Any, atol: float) -> bool:
    """EvalPlus's rule: `==`, or the same type and all numbers within rtol 1e-7 and `atol`.

    Floats have an `atol` of at least 1e-6. (evalplus/eval/__init__.py)
    """
    if answer == expected:
        return True
    if atol == 0 and _all_floats(expected):
        atol = 1e-6
    if atol == 0 or type(answer) is not type(expected):
        return False
    return _all_close(answer, expected, atol)


def _all_floats(value: Any) -> bool:
    if isinstance(value, (list, tuple)) and value:
        return all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def _all_close(answer: Any, expected: Any, atol: float) -> bool:
    if isinstance(expected, (list, tuple)):
        if not isinstance(answer, (list, tuple)) or len(answer) != len(expected):
            return False
        return all(_all_close(a, e, atol) for a, e in zip(answer, expected, strict=True))
    if not isinstance(answer, _NUMBERS) or not isinstance(expected, _NUMBERS):
        return False
    try:
        if answer == expected:
            return True  # infinities
        difference, size = abs(complex(answer) - complex(expected)), abs(complex(expected))
    except OverflowError:
        return False
    return math.isfinite(size) and difference <= atol + 1e-7 * size


def as_json(answer: Any, expected: Any) -> bool:
    """LiveCodeBench's rule: tuples are lists, numbers compare by value."""
    return bool(_lists(answer) == _lists(expected))


def _lists(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_lists(item) for item in value]
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return value


def text(printed: str, expected: str, rule: str, tolerance: float) -> str:
    """How the printed text differs from the expected by `rule` (`lines`, `tokens`, `numbers`); empty = it agrees."""
    if rule == "lines":
        got, want = _trimmed(printed), _trimmed(expected)
        unit = "line"
    else:
        got, want = printed.split(), expected.split()
        unit = "word"
    for index, (g, w) in enumerate(zip(got, want, strict=False)):
        if g != w and not (rule == "numbers" and _near(g, w, tolerance)):
            return f"{unit} {index + 1}: printed {g[:80]!r}, expected {w[:80]!r}"
    if len(got) != len(want):
        return f"printed {len(got)} {unit}s, expected {len(want)}"
    return ""


def _trimmed(content: str) -> list[str]:
    lines = [line.rstrip() for line in content.replace("\r\n", "\n").split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _near(got: str, want: str, tolerance: float) -> bool:
    try:
        a, b = float(got), float(want)
    except ValueError:
        return False
    if not (math.isfinite(a) and math.isfinite(b)):
        return a == b
    return abs(a - b) <= tolerance * max(1.0, abs(b))
