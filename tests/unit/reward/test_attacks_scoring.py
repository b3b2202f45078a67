"""Groups 8 and 9: what a program earns for half a solution, and right programs of every style."""

import pytest

from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.reward.judge import Judge
from ra3_megatron.reward.problem import (
    AssertTests,
    CallCase,
    CallTests,
    Limits,
    Outcome,
    StdinCase,
    StdinTests,
    Submission,
    Tests,
    Verdict,
)
from tests.unit.reward.attacks import FUNCTION, Kind
from tests.unit.reward.battery import all_cases
from tests.unit.reward.canaries import Canaries

pytestmark = pytest.mark.timeout(300)


def one(judge: Judge, program: str, tests: Tests, all_tests: bool = False) -> Verdict:
    """The verdict on one program."""
    (verdict,) = judge.judge([Submission(program, tests, Limits(cpu_s=2.0), all_tests=all_tests)])
    return verdict


VISIBLE, HIDDEN = ((2, 4), (3, 9)), ((5, 25), (-4, 16), (0, 0))
Pair = tuple[tuple[int, int], ...]


def squares(kind: Kind, part: Pair) -> Tests:
    """The square of some numbers as tests."""
    if kind == "asserts":
        return AssertTests("sq", tuple(f"assert sq({n}) == {m}" for n, m in part))
    return CallTests("sq", tuple(CallCase((n,), m) for n, m in part))


SQUARE = {kind: (squares(kind, VISIBLE), squares(kind, HIDDEN)) for kind in FUNCTION}


@pytest.mark.parametrize("kind", FUNCTION)
@pytest.mark.parametrize(
    "program",
    [
        "def sq(n): return {2: 4, 3: 9}[n]",
        "def sq(n): return 4 if n == 2 else 9",
        "known = {2: 4, 3: 9}\ndef sq(n): return known.get(n, n)",
    ],
)
def test_hard_coded_visible_tests_fail_the_hidden(program: str, kind: Kind, judge: Judge) -> None:
    """A program that had learnt the visible tests by heart was paid in full."""
    visible, hidden = SQUARE[kind]
    seen, unseen = one(judge, program, visible, True), one(judge, program, hidden, True)
    assert (seen.outcome, seen.passed) == (Outcome.PASSED, 2)
    assert not unseen.ok
    assert unseen.passed <= 1


@pytest.mark.parametrize("kind", FUNCTION)
@pytest.mark.parametrize(
    ("program", "outcome"),
    [
        ("", Outcome.MISSING),
        ("\n\n# nothing\n", Outcome.MISSING),
        ("def square(n): return n * n", Outcome.MISSING),
        ("sq = 4", Outcome.EXCEPTION),
        ("def sq(n): return n * n\ndel sq", Outcome.MISSING),
        ("def sq(n):", Outcome.EXCEPTION),
        ("Here is the code:\ndef sq(n): return n * n", Outcome.EXCEPTION),
        ("def sq(n): return n * n\nI hope that this helps!", Outcome.EXCEPTION),
        ("```python\ndef sq(n): return n * n\n```", Outcome.EXCEPTION),
        ("def sq(n): return n * n\x00", Outcome.EXCEPTION),
        ("def sq(n): pass", Outcome.WRONG),
        ("def sq(n): return print(n * n)", Outcome.WRONG),
        ("def sq(n): return str(n * n)", Outcome.WRONG),
        ("async def sq(n): return n * n", Outcome.WRONG),
        ("def sq(n): yield n * n", Outcome.WRONG),
        ("def sq(): return 4", Outcome.EXCEPTION),
        ("assert False\ndef sq(n): return n * n", Outcome.EXCEPTION),
    ],
)
def test_what_is_no_solution_is_not_paid(program: str, outcome: Outcome, kind: Kind, judge: Judge) -> None:
    """An answer without the function, or with chatter around it, passed or took the judge down."""
    verdict = one(judge, program, SQUARE[kind][0])
    assert not verdict.ok
    assert verdict.outcome is outcome or (outcome is Outcome.EXCEPTION and verdict.outcome is Outcome.WRONG), verdict


@pytest.mark.parametrize("kind", FUNCTION)
@pytest.mark.parametrize(
    "program",
    [
        "def sq(n): return n * n",
        "\ufeffdef sq(n): return n * n",
        "def sq(n):\r\n    return n * n\r\n",
        "sq = lambda n: n * n",
        "from functools import lru_cache\n@lru_cache\ndef sq(n): return n * n",
        "class Sq:\n    def __call__(self, n): return n * n\nsq = Sq()",
        "def sq(n): return n * n\nif __name__ == '__main__':\n    print(sq(int(input())))",
        "print('loading')\ndef sq(n):\n    print('working')\n    return n * n",
        "def sq(n):\n    import sys\n    sys.stderr.write('hm')\n    return n * n",
        "from __future__ import annotations\ndef sq(n: int | None) -> int: return n * n",
        "# -*- coding: utf-8 -*-\nsq = lambda ñ: ñ * ñ",
    ],
)
def test_right_functions_of_every_style_are_paid(program: str, kind: Kind, judge: Judge) -> None:
    """A right program failed for its style: chatter on standard output, a byte order mark, a lambda."""
    verdicts = [one(judge, program, tests) for tests in SQUARE[kind]]
    assert [v.outcome for v in verdicts] == [Outcome.PASSED] * 2, verdicts


LINES = StdinTests((StdinCase("3\n1 2 3\n", "1\n2\n3\n"), StdinCase("1\n7\n", "7\n")))


@pytest.mark.parametrize(
    ("printed", "right"),
    [
        ("1\\n2\\n3\\n", True),
        ("1\\n2\\n3", True),
        ("1\\r\\n2\\r\\n3\\r\\n", True),
        ("1 \\n2\\t\\n3\\n\\n\\n", True),
        ("1\\n", False),
        ("1\\n2\\n", False),
        ("1\\n2\\n3\\n4\\n", False),
        ("1\\n\\n2\\n3\\n", False),
        ("1 2 3\\n", False),
        ("1.0\\n2.0\\n3.0\\n", False),
        (" 1\\n2\\n3\\n", False),
        ("", False),
        ("Answer:\\n1\\n2\\n3\\n", False),
    ],
)
def test_printed_text_is_compared_as_a_whole(printed: str, right: bool, judge: Judge) -> None:
    """The first line alone was paid (open-r1), or `1.0` for `1` (LiveCodeBench), or nothing without a last newline."""
    program = f"import sys\nsys.stdout.write('{printed}')"
    tests = StdinTests((LINES.cases[0],))
    assert one(judge, program, tests).ok is right


STYLES = {
    "input": "n = int(input())\nfor x in input().split(): print(x)",
    "read": "import sys\nn, *xs = sys.stdin.read().split()\nprint('\\n'.join(xs))",
    "lines": "import sys\nlines = [l for l in sys.stdin]\nprint(*lines[1].split(), sep='\\n')",
    "buffer readline twice": "import sys\nr = sys.stdin.buffer.readline\nn = int(r())\n"
    "for x in r().split(): print(x.decode())",
    "open 0": "xs = open(0).read().split()[1:]\nprint(*xs, sep='\\n')",
    "os read": "import os\nxs = os.read(0, 10**6).split()[1:]\nos.write(1, b'\\n'.join(xs) + b'\\n')",
    "buffer write": "import sys\nxs = sys.stdin.buffer.read().split()[1:]\nsys.stdout.buffer.write(b'\\n'.join(xs))",
    "global": "n = 0\ndef main():\n    global n\n    n = int(input())\n    for x in input().split(): print(x)\nmain()",
    "thread": "import sys, threading\ndef main():\n    input()\n    for x in input().split(): print(x)\n"
    "threading.stack_size(32 << 20)\nsys.setrecursionlimit(10**6)\nt = threading.Thread(target=main); t.start()",
    "exit": "import sys\ninput()\nprint(input().replace(' ', '\\n'))\nsys.exit()",
    "main guard": "def main():\n    input()\n    print(*input().split(), sep='\\n')\n"
    "if __name__ == '__main__':\n    main()",
    "unbuffered": "import sys, io\nsys.stdin.readline()\nout = io.StringIO()\n"
    "print(*sys.stdin.readline().split(), sep='\\n', file=out)\nsys.stdout.write(out.getvalue()); sys.stdout.flush()",
    "fileinput": "import fileinput\nxs = list(fileinput.input())[1].split()\nprint('\\n'.join(xs))",
    "replaced input": "import sys\ninput = sys.stdin.readline\ninput()\nfor x in input().split(): print(x)",
}  # fmt: skip


@pytest.mark.parametrize("style", STYLES)
def test_right_programs_of_every_style_are_paid(style: str, judge: Judge) -> None:
    """LiveCodeBench's stand-in for standard input fails 6 of 11 right programs."""
    verdict = one(judge, STYLES[style], LINES)
    assert verdict.ok, verdict


def test_verdicts_do_not_depend_on_the_number_of_workers() -> None:
    """Side by side, programs disturbed one another and verdicts changed."""
    with Canaries() as canaries:
        cases = [case for case in all_cases("125") if case.kind in FUNCTION][::4]
        submissions = [case.submission(canaries.names) for case in cases]
        outcomes = []
        for workers in (1, 8):
            with Judge(JudgeConfig(workers=workers)) as judge:
                outcomes.append([verdict.outcome for verdict in judge.judge(submissions)])
    different = [(c.name, a, b) for c, a, b in zip(cases, *outcomes, strict=True) if a is not b]
    assert different == []
