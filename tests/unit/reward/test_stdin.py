"""Programs with standard input and output, run as processes."""

import pytest

from ra3_megatron.reward.judge import Judge
from ra3_megatron.reward.problem import Limits, Outcome, StdinCase, StdinTests, Submission, Verdict

DOUBLE = (StdinCase("3\n1 2 3\n", "2 4 6\n"), StdinCase("2\n10 20\n", "20 40"))


def verdict(judge: Judge, program: str, tests: StdinTests, **limits: float) -> Verdict:
    return judge.judge([Submission(program, tests, Limits(**{"cpu_s": 2.0, **limits}))])[0]  # type: ignore[arg-type]


WORDS = "input()\na = [str(2 * int(x)) for x in input().split()]"
INNER = WORDS.replace("\n", "\n    ")
TAIL = "print(*[2 * x for x in a])"
STYLES = {
    "input": f"n = int(input())\na = list(map(int, input().split()))\n{TAIL}",
    "sys.stdin.readline": f"import sys\ninput = sys.stdin.readline\ninput()\na = map(int, input().split())\n{TAIL}",
    "sys.stdin.read": f"import sys\na = list(map(int, sys.stdin.read().split()))[1:]\n{TAIL}",
    "for line in sys.stdin": f"import sys\nlines = [l for l in sys.stdin]\na = map(int, lines[1].split())\n{TAIL}",
    "sys.stdin.buffer": f"import sys\na = list(map(int, sys.stdin.buffer.read().split()))[1:]\n{TAIL}",
    "open(0)": f"a = list(map(int, open(0).read().split()))[1:]\n{TAIL}",
    "os.read(0)": f"import os\na = list(map(int, os.read(0, 10**6).split()))[1:]\n{TAIL}",
    "sys.stdout.write": f"import sys\n{WORDS}\nsys.stdout.write(' '.join(a))",
    "sys.stdout.buffer": f"import sys\n{WORDS}\nsys.stdout.buffer.write(' '.join(a).encode())",
    "main guard": f"def main():\n    {INNER}\n    print(*a)\nif __name__ == '__main__': main()",
    "thread with a big stack": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 27)\n"
        f"def main():\n    {INNER}\n    print(*a)\nthreading.Thread(target=main).start()"
    ),
    "sys.exit(0) at the end": f"import sys\ninput()\na = map(int, input().split())\n{TAIL}\nsys.exit(0)",
    "exit() at the end": f"{WORDS}\nprint(*a)\nexit()",
    "io.BytesIO over descriptor 0": (
        "import io, os\ninput = io.BytesIO(os.read(0, os.fstat(0).st_size or 1 << 20)).readline\n"
        f"input()\na = list(map(int, input().split()))\n{TAIL}"
    ),
    "atexit": "import atexit\ninput()\na = [2 * int(x) for x in input().split()]\natexit.register(lambda: print(*a))",
}


@pytest.mark.parametrize("style", STYLES)
def test_styles_of_input_and_output(judge: Judge, style: str) -> None:
    """Graders that replace sys.stdin by a string failed right programs that read in another way."""
    result = verdict(judge, STYLES[style], StdinTests(DOUBLE))
    assert result.ok, result


WRONG = {
    "wrong": ("print(7)", Outcome.WRONG),
    "nothing printed": ("", Outcome.WRONG),
    "right, then an error": ("input()\nprint(*[2 * int(x) for x in input().split()])\n1 / 0", Outcome.EXCEPTION),
    "right, then exit 3": ("input()\nprint(*[2 * int(x) for x in input().split()])\nexit(3)", Outcome.CRASHED),
    "right, then abort": (
        "import os\ninput()\nprint(*[2 * int(x) for x in input().split()], flush=True)\nos.abort()",
        Outcome.CRASHED,
    ),
    "reads past the end": ("while True: input()", Outcome.EXCEPTION),
    "syntax": ("print(", Outcome.EXCEPTION),
    "memory": ("a = bytearray(10**11)", Outcome.MEMORY),
    "endless output": ("while True: print('x' * 1000)", Outcome.OUTPUT),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", Outcome.OUTPUT),
    "loop": ("while True: pass", Outcome.CPU_LIMIT),
    "loop in C": ("sum(range(10**18))", Outcome.CPU_LIMIT),
    "segmentation fault": ("import ctypes\nctypes.string_at(0)", Outcome.CRASHED),
}


@pytest.mark.parametrize("name", WRONG)
def test_outcomes(judge: Judge, name: str) -> None:
    """A wrong program is told by how it failed."""
    program, outcome = WRONG[name]
    result = verdict(judge, program, StdinTests(DOUBLE), cpu_s=1.0)
    assert result.outcome is outcome, result


def test_rules_of_comparison(judge: Judge) -> None:
    """The rule of the task was not passed on."""
    case = (StdinCase("", "1.0000000\n2\n"),)
    for rule, ok in (("lines", False), ("tokens", False), ("numbers", True)):
        assert verdict(judge, "print('1.0 2')", StdinTests(case, rule)).ok is ok  # type: ignore[arg-type]


CHECKER = """
import sys
given, printed, answer = (open(name).read().split() for name in sys.argv[1:])
ok = sum(map(int, printed)) == int(given[0])
{end}
"""
ENDS = {
    "prints 1 or 0": "print(int(ok))",
    "prints ok": "print('ok' if ok else 'wrong answer')",
    "prints a score": "print(0.5 if ok else 0)",
    "ends with 0 or 1": "sys.exit(0 if ok else 1)",
    "assert": "assert ok",
}


@pytest.mark.parametrize("end", ENDS)
def test_checkers(judge: Judge, end: str) -> None:
    """Many answers are right; the checker says which, in the ways that Codeforces' data sets have."""
    tests = StdinTests((StdinCase("10", "5 5"), StdinCase("7", "7")), checker=CHECKER.format(end=ENDS[end]))
    assert verdict(judge, "n = int(input())\nprint(n - 3, 3)", tests).ok
    result = verdict(judge, "n = int(input())\nprint(n - 3, 4)", tests)
    assert (result.outcome, result.passed) == (Outcome.WRONG, 0)


def test_a_checker_that_fails_accepts_nothing(judge: Judge) -> None:
    """A checker that raised on strange output, or never ended, let the output pass."""
    case = (StdinCase("10", "5 5"),)
    assert verdict(judge, "print('x')", StdinTests(case, checker="int(open('output').read())")).outcome is Outcome.WRONG


def test_large_input_and_output(judge: Judge) -> None:
    """A pipe holds 64 KiB: larger ones stopped both sides."""
    text = " ".join(map(str, range(100000)))
    assert verdict(judge, "print(input())", StdinTests((StdinCase(text, text),))).ok


def test_all_cases_and_their_count(judge: Judge) -> None:
    """The pass fraction is over all cases when asked for."""
    cases = tuple(StdinCase(f"{i}\n", f"{i % 2}\n") for i in range(5))
    first = judge.judge([Submission("print(0)", StdinTests(cases))])[0]
    assert (first.outcome, first.passed, first.total) == (Outcome.WRONG, 1, 5)
    every = judge.judge([Submission("print(0)", StdinTests(cases), all_tests=True)])[0]
    assert (every.outcome, every.passed, every.total) == (Outcome.WRONG, 3, 5)
