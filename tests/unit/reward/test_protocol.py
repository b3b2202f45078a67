"""Messages of the judge service: what goes in comes out, and nothing else comes in."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ra3_megatron.config.errors import UserError
from ra3_megatron.reward.problem import (
    AssertTests,
    CallCase,
    CallTests,
    InProcessTests,
    Limits,
    Outcome,
    StdinCase,
    StdinTests,
    Submission,
    Tests,
    Verdict,
)
from ra3_megatron.reward.protocol import (
    ProtocolError,
    pack_submission,
    pack_verdict,
    read_secret,
    unpack_submission,
    unpack_verdict,
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text(st.characters())
    | st.binary(max_size=8)
)
hashable = st.recursive(scalars, lambda x: st.tuples(x, x) | st.frozensets(scalars, max_size=3), max_leaves=5)
plain = st.recursive(
    scalars,
    lambda x: st.lists(x, max_size=3) | st.tuples(x, x) | st.dictionaries(hashable, x, max_size=3) | st.sets(hashable),
    max_leaves=8,
)
MANY: tuple[Tests, ...] = (
    AssertTests("f", ("assert f(1) == 2", "check(candidate)"), "def check(c):\n    pass"),
    CallTests(
        "f", (CallCase((1, (2, [3.0])), {"a": {1, 2}}),), "Solution", "close", 1e-6, "def accept(*a): ...", "x = 1"
    ),
    StdinTests((StdinCase("1\r\n", "\ud800 2"),), "numbers", 0.5, "print(1)"),
    InProcessTests("assert True", b"\x00\xff", 2.0),
)


@pytest.mark.parametrize("tests", MANY, ids=lambda t: type(t).__name__)
def test_submission_survives(tests: Tests) -> None:
    """A field that was added to the tests did not reach the service."""
    given_ = Submission("def f():\n    return '\udcff é'", tests, Limits(0.5, None, 64, 100), "name", True)
    assert unpack_submission(pack_submission(given_)) == given_


@given(plain, st.lists(plain, max_size=3))
def test_plain_data_survives(expected: Any, args: list[Any]) -> None:
    """JSON made lists of tuples, strings of integer keys and floats of integers, and right programs failed."""
    given_ = Submission("", CallTests("f", (CallCase(tuple(args), expected),)))
    back = unpack_submission(pack_submission(given_))
    assert isinstance(back.tests, CallTests)
    # repr tells 1 from 1.0 and True, and -0.0 from 0.0; sets may be ordered otherwise.
    assert back == given_
    if "{" not in repr(given_) and "frozenset" not in repr(given_):
        assert repr(back) == repr(given_)


def test_special_floats_survive() -> None:
    """JSON has no NaN and no infinities."""
    back = unpack_submission(pack_submission(Submission("", CallTests("f", (CallCase((math.nan, -0.0), math.inf),)))))
    assert isinstance(back.tests, CallTests)
    (case,) = back.tests.cases
    assert math.isnan(case.args[0])
    assert math.copysign(1, case.args[1]) == -1
    assert case.expected == math.inf


def test_verdict_survives() -> None:
    """An outcome came back as a string, which no branch knew."""
    verdict = Verdict(Outcome.CPU_LIMIT, 2, 5, "slow \ud800", 1.5, 2.0)
    back = unpack_verdict(pack_verdict(verdict))
    assert back == verdict
    assert back.outcome is Outcome.CPU_LIMIT


def damaged() -> list[tuple[str, Any]]:
    """Messages that are not of this protocol."""
    good = json.loads(pack_submission(Submission("x", MANY[1])))
    limits = good["limits"]
    case = good["tests"]["cases"][0]
    return [
        ("a list", []),
        ("format", {**good, "format": 2}),
        ("no format", {k: v for k, v in good.items() if k != "format"}),
        ("missing field", {k: v for k, v in good.items() if k != "program"}),
        ("unknown field", {**good, "more": 1}),
        ("wrong type", {**good, "program": 1}),
        ("number for bool", {**good, "all_tests": 1}),
        ("unknown kind", {**good, "tests": {**good["tests"], "kind": "exec"}}),
        ("no kind", {**good, "tests": {k: v for k, v in good["tests"].items() if k != "kind"}}),
        ("unknown rule", {**good, "tests": {**good["tests"], "compare": "always"}}),
        ("limits", {**good, "limits": {**limits, "cpu_s": "4"}}),
        ("infinite limit", {**good, "limits": {**limits, "cpu_s": math.inf}}),
        ("bool for int", {**good, "limits": {**limits, "memory_mb": True}}),
        ("no base64", {**good, "tests": {**good["tests"], "cases": [{**case, "args": "*"}]}}),
        ("no plain data", {**good, "tests": {**good["tests"], "cases": [{**case, "expected": "AAAA"}]}}),
        ("args no tuple", {**good, "tests": {**good["tests"], "cases": [{**case, "args": case["expected"]}]}}),
        ("cases no list", {**good, "tests": {**good["tests"], "cases": "abc"}}),
    ]


@pytest.mark.parametrize("content", [c for _, c in damaged()], ids=[n for n, _ in damaged()])
def test_damaged_message_is_refused(content: Any) -> None:
    """A client of another version had its fields ignored, and all its programs failed."""
    with pytest.raises(ProtocolError):
        unpack_submission(json.dumps(content).encode())


@pytest.mark.parametrize("body", [b"", b"\xff", b"{", b"[" * 10**5])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    """A bad request was a crash of the service."""
    with pytest.raises(ProtocolError):
        unpack_submission(body)


def test_objects_are_refused() -> None:
    """An object of a class would have had to be pickled."""
    with pytest.raises(ProtocolError, match="cannot be sent"):
        pack_submission(Submission("", CallTests("f", (CallCase((object(),), 1),))))


def test_secret_file_is_checked(tmp_path: Path) -> None:
    """A secret that everybody on the machine could read, or an empty one, was used."""
    path = tmp_path / "secret"
    with pytest.raises(UserError, match="cannot be read"):
        read_secret(str(path))
    path.write_text("0123456789abcdef0123\n")
    path.chmod(0o644)
    with pytest.raises(UserError, match="chmod 600"):
        read_secret(str(path))
    path.chmod(0o600)
    assert read_secret(str(path)) == "0123456789abcdef0123"
    path.write_text("short\n")
    with pytest.raises(UserError, match="holds 5 characters"):
        read_secret(str(path))
