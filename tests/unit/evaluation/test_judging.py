"""Strict and parity mode: where they must agree, and where they must differ; verdicts beside generation."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.evaluation.benchmarks.task import Task
from ra3_megatron.evaluation.journal import Journal, read_journals
from ra3_megatron.evaluation.judging import Judgement, joined, submissions
from ra3_megatron.evaluation.verdicts import Verdicts, limits_of, verdict_key
from ra3_megatron.reward.judge import Judge
from ra3_megatron.reward.problem import (
    AssertTests,
    CallCase,
    CallTests,
    Limits,
    Outcome,
    StdinCase,
    StdinTests,
    Verdict,
)

CONFIG = JudgeConfig(workers=1)
CHECK = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(5) == 6\n"
HUMANEVAL = Task(
    id="HumanEval/0", benchmark="humaneval", number=0, prompt="def f(x):\n", form="code",
    tests=AssertTests("f", ("check(candidate)",), CHECK), entry_point="f", facts={"test": CHECK},
)  # fmt: skip
MBPP = replace(HUMANEVAL, benchmark="mbpp", tests=AssertTests("f", ("assert f(1) == 2", "assert f(5) == 6")), facts={})
CASES = (CallCase((1,), 2), CallCase((5,), 6), CallCase((0,), 1))
PLUS = replace(
    HUMANEVAL, benchmark="humaneval+", tests=CallTests("f", CASES, compare="close"), visible=1,
    facts={"seconds": [0.0] * 3, "cases": CASES, "base": 1},
)  # fmt: skip
LCB = Task(
    id="q", benchmark="livecodebench", number=0, prompt="p", form="text",
    tests=StdinTests((StdinCase("1\n", "2\n"), StdinCase("5\n", "6\n"))), visible=1,
    facts={"cases": [["1\n", "2\n"], ["5\n", "6\n"]]},
)  # fmt: skip
LCB_FUNCTION = replace(
    LCB, entry_point="f", tests=CallTests("f", (CallCase((1,), 2),), compare="json"), facts={"cases": [["1", "2"]]}
)
RIGHT = "def f(x):\n    return x + 1\n"
EQUAL_TO_ALL = "class E:\n    def __eq__(self, other):\n        return True\n\ndef f(x):\n    return E()\n"


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge(CONFIG, allow_unsafe=True) as judge:
        yield judge


def judged(judge: Judge, task: Task, program: str, mode: str) -> Judgement:
    parts = submissions(task, program, mode, limits_of(CONFIG))
    return joined(dict(zip(parts, judge.judge(list(parts.values())), strict=True)))


@pytest.mark.parametrize("mode", ["strict", "parity"])
@pytest.mark.parametrize(
    ("task", "program", "ok"),
    [
        (HUMANEVAL, RIGHT, True),
        (HUMANEVAL, "def f(x):\n    return 2\n", False),
        (HUMANEVAL, "import os\ndef f(x):\n    os._exit(0)\n", False),
        (HUMANEVAL, "import sys\ndef f(x):\n    sys.exit(0)\n", False),
        (HUMANEVAL, "def g(x):\n    return x + 1\n", False),
        (HUMANEVAL, "def f(x) return", False),
        (MBPP, RIGHT, True),
        (MBPP, "def f(x):\n    return 2\n", False),
        (PLUS, RIGHT, True),
        (PLUS, "def f(x):\n    return x + 1 if x else 0\n", False),
        (PLUS, "def f(x):\n    return str(x + 1)\n", False),
        (LCB, "print(int(input()) + 1)\n", True),
        (LCB, "if __name__ == '__main__':\n    import sys\n    print(int(sys.stdin.read()) + 1)\n    exit()\n", True),
        (LCB, "print(2)\n", False),
        (LCB, "print(1 / 0)\n", False),
        (LCB_FUNCTION, "class Solution:\n    def f(self, x):\n        return x + 1\n", True),
        (LCB_FUNCTION, RIGHT, True),
        (LCB_FUNCTION, "class Solution:\n    def f(self, x):\n        return x\n", False),
    ],
)
def test_modes_agree_on_honest_programs(judge: Judge, task: Task, program: str, ok: bool, mode: str) -> None:
    """A reference that fails, or a wrong program that passes, in one of the two modes."""
    found = judged(judge, task, program, mode)
    assert found.ok is ok, found
    assert found.known


@pytest.mark.parametrize(
    ("task", "program", "strict", "parity"),
    [
        (HUMANEVAL, EQUAL_TO_ALL, False, True),
        (PLUS, EQUAL_TO_ALL, False, True),
        (LCB_FUNCTION, EQUAL_TO_ALL, False, True),
        (LCB, "print(int(open(0).read()) + 1)\n", True, False),
        (LCB, "import sys\nfor line in sys.stdin:\n    print(int(line) + 1)\n", True, False),
        (LCB, "import sys\nsys.stdout.buffer.write(b'%d' % (int(input()) + 1))\n", True, False),
        (LCB, "print(int(input()) + 1.0)\n", False, True),
    ],
)
def test_modes_differ_where_documented(judge: Judge, task: Task, program: str, strict: bool, parity: bool) -> None:
    """Parity that is no parity: a cheat that the reference pays, a way of reading that it does not know."""
    assert (judged(judge, task, program, "strict").ok, judged(judge, task, program, "parity").ok) == (strict, parity)


def test_visible_and_hidden_parts(judge: Judge) -> None:
    """A program that knows the shown tests by heart looked like one that solves the problem."""
    found = judged(judge, PLUS, "def f(x):\n    return {1: 2}[x]\n", "strict")
    assert (found.ok, found.visible, found.hidden) == (False, True, False)
    assert (found.passed, found.total) == (1, 3)


def test_infrastructure_decides_nothing() -> None:
    """A sandbox that failed counted as a wrong answer."""
    parts = {"visible": Verdict(Outcome.WRONG, 0, 1), "hidden": Verdict(Outcome.LOST, 0, 1)}
    assert not joined(parts).known


def test_verdicts_are_recorded_as_they_come(tmp_path: Path) -> None:
    """An empty program asked a judge; a verdict was recorded under the key of another."""
    with Journal(tmp_path, "verdicts", "0") as journal, Verdicts(CONFIG, "strict", journal) as verdicts:
        verdicts.put("right", PLUS, RIGHT)
        verdicts.put("wrong", HUMANEVAL, "def f(x): ...\n")
        verdicts.put("empty", HUMANEVAL, " \n")
        verdicts.wait()
    found = read_journals(tmp_path, "verdicts")
    assert {key: record["outcome"] for key, record in found.items()} == {
        "right": "passed",
        "wrong": "wrong",
        "empty": "missing",
    }


def test_verdict_keys_name_what_matters() -> None:
    """A verdict of parity mode was taken for one of strict mode."""
    limits = Limits()
    keys = {
        verdict_key("data", HUMANEVAL, RIGHT, "strict", limits),
        verdict_key("data", HUMANEVAL, RIGHT, "parity", limits),
        verdict_key("data", HUMANEVAL, RIGHT + "\n", "strict", limits),
        verdict_key("other", HUMANEVAL, RIGHT, "strict", limits),
        verdict_key("data", replace(HUMANEVAL, id="x"), RIGHT, "strict", limits),
        verdict_key("data", HUMANEVAL, RIGHT, "strict", Limits(cpu_s=9)),
    }
    assert len(keys) == 6
