"""LiveCodeBench (Jain et al. 2024, arXiv 2403.07974), layout of `code_generation_lite`."""

import json
from collections.abc import Sequence
from datetime import date
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.evaluation.benchmarks.rows import Hub, Row, packed_json
from ra3_megatron.evaluation.benchmarks.task import Task
from ra3_megatron.reward.problem import CallCase, CallTests, StdinCase, StdinTests, Tests

FILES = (
    "code_generation_lite/test*.jsonl", "livecodebench/test*.jsonl", "livecodebench/*.jsonl*",
    "livecodebench/*.parquet", "lcb*/problems.jsonl*", "livecodebench*.jsonl*",
)  # fmt: skip
HUB = Hub("livecodebench/code_generation_lite", files="test*.jsonl")

MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json",
)  # fmt: skip
STARRED = (*MODULES, "builtins", "typing")
PRELUDE = (
    "".join(f"from {name} import *\n" for name in STARRED)
    + "".join(f"import {name}\n" for name in MODULES)
    + "sys.setrecursionlimit(50000)\n"
)
"""What LiveCodeBench puts before every program: LeetCode's programs count on names that they do not import."""


def read(rows: Sequence[Row], start: str | None = None, end: str | None = None) -> tuple[list[Task], dict[str, int]]:
    """Tasks of contests from day `start` to day `end` (ISO 8601, both included), and how many lie outside."""
    first, last = _day("evaluation.lcb_start", start), _day("evaluation.lcb_end", end)
    tasks, outside = [], 0
    for number, row in enumerate(rows):
        published = _published(row)
        if (first and published < first) or (last and published > last):
            outside += 1
        else:
            tasks.append(_task(number, row, published))
    return tasks, {"outside the dates": outside} if outside else {}


def _day(name: str, text: str | None) -> date | None:
    try:
        return date.fromisoformat(text) if text else None
    except ValueError:
        raise UserError(f"{name} = {text}; give a day such as 2024-08-01") from None


def _published(row: Row) -> date:
    text = row.text("contest_date")
    try:
        return date.fromisoformat(text[:10])
    except ValueError:
        raise row.refuse(f"field contest_date holds {text!r}, which is no date") from None


def _task(number: int, row: Row, published: date) -> Task:
    starter, name = row.text("starter_code", ""), None
    public, private = row.json("public_test_cases"), packed_json(row, "private_test_cases")
    metadata = row.json("metadata") if row.values.get("metadata") else {}
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    cases = [*_checked(row, "public_test_cases", public), *_checked(row, "private_test_cases", private)]
    if not cases:
        raise row.refuse("it has no tests")
    return Task(
        id=row.text("question_id"),
        benchmark="livecodebench",
        number=number,
        prompt=row.text("question_content"),
        form="text",
        tests=case_tests(row, cases, name),
        visible=len(public),
        entry_point=name,
        starter=starter,
        difficulty=row.text("difficulty", ""),
        date=published.isoformat(),
        facts={"cases": [[c["input"], c["output"]] for c in cases], "platform": row.text("platform", "")},
    )


def _checked(row: Row, field: str, cases: Any) -> list[dict[str, Any]]:
    if not isinstance(cases, list):
        raise row.refuse(f"field {field} holds no list of tests")
    for case in cases:
        if not isinstance(case, dict) or not all(isinstance(case.get(k), str) for k in ("input", "output")):
            raise row.refuse(f"a test in {field} lacks its input or its output as text")
    return cases


def case_tests(row: Row, cases: Sequence[dict[str, Any]], function: str | None) -> Tests:
    """Tests from texts of input and output: of a function, one JSON value per line, or of standard input."""
    if function is None:
        kinds = {case.get("testtype", "stdin") for case in cases}
        if kinds != {"stdin"}:
            raise row.refuse(f"its tests are {', '.join(sorted(map(str, kinds)))}, but metadata has no func_name")
        return StdinTests(tuple(StdinCase(case["input"], case["output"]) for case in cases))
    return CallTests(function, tuple(_call(row, case) for case in cases), compare="json", setup=PRELUDE)


def _call(row: Row, case: dict[str, Any]) -> CallCase:
    try:
        arguments = tuple(json.loads(line) for line in case["input"].split("\n"))
        return CallCase(arguments, json.loads(case["output"]))
    except ValueError as error:
        raise row.refuse(f"a test of its function is not JSON, one value per line ({error})") from None
