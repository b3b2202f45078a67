"""What is judged and what comes back: tests, submissions, verdicts. Plain data that imports nothing heavy."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Literal


class Outcome(StrEnum):
    """How a submission ended; everything but `LOST` is a statement about the program."""

    PASSED = "passed"
    """Every test passed."""
    WRONG = "wrong"
    """An answer differs, or an assertion of the tests failed."""
    EXCEPTION = "exception"
    """The program raised, a syntax error included."""
    MISSING = "missing"
    """The program does not define what the tests call."""
    CPU_LIMIT = "cpu_limit"
    """More processor time than allowed."""
    WALL_LIMIT = "wall_limit"
    """More wall time than allowed, processor time left: it slept or waited."""
    MEMORY = "memory"
    """More memory than allowed."""
    OUTPUT = "output"
    """More output, or a larger or deeper answer, than allowed."""
    CRASHED = "crashed"
    """Ended by a signal or an exit before it had answered, or broke the protocol."""
    UNSAFE = "unsafe"
    """The tests cannot be run apart from the program, and the judge was not allowed to run them together."""
    LOST = "lost"
    """No verdict: the infrastructure failed, after retries. Never a reward of 0: drop the sample and count it."""


@dataclass(frozen=True)
class Limits:
    """What a program may use. Processor time counts; wall time is a backstop, so that a busy machine fails nobody."""

    cpu_s: float = 4.0
    """Processor seconds of one test (one call, one run); loading the program counts as a test of its own."""
    wall_s: float | None = None
    """Wall seconds of one test; none = ten times `cpu_s`, at least 20, and up to five times that for a program that
    keeps using the processor of a busy machine."""
    memory_mb: int = 2048
    """Address space of the process, MiB."""
    output_bytes: int = 1 << 20
    """Largest answer of a call, and most output of a run, bytes."""


@dataclass(frozen=True)
class AssertTests:
    """Statements of the data set, run by the trusted side against a stand-in for the program's function."""

    entry_point: str
    """Function that the program must define."""
    tests: tuple[str, ...]
    """Python statements, each one test, run in order in one namespace in which `entry_point` and `candidate` are
    the stand-in: MBPP's asserts, or `check(candidate)` for HumanEval."""
    setup: str = ""
    """Trusted code run before: helpers of the prompt, `def check(candidate): ...`, MBPP's test_setup_code."""


@dataclass(frozen=True)
class CallCase:
    """One call with plain data (None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)."""

    args: tuple[Any, ...]
    """Positional arguments."""
    expected: Any
    """What the call must return."""


@dataclass(frozen=True)
class CallTests:
    """Calls of one function whose answers are compared on the trusted side."""

    entry_point: str
    """Function, or method of `class_name`, that the program must define."""
    cases: tuple[CallCase, ...]
    """In order; each one test."""
    class_name: str | None = None
    """Class to make an instance of (without arguments) for every call, such as `Solution`; none = a function."""
    compare: Literal["equal", "close", "json"] = "equal"
    """`equal`: `==` of plain data of the same types (bool is not int, 1.0 is not 1); `close`: EvalPlus's rule with
    `atol` for floats; `json`: as LiveCodeBench, tuples are lists and numbers compare by value."""
    atol: float = 0.0
    """Absolute tolerance of `close`."""
    oracle: str = ""
    """Trusted code that defines `accept(args, answer, expected) -> bool` and takes the place of `compare`."""
    setup: str = ""
    """Code put before the program (imports that the data set gives)."""


@dataclass(frozen=True)
class StdinCase:
    """One run of the program as a process."""

    stdin: str
    """What it reads."""
    stdout: str
    """What it must print."""


@dataclass(frozen=True)
class StdinTests:
    """Runs of the program with text on its standard input."""

    cases: tuple[StdinCase, ...]
    """In order; each one test."""
    compare: Literal["lines", "tokens", "numbers"] = "lines"
    """`lines`: equal line by line, space at the ends of lines and empty lines at the end left out; `tokens`: equal
    words between spaces; `numbers`: likewise, numbers within `tolerance`."""
    tolerance: float = 1e-6
    """Absolute or relative difference that `numbers` allows."""
    checker: str = ""
    """Trusted program (Python source) that takes the place of `compare`: run as `checker input output answer` (three
    files), it accepts by printing `1`, `ok` or a positive number first, or, silent, by ending with 0."""


@dataclass(frozen=True)
class InProcessTests:
    """Tests that share a process with the program, as the reference evaluators run them: a program can cheat here.

    For comparison with those evaluators and for tasks that need it; refused unless the judge is told otherwise, and
    always for training. Passed = `program` runs to its end.
    """

    program: str
    """The whole program, solution and tests."""
    data: bytes = b""
    """Given to the program as the global `RA3_DATA`."""
    wall_s: float = 3.0
    """Wall seconds, as the reference evaluators count; `Limits` holds beside it."""


Tests = AssertTests | CallTests | StdinTests | InProcessTests


def count_tests(tests: Tests) -> int:
    """Number of tests that a program has to pass."""
    match tests:
        case AssertTests():
            return len(tests.tests)
        case CallTests() | StdinTests():
            return len(tests.cases)
        case InProcessTests():
            return 1


@dataclass(frozen=True)
class Submission:
    """One program and its tests."""

    program: str
    """Python source of the untrusted program."""
    tests: Tests
    """What it must pass."""
    limits: Limits = field(default_factory=Limits)
    """What it may use."""
    name: str = ""
    """Of the task, for messages."""
    all_tests: bool = False
    """Go on after the first test that fails, so that `Verdict.passed` counts all."""


@dataclass(frozen=True)
class Verdict:
    """What the judge says of a submission."""

    outcome: Outcome
    """How it ended: of the first test that failed."""
    passed: int
    """Tests passed; up to the first that failed unless `Submission.all_tests`."""
    total: int
    """Tests there are."""
    message: str = ""
    """What happened at the first failure, for people; at most some hundred characters of it are the program's."""
    cpu_s: float = 0.0
    """Processor seconds of the untrusted program."""
    wall_s: float = 0.0
    """Wall seconds from start to verdict."""

    @property
    def ok(self) -> bool:
        """Whether the program passed every test."""
        return self.outcome is Outcome.PASSED
