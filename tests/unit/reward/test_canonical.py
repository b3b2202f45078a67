"""Controls: the reference solutions of the benchmarks pass. Needs the benchmark files, which are not in the project."""

import ast
import base64
import gzip
import io
import json
import os
import pickle
import zlib
from pathlib import Path
from typing import Any

import pytest

from ra3_megatron.reward.judge import Judge
from ra3_megatron.reward.problem import (
    AssertTests,
    CallCase,
    CallTests,
    Outcome,
    StdinCase,
    StdinTests,
    Submission,
)

DATA = Path(os.environ.get("RA3_BENCHMARK_DATA", Path(__file__).parents[4] / "shared" / "data"))
IMPOSSIBLE = {"mbpp/367", "mbpp/927"}
"""Their own solutions fail their own tests under plain execution too."""


def read(name: str) -> list[dict[str, Any]]:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not there; RA3_BENCHMARK_DATA names the folder with the benchmark files")
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.decode().splitlines()]


def humaneval() -> list[Submission]:
    return [
        Submission(
            row["prompt"] + row["canonical_solution"],
            AssertTests(row["entry_point"], ("check(candidate)",), row["prompt"] + "\n" + row["test"]),
            name=row["task_id"],
        )
        for row in read("humaneval/HumanEval.jsonl.gz")
    ]


def test_humaneval(judge: Judge) -> None:
    """A judge that fails right programs teaches the wrong thing."""
    submissions = humaneval()
    assert len(submissions) == 164
    verdicts = judge.judge(submissions)
    assert {s.name: v for s, v in zip(submissions, verdicts, strict=True) if not v.ok} == {}


def test_humaneval_without_bodies_fails(judge: Judge) -> None:
    """All 164 passed because nothing was tested."""
    rows = read("humaneval/HumanEval.jsonl.gz")
    submissions = [
        Submission(row["prompt"] + "    pass\n", s.tests, name=s.name) for row, s in zip(rows, humaneval(), strict=True)
    ]
    assert not [s.name for s, v in zip(submissions, judge.judge(submissions), strict=True) if v.ok]


def function_of(row: dict[str, Any]) -> str:
    """The function of the solution that the first test calls."""
    defined = {n.name for n in ast.walk(ast.parse(row["code"])) if isinstance(n, ast.FunctionDef)}
    calls = [n for n in ast.walk(ast.parse(row["test_list"][0])) if isinstance(n, ast.Call)]
    return next(c.func.id for c in calls if isinstance(c.func, ast.Name) and c.func.id in defined)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_mbpp(judge: Judge) -> None:
    """Tasks that return matches or types, or whose tests use the solution's imports or classes, were lost."""
    submissions = [
        Submission(
            row["code"],
            AssertTests(
                function_of(row),
                (*row["test_list"], *row["challenge_test_list"]),
                row["test_setup_code"],
            ),
            name=f"mbpp/{row['task_id']}",
        )
        for row in read("mbpp/mbpp.jsonl")
    ]
    assert len(submissions) == 974
    failed = {s.name: v for s, v in zip(submissions, judge.judge(submissions), strict=True) if not v.ok}
    assert set(failed) == IMPOSSIBLE, failed


class _TextOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name} in the tests of a task")


def cases(row: dict[str, Any]) -> list[dict[str, str]]:
    hidden = row["private_test_cases"]
    if not hidden.startswith("["):
        hidden = _TextOnly(io.BytesIO(zlib.decompress(base64.b64decode(hidden)))).load()
    public: list[dict[str, str]] = json.loads(row["public_test_cases"])
    return public + json.loads(hidden)


def test_livecodebench_layout(judge: Judge) -> None:
    """Both kinds of tasks of the layout: programs with standard input, methods of a class."""
    rows = {row["question_id"]: row for row in read("lcb_format_sample/problems.jsonl.gz")}
    submissions = []
    for solution in read("lcb_format_sample/reference_solutions.jsonl"):
        row = rows[solution["question_id"]]
        name = json.loads(row["metadata"]).get("func_name")
        code = solution["solution"]
        if name is None:
            tests: Any = StdinTests(tuple(StdinCase(c["input"], c["output"]) for c in cases(row)))
        else:
            tests = CallTests(
                name,
                tuple(
                    CallCase(tuple(json.loads(line) for line in c["input"].splitlines()), json.loads(c["output"]))
                    for c in cases(row)
                ),
                class_name="Solution",
                compare="json",
            )
        submissions.append(Submission(code, tests, name=row["question_id"]))
    assert len(submissions) == 12
    verdicts = judge.judge(submissions)
    assert {s.name: v for s, v in zip(submissions, verdicts, strict=True) if not v.ok} == {}
    assert all(v.total == 12 for v in verdicts)
    for submission in submissions:  # and a program that answers nothing fails
        assert judge.judge([Submission("", submission.tests)])[0].outcome in (Outcome.WRONG, Outcome.MISSING)
