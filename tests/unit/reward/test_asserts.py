"""The data set's asserts against a program in another process: as if it were in theirs, where it is honest."""

import pytest

from ra3_megatron.reward.judge import Judge
from ra3_megatron.reward.problem import AssertTests, Limits, Outcome, Submission, Verdict


def verdict(
    judge: Judge, program: str, *tests: str, entry_point: str = "f", setup: str = "", all_tests: bool = False
) -> Verdict:
    return judge.judge(
        [Submission(program, AssertTests(entry_point, tests, setup), Limits(cpu_s=2.0), all_tests=all_tests)]
    )[0]


RIGHT = {
    "both names": ("def f(x): return x", "assert f(1) == 1", "assert candidate(2) == 2"),
    "keywords": ("def f(a, *, b): return a - b", "assert f(3, b=1) == 2"),
    "types of answers": (
        "def f(x): return x",
        *(
            f"assert candidate({v}) == {v} and type(candidate({v})) is type({v})"
            for v in (
                "None",
                "True",
                "1.5",
                "2**70",
                "1j",
                "'ä'",
                "b'x'",
                "[1]",
                "(1,)",
                "{1}",
                "frozenset({1})",
                "{1: [2]}",
            )
        ),
    ),
    "list changed in place": ("def f(x): x.append(1); x.sort()", "a = [3, 2]; f(a); assert a == [1, 2, 3]"),
    "inner list changed in place": (
        "def f(x): x[0].append(1)",
        "a = [[], []]; b = a[0]; f(a); assert b == [1] == a[0]",
    ),
    "dict and set changed in place": (
        "def f(d, s): d['a'] = 1; s.clear()",
        "d, s = {'b': 2}, {1}; f(d, s); assert d == {'a': 1, 'b': 2} and s == set()",
    ),
    "exception by name": (
        "def f(x):\n    raise KeyError(x)",
        "try:\n    f(1)\n    assert False\nexcept KeyError:\n    pass",
    ),
    "own exception as its builtin base": (
        "class E(ValueError): pass\ndef f(): raise E('no')",
        "try:\n    f()\n    assert False\nexcept ValueError:\n    pass",
    ),
    "an exception that wants other arguments": (
        "def f(): b'\\xff'.decode()",
        "try:\n    f()\n    assert False\nexcept Exception:\n    pass",
    ),
    "iterators": ("def f(n): return (i for i in range(n))", "assert list(f(3)) == [0, 1, 2]", "assert next(f(2)) == 0"),
    "range and map": ("def f(n): return map(str, range(n))", "assert list(f(2)) == ['0', '1']"),
    "deque": (
        "from collections import deque\ndef f(): return deque([1, 2])",
        "assert list(f()) == [1, 2] and len(f()) == 2",
    ),
    "named tuple": (
        "from collections import namedtuple\ndef f(): return namedtuple('P', 'x y')(1, 2)",
        "assert f() == (1, 2)",
    ),
    "handle is true": ("import re\ndef f(s): return re.match('a', s)", "assert f('ab')", "assert not f('b')"),
    "class of the program, used by the tests": (
        "class Pair:\n    def __init__(self, a): self.a = a\ndef f(p): return p.a",
        "assert f(Pair(3)) == 3",
    ),
    "imports of the program, used by the tests": (
        "import math\nfrom collections import *\nfrom typing import List\ndef f(x): return math.sqrt(x)",
        "assert math.isclose(f(4), 2)",
        "assert Counter('a') and List",
    ),
    "builtin types as arguments": (
        "def f(x, t): return [i for i in x if isinstance(i, t)]",
        "assert f([1, 'a'], int) == [1]",
    ),
    "program that prints and reads": (
        "import sys\nprint('hello')\ndef f(): print('x' * 10000); return sys.stdin.read()",
        "assert f() == ''",
    ),
    "large argument": (
        "def f(x): x.append(1); return len(x)",
        "a = list(range(200000)); assert f(a) == 200001 == len(a)",
    ),
    "state between calls": (
        "n = 0\ndef f():\n    global n\n    n += 1\n    return n",
        "assert f() == 1",
        "assert f() == 2",
    ),
    "threads and big stacks": (
        "import threading, sys\nthreading.stack_size(1 << 26)\nsys.setrecursionlimit(10**5)\n"
        "def f(n):\n    out = []\n    def g(k): return 0 if k == 0 else 1 + g(k - 1)\n"
        "    t = threading.Thread(target=lambda: out.append(g(n)))\n    t.start(); t.join(10)\n    return out[0]",
        "assert f(20000) == 20000",
    ),
    "dataclasses and deferred annotations": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\n"
        "def f(): return A(3).x",
        "assert f() == 3",
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_honest_programs_pass(judge: Judge, name: str) -> None:
    """Each of these worked in one process and failed across two."""
    program, *tests = RIGHT[name]
    result = verdict(judge, program, *tests)
    assert result.ok, result
    assert result.passed == result.total == len(tests)


WRONG = {
    "wrong answer": ("def f(x): return x + 1", "assert f(1) == 1", Outcome.WRONG),
    "no answer": ("def f(x): pass", "assert f(1) == 1", Outcome.WRONG),
    "None in arithmetic": ("def f(x): pass", "assert abs(f(1) - 1) < 1e-6", Outcome.WRONG),
    "list for tuple": ("def f(): return [1]", "assert f() == (1,)", Outcome.WRONG),
    "deque for list": ("from collections import deque\ndef f(): return deque([1])", "assert f() == [1]", Outcome.WRONG),
    "raises": ("def f(x): raise ValueError('no')", "assert f(1) == 1", Outcome.EXCEPTION),
    "asserts itself": ("def f(x): assert False", "assert f(1) == 1", Outcome.EXCEPTION),
    "wrong name": ("def g(x): return x", "assert f(1) == 1", Outcome.MISSING),
    "nothing": ("", "assert f(1) == 1", Outcome.MISSING),
    "entry point no function": ("f = 3", "assert f(1) == 1", Outcome.EXCEPTION),
    "syntax": ("def f(x) return x", "assert f(1) == 1", Outcome.EXCEPTION),
    "null byte": ("def f(x): return x\0", "assert f(1) == 1", Outcome.EXCEPTION),
    "raises while loading": ("1 / 0", "assert f(1) == 1", Outcome.EXCEPTION),
    "exits while loading": ("import sys; sys.exit(0)", "assert f(1) == 1", Outcome.CRASHED),
    "exits in the call": ("import os\ndef f(x): os._exit(0)", "assert f(1) == 1", Outcome.CRASHED),
    "exit caught by the tests": (
        "def f(x): raise SystemExit",
        "try:\n    f(1)\nexcept BaseException:\n    pass",
        Outcome.CRASHED,
    ),
    "memory": ("def f(x): return len(bytearray(10**11))", "assert f(1) == 1", Outcome.MEMORY),
    "output": ("def f(x): return 'x' * (2 << 20)", "assert f(1) == 1", Outcome.OUTPUT),
    "cycle": ("def f(x):\n    a = []\n    a.append(a)\n    return a", "assert f(1) == 1", Outcome.OUTPUT),
    "endless iterator": ("import itertools\ndef f(x): return itertools.count()", "assert f(1) == 1", Outcome.OUTPUT),
    "lambda among the arguments": ("def f(g): return g(1)", "assert f(lambda x: x) == 1", Outcome.UNSAFE),
    "loop": ("def f(x):\n    while True: pass", "assert f(1) == 1", Outcome.CPU_LIMIT),
}


@pytest.mark.parametrize("name", WRONG)
def test_outcomes(judge: Judge, name: str) -> None:
    """Each failure has its own name, so that a report can tell a wrong answer from a crash."""
    program, test, outcome = WRONG[name]
    result = verdict(judge, program, test)
    assert result.outcome is outcome, result
    assert result.passed == 0
    assert result.message
    assert len(result.message) < 1000


def test_imports_cannot_replace_what_the_tests_use(judge: Judge) -> None:
    """`from builtins import bool as set` made `set(a) == set(b)` true of any two lists."""
    for line in (
        "from builtins import bool as set",
        "from operator import truth as sorted",
        "from operator import *",
        "set = sorted = helper = bool",
    ):
        program = f"{line}\ndef f(x): return [0]"
        for test in ("assert set(f(1)) == set([1])", "assert sorted(f(1)) == [1]", "assert helper(f(1)) == [1]"):
            result = verdict(judge, program, test, setup="def helper(x): return x")
            assert result.outcome is Outcome.WRONG, (line, test, result)


def test_after_the_end_nothing_passes(judge: Judge) -> None:
    """The process had gone, the tests caught the exception, and the rest counted as passed."""
    result = verdict(
        judge,
        "import os\ndef f(x): os._exit(0)",
        "try:\n    f(1)\nexcept BaseException:\n    pass",
        "assert True",
    )
    assert (result.outcome, result.passed) == (Outcome.CRASHED, 0)


def test_first_failure_ends_unless_all_are_wanted(judge: Judge) -> None:
    """The pass fraction stopped at the first failure, or a crash took the remaining tests with it."""
    program = (
        "import os\ndef f(x):\n    if x == 1: return 0\n    if x == 3: os._exit(0)\n"
        "    if x == 4: raise ValueError\n    return x"
    )
    tests = [f"assert f({i}) == {i}" for i in range(6)]
    first = verdict(judge, program, *tests)
    assert (first.outcome, first.passed, first.total) == (Outcome.WRONG, 1, 6)
    every = verdict(judge, program, *tests, all_tests=True)
    assert (every.outcome, every.passed, every.total) == (Outcome.WRONG, 3, 6)


def test_setup_is_the_tests_own(judge: Judge) -> None:
    """A program that defines the helper of the prompt differently changed the tests."""
    result = verdict(
        judge,
        "def helper(x): return 0\ndef f(x): return 0",
        "check(candidate)",
        setup="def helper(x): return x\ndef f(x):\n    '''prompt'''\ndef check(c):\n    assert c(3) == helper(3)",
    )
    assert result.outcome is Outcome.WRONG


def test_setup_that_fails_is_no_pass(judge: Judge) -> None:
    """A broken setup raised before any test, and no test meant no failure."""
    result = verdict(judge, "def f(x): return x", "assert True", setup="1 / 0")
    assert result.outcome is Outcome.WRONG
    assert "ZeroDivisionError" in result.message


def test_limits_count_per_test(judge: Judge) -> None:
    """Ten tests of 0.3 seconds each were one of three seconds, and over the limit."""
    program = "import time\ndef f():\n    end = time.process_time() + 0.3\n    while time.process_time() < end: pass"
    submission = Submission(program, AssertTests("f", ("f()",) * 4), Limits(cpu_s=0.8))
    assert judge.judge([submission])[0].ok
    submission = Submission(program, AssertTests("f", ("f(); f(); f(); f()",)), Limits(cpu_s=0.8))
    assert judge.judge([submission])[0].outcome is Outcome.CPU_LIMIT


def test_sleeping_meets_the_wall_limit(judge: Judge) -> None:
    """time.sleep for ever uses no processor time, so only the wall limit ends it."""
    submission = Submission("import time\ntime.sleep(1000)", AssertTests("f", ("f()",)), Limits(1.0, wall_s=0.5))
    assert judge.judge([submission])[0].outcome is Outcome.WALL_LIMIT
