"""Canonical solutions of the real benchmarks through the judge: a sample; benchmarks/canonical.py does all."""

import json
from pathlib import Path

import pytest

from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.evaluation.benchmarks.registry import Source, load_tasks
from ra3_megatron.evaluation.judging import joined, submissions
from ra3_megatron.evaluation.verdicts import limits_of
from ra3_megatron.reward.judge import Judge

DATA = Path(__file__).parents[4] / "shared" / "data"
CONFIG = JudgeConfig()

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark data at {DATA}")


@pytest.fixture(scope="module")
def judge():
    with Judge(CONFIG, allow_unsafe=True) as judge:
        yield judge


def failed(judge: Judge, programs: list, mode: str) -> list[str]:
    parts = [submissions(task, program, mode, limits_of(CONFIG)) for task, program in programs]
    verdicts = iter(judge.judge([s for own in parts for s in own.values()]))
    found = [joined({name: next(verdicts) for name in own}) for own in parts]
    return [f"{task.id}: {j.outcome}, {j.message}" for (task, _), j in zip(programs, found, strict=True) if not j.ok]


@pytest.mark.parametrize(("name", "count", "every"), [("humaneval", 164, 4), ("mbpp", 500, 13)])
def test_canonical_solutions_pass(judge: Judge, name: str, count: int, every: int) -> None:
    """A reference that fails makes every score wrong."""
    tasks = load_tasks(name, Source(str(DATA))).tasks
    assert len(tasks) == count
    # Mbpp/367 uses a name that it does not define.
    assert failed(judge, [(t, t.reference) for t in tasks[::every] if t.id != "Mbpp/367"], "strict") == []
    assert failed(judge, [(t, t.reference) for t in tasks[:: 8 * every]], "parity") == []


def test_livecodebench_references_pass_in_both_modes(judge: Judge) -> None:
    """Twelve problems in LiveCodeBench's layout; half of them read standard input."""
    tasks = load_tasks("livecodebench", Source(str(DATA))).tasks
    lines = (DATA / "lcb_format_sample" / "reference_solutions.jsonl").read_text().splitlines()
    programs = {row["question_id"]: row["solution"] for row in map(json.loads, lines)}
    chosen = [(task, programs[task.id]) for task in tasks]
    assert len(chosen) == 12
    assert failed(judge, chosen, "strict") == []
    assert failed(judge, chosen, "parity") == []
    assert len(failed(judge, [(task, "print()") for task in tasks], "strict")) == 12
