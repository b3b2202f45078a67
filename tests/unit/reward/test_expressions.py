"""Asserts carried out in the referee have the verdicts of those that run in a process of their own.

RA3_ALL_SAMPLES=1 compares all tasks of MBPP and HumanEval, all 200 samples and every statement by itself (minutes).
"""

import json
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from ra3_megatron.reward.guest import asserts, plain
from ra3_megatron.reward.guest.asserts import Plan
from ra3_megatron.reward.guest.supervise import Ended
from ra3_megatron.reward.judge import Judge
from ra3_megatron.reward.problem import AssertTests, Limits, Outcome, Submission, Verdict
from tests.unit.reward.test_canonical import function_of, humaneval, read

SAMPLES = Path(__file__).parents[2] / "data" / "agreement_samples.jsonl"
ALL = bool(os.environ.get("RA3_ALL_SAMPLES"))
APART = "\nif True:\n    pass\n"
"""A statement that is never carried out in the referee: with it, the same tests run in a process of their own."""
LIMITS = Limits(cpu_s=4.0)


def plan(entry_point: str, setup: str, *tests: str) -> Plan | None:
    return asserts.plan({"entry_point": entry_point, "setup": setup, "tests": tests})


def understood(submission: Submission) -> bool:
    tests = submission.tests
    assert isinstance(tests, AssertTests)
    return plan(tests.entry_point, tests.setup, *tests.tests) is not None


def apart(submission: Submission) -> Submission:
    tests = submission.tests
    assert isinstance(tests, AssertTests)
    return replace(submission, tests=replace(tests, setup=tests.setup + APART))


def what(verdict: Verdict) -> tuple[Outcome, int, int, str]:
    return verdict.outcome, verdict.passed, verdict.total, re.sub("0x[0-9a-f]+", "0x", verdict.message)


def check_same(judge: Judge, submissions: list[Submission]) -> list[Verdict]:
    """Judge all both ways; no verdict differs."""
    assert not any(understood(apart(one)) for one in submissions)
    verdicts = judge.judge([each for one in submissions for each in (one, apart(one))])
    pairs = list(zip(verdicts[::2], verdicts[1::2], strict=True))
    different = {s.name: p for s, p in zip(submissions, pairs, strict=True) if what(p[0]) != what(p[1])}
    assert different == {}
    return verdicts[::2]


def mbpp() -> list[Submission]:
    return [
        Submission(
            row["code"],
            AssertTests(function_of(row), (*row["test_list"], *row["challenge_test_list"]), row["test_setup_code"]),
            name=f"mbpp/{row['task_id']}",
        )
        for row in read("mbpp/mbpp.jsonl")
    ]


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_benchmarks_are_understood() -> None:
    """A change made most tasks unknown: nothing failed, and all became twice as slow."""
    assert sum(map(understood, mbpp())) >= 965
    assert sum(map(understood, humaneval())) >= 151


@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_reference_solutions(judge: Judge) -> None:
    """A right program failed where its tests ran, and passed where they did not, or the other way round."""
    check_same(judge, [*mbpp()[:: 1 if ALL else 80], *humaneval()[:: 1 if ALL else 16]])


@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_samples(judge: Judge) -> None:
    """Wrong programs: another outcome, or another message."""
    tasks = {one.name: one for one in humaneval()}
    tasks |= {f"Mbpp/{one.name.split('/')[1]}": one for one in mbpp()}
    prompts = {row["task_id"]: row["prompt"] for row in read("humaneval/HumanEval.jsonl.gz")}
    submissions = []
    for line in SAMPLES.read_text(encoding="utf-8").splitlines()[:: 1 if ALL else 16]:
        sample = json.loads(line)
        program = prompts.get(sample["task_id"], "") + sample["completion"]
        name = f"{sample['id']} {sample['task_id']} {sample['change']}"
        limits = Limits(cpu_s=0.3) if sample["change"] == "infinite_loop" else LIMITS
        submissions.append(replace(tasks[sample["task_id"]], program=program, name=name, limits=limits))
    check_same(judge, submissions)


ANSWERS = {
    "None": "None",
    "True": "True",
    "one": "1",
    "one as float": "1.0",
    "minus zero": "-0.0",
    "nan": "float('nan')",
    "huge": "10 ** 5000",
    "text": "'abc'",
    "list": "[3, 1, 2]",
    "mixed": "[1, 'a', None]",
    "nested": "[[1, 2], (3,)]",
    "nan inside": "[float('nan'), 1]",
    "sets": "[{1}, {1, 2}, set()]",
    "tuple": "(1, 2, 3)",
    "set": "{1, 2, 3}",
    "dict": "{'a': 1, 'b': [2]}",
    "generator": "(i for i in range(1, 4))",
    "range": "range(1, 4)",
    "deque": "__import__('collections').deque([1, 2, 3])",
    "handle": "object()",
    "equal to all": "type('E', (), {'__eq__': lambda s, o: True, '__hash__': lambda s: 1})()",
    "list subclass": "type('L', (list,), {'__eq__': lambda s, o: True, '__len__': lambda s: 3})([9])",
    "str subclass": "type('S', (str,), {'__eq__': lambda s, o: True, '__hash__': lambda s: 1})('z')",
    "type": "int",
    "raises": "1 / 0",
    "raises a name": "missing_name",
    "asserts": "(_ for _ in ()).throw(AssertionError('mine'))",
    "memory": "bytearray(10 ** 12)",
    "exits": "__import__('os')._exit(0)",
    "system exit": "__import__('sys').exit(0)",
    "cycle": "(lambda a: a.append(a) or a)([])",
}
STATEMENTS = (
    "assert f(1)",
    "assert not f(1)",
    "assert f(1) == 1",
    "assert f(1) != 1, 'is one'",
    "assert f(1) == [3, 1, 2] and f(2)",
    "assert f(1) == (1, 2, 3) or f(2) == {1, 2, 3}",
    "assert f(1) is True",
    "assert f(1) is None, f(2)",
    "assert f(1) < 2",
    "assert 0 <= f(1) <= 1",
    "assert f(1) in [1, 'abc', [3, 1, 2], {1, 2, 3}]",
    "assert 2 in f(1)",
    "assert 2.5 not in f(1)",
    "assert set(f(1)) == {1, 2, 3}",
    "assert sorted(f(1)) == [1, 2, 3]",
    "assert sorted(f(1), reverse=True) == [3, 2, 1]",
    "assert list(f(1)) == [1, 2, 3]",
    "assert tuple(f(1)) == (1, 2, 3)",
    "assert len(f(1)) == 3",
    "assert sum(f(1)) == 6",
    "assert min(f(1)) == 1 and max(f(2)) == 3",
    "assert all(f(1)) and any(f(2))",
    "assert abs(f(1) - 1) < 1e-6",
    "assert round(f(1), 2) == 1",
    "assert str(f(1)) == '1'",
    "assert math.isclose(f(1), 1.0, rel_tol=1e-9)",
    "assert isinstance(f(1), int)",
    "assert f(1)[0] == 3 and f(2)[-1] == 2",
    "assert f(1) + [4] == [3, 1, 2, 4]",
    "a = f(1); assert f(a) == 1",
    "a = [1]; f(a); assert a == 1 or a == [1]",
    "assert f(f(1))",
    "assert f({1: [2]}, ) == {'a': 1, 'b': [2]}",
    "assert f([1]) == -0.0",
    "f(1)",
    "assert f({[]: 1})",
    "assert (f(1) == 1) is (f(2) == 1)",
)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ANSWERS)
def test_odd_answers(judge: Judge, name: str) -> None:
    """A handle, an iterator or a subclass meant one thing in the referee and another where the tests run."""
    program = f"def f(x):\n    return {ANSWERS[name]}"
    limits = Limits(cpu_s=2.0, memory_mb=512, output_bytes=1 << 16)
    setup = "import math"
    every = Submission(program, AssertTests("f", STATEMENTS, setup), limits, name, all_tests=True)
    assert understood(every)
    first = Submission(program, AssertTests("f", ("f(0); " + "\n".join(STATEMENTS[:4]),), setup), limits, name)
    single = [Submission(program, AssertTests("f", (s,), setup), limits, s) for s in STATEMENTS] if ALL else []
    verdicts = check_same(judge, [every, first, *single])
    assert {v.outcome for v in verdicts}.isdisjoint({Outcome.PASSED, Outcome.LOST} if not ALL else {Outcome.LOST})


UNKNOWN = {
    "a power": ("", "assert f(1) == 9 ** 9"),
    "repetition": ("", "assert f(1) == [0] * 9"),
    "formatting": ("", "assert f(1) % 3 == '1'"),
    "an attribute": ("", "assert f(1).real == 1"),
    "a method": ("", "assert f('a').upper() == 'A'"),
    "a name of the program": ("", "assert f(1) == helper"),
    "math not imported": ("", "assert math.isclose(f(1), 1)"),
    "eval": ("", "assert eval('f(1)') == 1"),
    "a lambda": ("", "assert f(lambda: 1) == 1"),
    "two answers": ("", "assert f(1) == f(2)"),
    "a loop": ("", "for i in range(3): assert f(i) == i"),
    "a builtin assigned": ("", "len = 3; assert f(1) == 1"),
    "a variable of another test": ("", "assert f(x) == 1"),
    "a builtin redefined": ("def len(x): return 3", "assert f(1) == 1"),
    "a builtin imported": ("from math import prod as set", "assert f(1) == 1"),
    "everything imported": ("from math import *", "assert f(1) == 1"),
    "a module that does things": ("import os", "assert f(1) == 1"),
    "a name that the module lacks": ("from math import nothing", "assert f(1) == 1"),
    "a helper called": ("def g(x): return x", "assert f(1) == g(1)"),
    "a decorator": ("@print\ndef g(x): return x", "assert f(1) == 1"),
    "a default value": ("def g(x=print(1)): return x", "assert f(1) == 1"),
    "an annotation that raises": ("def g(x: int[3]): return x", "assert f(1) == 1"),
    "an annotation nobody knows": ("def g(x: List[int]): return x", "assert f(1) == 1"),
    "a class": ("class A: pass", "assert f(1) == 1"),
    "a literal that raises": ("A = {[]: 1}", "assert f(1) == 1"),
    "check of something else": ("def check(c): assert c(1) == 1\ng = 1", "check(g)"),
    "check with two arguments": ("def check(c, d): assert c(1) == 1", "check(f)"),
    "check that assigns a global of the setup": ("a = 1\ndef check(c):\n    a = 2\n    assert c(1) == 1", "check(f)"),
    "syntax": ("", "assert f(1) = 1"),
    "long": ("", f"assert f({'1' * 20000!r}) == 1"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_left_to_a_process(name: str) -> None:
    """Code whose meaning depends on something else was guessed at, or run in the referee."""
    setup, test = UNKNOWN[name]
    assert plan("f", "", "assert f(1) == 1") is not None
    assert plan("f", setup, test) is None


def test_calls_sent_ahead_keep_their_order(judge: Judge) -> None:
    """Answers of calls sent together were given to the wrong ones, or a call that is left out was made."""
    program = "calls = []\ndef f(*a, **k):\n    calls.append((list(a), k))\n    return len(calls)"
    body = (
        "def check(c):\n    assert {c(1): c(2)} == {1: 2}\n    assert [c(3), (c(4), c(5, k=6))] == [3, (4, 5)]\n"
        "    assert c(6) == 6 or c(7) == 0\n    assert 0 < c(8) <= 7 < c(9)\n    assert c(10) == 9, c(11)\n"
    )
    tests = AssertTests("f", ("check(candidate)", "assert f(12) == 10", "assert f(13) == 0, f(14)"), body)
    submissions = [Submission(program, tests, name="first"), Submission(program, tests, name="all", all_tests=True)]
    verdicts = check_same(judge, submissions)
    assert {what(verdict) for verdict in verdicts} == {(Outcome.WRONG, 2, 3, "12")}


def test_program_that_ends_between_calls(judge: Judge) -> None:
    """The answers before the end were lost with it, and a wrong answer was called a crash."""
    body = "def check(c):\n    assert c(1) == 1\n    assert c(2) == 2\n    assert c(3) == 3\n"
    programs = {
        "wrong": "import os\ndef f(x):\n    if x == 3: os._exit(0)\n    return x if x == 1 else 0",
        "ends": "import os\ndef f(x):\n    if x == 2: os._exit(0)\n    return x",
        "loops after a wrong answer": "def f(x):\n    while x == 2: pass\n    return 0",
        "missing": "def g(x): return x",
        "not loaded": "import os; os._exit(0)",
    }
    tests = AssertTests("f", ("check(f)",), body)
    verdicts = check_same(judge, [Submission(p, tests, Limits(cpu_s=1.0), n) for n, p in programs.items()])
    assert [v.outcome for v in verdicts] == ["wrong", "crashed", "wrong", "missing", "crashed"]


def test_walking_through_an_answer_takes_bounded_time() -> None:
    """Keys that collide, or a range without end, kept the referee, whom nobody ends, busy for ever."""
    clock = plain.Clock(0.2)
    colliding = [i * (2**61 - 1) for i in range(60000)]
    before = time.process_time()
    for name, answer in (("set", colliding), ("sum", range(10**30)), ("all", range(1, 10**30)), ("max", range(10**30))):
        clock.start()
        with pytest.raises(Ended, match="processor seconds") as caught:
            plain.FUNCTIONS[name][0](clock, answer)
        assert caught.value.outcome == "cpu_limit"
    clock.start()
    with pytest.raises(Ended):
        plain.contains(clock, range(10**30), 0.5)
    assert time.process_time() - before < 60
    assert plain.contains(clock, range(10**30), 10**29)
