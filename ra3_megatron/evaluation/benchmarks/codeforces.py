"""Codeforces problems in the layout of open-r1/codeforces."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from ra3_megatron.evaluation.benchmarks.rows import Hub, Row
from ra3_megatron.evaluation.benchmarks.task import Task
from ra3_megatron.reward.problem import Limits, StdinCase, StdinTests

FILES = (
    "codeforces/verifiable/test-*.parquet", "codeforces/data/test-*.parquet", "codeforces/test-*.parquet",
    "codeforces/*.jsonl*", "codeforces/*.parquet", "codeforces*.jsonl*",
)  # fmt: skip
HUB = Hub("open-r1/codeforces", "verifiable")

_ROOM_MB = 512
"""Added to a problem's memory limit: ours is of address space, of which an interpreter takes more than it uses."""
_CHECKER = """\
import sys
# This data set's checkers are called with input, answer, output.
sys.argv[2], sys.argv[3] = sys.argv[3], sys.argv[2]
exec(compile({source!r}, "checker.py", "exec"), {{"__name__": "__main__"}})
"""


def read(rows: Sequence[Row]) -> tuple[list[Task], dict[str, int]]:
    """Tasks, and how many problems are left out by reason: what no program alone can be judged on."""
    tasks: list[Task] = []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(rows):
        reason = _reason(row)
        if reason:
            dropped[reason] += 1
        else:
            tasks.append(_task(number, row))
    return tasks, dict(dropped)


def _reason(row: Row) -> str:
    values = row.values
    if values.get("interaction_format"):
        return "interactive"
    if values.get("input_mode") not in (None, "stdio"):
        return "reads and writes files"
    if not values.get("official_tests"):
        return "no official tests"
    if values.get("official_tests_complete") is False:
        return "official tests incomplete"
    return ""


def _cases(row: Row, name: str) -> list[StdinCase]:
    cases = []
    for case in row.items(name, []):
        if not isinstance(case, dict) or not all(isinstance(case.get(k), str) for k in ("input", "output")):
            raise row.refuse(f"a test in {name} lacks its input or its output as text")
        cases.append(StdinCase(case["input"], case["output"]))
    return cases


def _task(number: int, row: Row) -> Task:
    examples = _cases(row, "examples")
    seen = {case.stdin.strip() for case in examples}
    hidden = [case for case in _cases(row, "official_tests") if case.stdin.strip() not in seen]
    checker = row.text("generated_checker", "")
    tests = StdinTests((*examples, *hidden), "tokens", checker=_CHECKER.format(source=checker) if checker else "")
    rating = row.number("rating")
    cpu, memory = row.number("time_limit", 2.0), row.number("memory_limit", 256.0)
    assert cpu is not None
    assert memory is not None
    return Task(
        id=row.text("id"),
        benchmark="codeforces",
        number=number,
        prompt=_statement(row, cpu, memory, examples),
        form="text",
        tests=tests,
        visible=len(examples),
        limits=Limits(cpu_s=float(cpu), memory_mb=int(memory) + _ROOM_MB),
        rating=int(rating) if rating is not None else None,
        date=str(row.values.get("contest_start_year") or ""),
    )


def _statement(row: Row, cpu: float, memory: float, examples: Sequence[StdinCase]) -> str:
    """The problem as a contestant reads it."""
    parts: list[str] = []

    def add(title: str, text: Any) -> None:
        if text:
            parts.append(f"{title}\n{str(text).strip()}" if title else str(text).strip())

    add("", f"{row.text('title', '')}\ntime limit per test: {cpu:g} s, memory limit per test: {memory:g} MB")
    add("", row.text("description"))
    add("Input", row.values.get("input_format"))
    add("Output", row.values.get("output_format"))
    for n, case in enumerate(examples, start=1):
        add(f"Example {n}, input", case.stdin)
        add(f"Example {n}, output", case.stdout)
    add("Note", row.values.get("note"))
    return "\n\n".join(parts)
