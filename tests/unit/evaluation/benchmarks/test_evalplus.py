"""EvalPlus's sets: inputs that JSON cannot hold, outputs of the references, oracles."""

import pickle
from collections import Counter, namedtuple
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluation.benchmarks.evalplus import oracle_of, read, restored_arguments
from ra3_megatron.evaluation.benchmarks.expected import Answered, Asked, expected_outputs
from ra3_megatron.evaluation.benchmarks.plain import dumps, loads
from ra3_megatron.evaluation.benchmarks.rows import Row
from ra3_megatron.reward.problem import CallTests

ROW = {
    "task_id": "HumanEval/7",
    "prompt": "def f(x):\n",
    "entry_point": "f",
    "canonical_solution": "    x.append(1)\n    return x\n",
    "base_input": [[[]]],
    "plus_input": [[[5]], [[6]]],
    "atol": 0,
}


@pytest.mark.parametrize(
    ("number", "arguments", "restored"),
    [
        (2, [[1], [2]], [(1,), (2,)]),
        (63, [[[1, 2], [3]]], [[(1, 2), (3,)]]),
        (75, [[[6, 24]], 6], [[(6, 24)], 6]),
        (106, [[5], [6]], [[5], (6,)]),
        (115, [[[1], []]], [[{1}, {}]]),
        (124, [1, "1j"], [1.0, 1j]),
        (252, ["1+2j"], [1 + 2j]),
        (250, [[8], 4], [(8,), 4]),
        (259, [[[1], [2]], [[3]]], [((1,), (2,)), ((3,),)]),
        (278, [[1, [2], 3]], [(1, (2,), 3)]),
        (307, [["a", [1]], 1, 2], [("a", [1]), 1, 2]),
        (580, [[4, [5, [6]]]], [(4, (5, (6,)))]),
        (722, [{"a": [1, 2]}, 3], [{"a": (1, 2)}, 3]),
        (1000, [[1]], [[1]]),
    ],
)
def test_inputs_are_what_the_references_take(number: int, arguments: list, restored: list) -> None:
    """JSON made lists of tuples, and references that hash or compare them failed."""
    found = restored_arguments(number, arguments)
    assert found == restored
    assert [type(x) for x in found] == [type(x) for x in restored]


def compute(cache: Path):
    return lambda asked: expected_outputs(asked, cache, "humaneval+", "data", lambda text: None)


def test_outputs_come_from_the_reference_and_are_kept(tmp_path: Path) -> None:
    """Every call gets arguments of its own, and the second reading runs nothing."""
    (task,) = read([Row(ROW, "here")], "humaneval+", compute(tmp_path), 4.0)
    assert isinstance(task.tests, CallTests)
    assert [case.expected for case in task.tests.cases] == [[1], [5, 1], [6, 1]]
    assert [case.args for case in task.tests.cases] == [([],), ([5],), ([6],)]
    assert task.visible == 1
    (kept,) = tmp_path.iterdir()
    before = kept.stat().st_mtime_ns
    assert read([Row(ROW, "here")], "humaneval+", compute(tmp_path), 4.0) == [task]
    assert kept.stat().st_mtime_ns == before


def test_a_damaged_cache_is_made_again(tmp_path: Path) -> None:
    """A cache cut by a full disk stopped every evaluation."""
    tasks = read([Row(ROW, "here")], "humaneval+", compute(tmp_path), 4.0)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:20])
    assert read([Row(ROW, "here")], "humaneval+", compute(tmp_path), 4.0) == tasks


@pytest.mark.parametrize(
    ("body", "message"),
    [("    raise OSError('no')\n", "OSError: no"), ("    import os; os._exit(3)\n", "ended the process")],
)
def test_a_reference_that_fails_is_named(tmp_path: Path, body: str, message: str) -> None:
    """A damaged file gave problems that nobody can solve."""
    with pytest.raises(UserError, match="reference solution of HumanEval/7 fails") as caught:
        read([Row({**ROW, "canonical_solution": body}, "here")], "humaneval+", compute(tmp_path), 4.0)
    assert message in str(caught.value)


def test_slow_references_raise_the_limit(tmp_path: Path) -> None:
    """The reference itself ran out of the time that its problem allows."""

    def slow(asked: Any) -> list[Answered]:
        return [Answered([0] * len(a.inputs), [0.1, 3.0, 0.1]) for a in asked]

    (task,) = read([Row(ROW, "here")], "humaneval+", slow, 4.0)
    assert task.limits is not None
    assert task.limits.cpu_s == pytest.approx(12.0, abs=1e-4)


def test_large_answers_raise_the_limit(tmp_path: Path) -> None:
    """A reference that was quick, and then had no time left to send ten megabytes."""

    def wide(asked: Any) -> list[Answered]:
        return [Answered(["x" * 10_000_000] * len(a.inputs), [0.1] * len(a.inputs)) for a in asked]

    (task,) = read([Row(ROW, "here")], "humaneval+", wide, 4.0)
    assert task.limits is not None
    assert task.limits.cpu_s == pytest.approx(8.0, rel=1e-3)
    assert task.limits.output_bytes > 10_000_000


def test_rows_that_are_no_evalplus_are_refused(tmp_path: Path) -> None:
    """Place and field."""
    for change, message in (({"entry_point": "g"}, "entry_point is 'g'"), ({"base_input": []}, "must be lists of")):
        with pytest.raises(UserError, match="here") as caught:
            read([Row({**ROW, **change}, "here")], "humaneval+", compute(tmp_path), 4.0)
        assert message in str(caught.value)


def accepts(benchmark: str, name: str, args: tuple, answer: Any, expected: Any, atol: float = 1e-4) -> bool:
    space: dict[str, Any] = {}
    exec(oracle_of(benchmark, name, atol), space)
    return bool(space["accept"](args, answer, expected))


def test_oracles() -> None:
    """The 16 problems whose answers are not simply equal: what counts, and what does not."""
    assert accepts("humaneval+", "find_zero", ([-2, 1],), 2.0, None)
    assert not accepts("humaneval+", "find_zero", ([-2, 1],), 2.1, None)
    assert accepts("mbpp+", "similar_elements", (), (5, 4, 5), (4, 5))
    assert not accepts("mbpp+", "similar_elements", (), (4,), (4, 5))
    assert accepts("mbpp+", "check_str", (), "match", True)
    assert not accepts("mbpp+", "check_str", (), None, True)
    assert not accepts("mbpp+", "check_str", (), False, True)
    assert accepts("mbpp+", "are_equivalent", (), "anything", 1)
    assert accepts("mbpp+", "sum_div", (8,), 0, 7)
    assert not accepts("mbpp+", "sum_div", (8,), 6, 7)
    assert accepts("mbpp+", "digit_distance_nums", (1, 23), 4, 99)
    assert accepts("mbpp+", "surface_Area", (3, 4), 35, 33)
    assert oracle_of("mbpp+", "add", 0) == ""
    named = ["similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum"]
    named += ["intersection_array", "find_dissimilar", "Diff", "check_str", "text_match_three", "text_starta_endb"]
    named += ["are_equivalent", "sum_div", "surface_Area", "digit_distance_nums"]
    assert all(oracle_of("mbpp+", name, 0) for name in named)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(plain)
def test_plain_data_comes_back_as_it_was(value: Any) -> None:
    """A tuple that came back as a list made right answers wrong."""
    back = loads(dumps(value))
    assert back == value
    assert repr(back) == repr(value)


def test_subclasses_become_plain_and_others_are_refused() -> None:
    """MBPP+'s references return Counters and named tuples."""
    point = namedtuple("point", "x y")
    found = loads(dumps([Counter("aab"), point(1, 2), {3}, frozenset({4}), 10**5000]))
    assert found == [{"a": 2, "b": 1}, (1, 2), {3}, frozenset({4}), 10**5000]
    assert [type(x) for x in found] == [dict, tuple, set, frozenset, int]
    with pytest.raises(ValueError, match="no plain data"):
        dumps(object())
    with pytest.raises(pickle.UnpicklingError, match="plain data only"):
        loads(pickle.dumps(Asked))
