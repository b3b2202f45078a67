"""One problem of a benchmark or of a set of training tasks, whatever file it came from."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ra3_megatron.config.errors import UserError
from ra3_megatron.reward.judge import count_tests
from ra3_megatron.reward.problem import AssertTests, CallTests, Limits, StdinTests, Submission, Tests


@dataclass(frozen=True)
class Task:
    """A problem: what the model reads, what its program must pass, and what is known of it."""

    id: str
    """Name in the data set, such as `HumanEval/0`; unique in it."""
    benchmark: str
    """Name of the data set's layout, such as `humaneval+`."""
    number: int
    """Place in the data set before any were left out: with the seed the key of the random numbers of its answers."""
    prompt: str
    """The problem as the data set words it."""
    form: Literal["code", "docstring", "text"]
    """What `prompt` is: `code`, the beginning of a function that is to be gone on with; `docstring`, a module's
    docstring before the code; `text`, a statement in natural language."""
    tests: Tests
    """What a program must pass: the visible tests first, then the hidden ones."""
    visible: int = 0
    """How many of the first tests are known to whoever solves the problem: shown in the prompt, or published."""
    entry_point: str | None = None
    """Function that the tests call; none = the program reads standard input."""
    starter: str = ""
    """Code to begin with, such as the head of `class Solution`."""
    examples: tuple[str, ...] = ()
    """Tests to be shown in a prompt, as text."""
    reference: str = ""
    """A whole program that is said to be right; empty = none."""
    limits: Limits | None = None
    """The problem's own limits; none = those of the judge."""
    rating: int | None = None
    """Difficulty on Codeforces' scale."""
    difficulty: str = ""
    """Difficulty in words."""
    date: str = ""
    """Day of publication, ISO 8601."""
    facts: dict[str, Any] = field(default_factory=dict, compare=False)
    """What only this layout has: parity modes read it."""


@dataclass(frozen=True)
class TaskSet:
    """The tasks of one data set."""

    name: str
    """Name of the layout."""
    tasks: tuple[Task, ...]
    """In the order of the data set."""
    source: str
    """Where they were read, for people."""
    fingerprint: str
    """SHA-256 of the files' content, or of the rows where they came from a hub."""
    shots: tuple[Task, ...] = ()
    """Solved problems for few-shot prompts."""
    dropped: dict[str, int] = field(default_factory=dict)
    """How many were left out, by reason."""

    def first(self, count: int | None) -> "TaskSet":
        """The set with its first `count` tasks."""
        return self if count is None else replace(self, tasks=self.tasks[:count])


def cut_tests(tests: Tests, start: int, stop: int | None) -> Tests:
    """The tests from number `start` to before `stop`."""
    if isinstance(tests, AssertTests):
        return replace(tests, tests=tests.tests[start:stop])
    if isinstance(tests, CallTests):
        return replace(tests, cases=tests.cases[start:stop])
    return replace(tests, cases=tests.cases[start:stop]) if isinstance(tests, StdinTests) else tests


def visible_tests(task: Task) -> Tests | None:
    """The tests that are known to whoever solves the problem; None without any."""
    return cut_tests(task.tests, 0, task.visible) if task.visible else None


def hidden_tests(task: Task) -> Tests | None:
    """The tests that nobody has seen; None without any."""
    return cut_tests(task.tests, task.visible, None) if task.visible < count_tests(task.tests) else None


def fitted(tests: Tests, program: str) -> Tests:
    """Tests as they are put to a program: a LeetCode-like function may stand alone or in `class Solution`.

    The rule is LiveCodeBench's: a method is called where the program's text has that class.
    """
    if isinstance(tests, CallTests) and tests.compare == "json":
        return replace(tests, class_name="Solution" if "class Solution" in program else None)
    return tests


def submission(task: Task, program: str, limits: Limits, all_tests: bool = False) -> Submission:
    """What the judge is given for all tests of a task, the visible ones first; the task's own limits come first."""
    return Submission(program, fitted(task.tests, program), task.limits or limits, task.id, all_tests)


def refuse_duplicates(tasks: Sequence[Task], places: Sequence[str]) -> None:
    """Raise UserError, with both places, when two tasks have one id."""
    seen: dict[str, str] = {}
    for task, place in zip(tasks, places, strict=True):
        if task.id in seen:
            raise UserError(f"{place}: task id {task.id!r} was at {seen[task.id]} already; give every task its own id")
        seen[task.id] = place


def digest_of(parts: Iterable[str]) -> str:
    """SHA-256 of some texts, each ended by a zero byte."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()
