"""HumanEval (Chen et al. 2021, arXiv 2107.03374)."""

from collections.abc import Sequence

from ra3_megatron.evaluation.benchmarks.functions import before_function
from ra3_megatron.evaluation.benchmarks.rows import Hub, Row
from ra3_megatron.evaluation.benchmarks.task import Task
from ra3_megatron.reward.problem import AssertTests

FILES = ("HumanEval.jsonl.gz", "HumanEval.jsonl", "openai_humaneval/test-*.parquet", "humaneval/test-*.parquet")
HUB = Hub("openai/openai_humaneval")


def read(rows: Sequence[Row], name: str = "humaneval") -> list[Task]:
    """Tasks from rows with task_id, prompt, entry_point, canonical_solution and test (`def check(candidate)`)."""
    return [_task(number, row, name) for number, row in enumerate(rows)]


def _task(number: int, row: Row, name: str) -> Task:
    prompt, entry_point, test = row.text("prompt"), row.text("entry_point"), row.text("test")
    if f"def {entry_point}(" not in prompt:
        raise row.refuse(f"entry_point is {entry_point!r}, but the prompt has no function of that name")
    if "def check(" not in test:
        raise row.refuse("field test defines no function check(candidate)")
    # Tests of a few problems call a helper that the prompt defines.
    setup = f"{before_function(prompt, entry_point)}\n{test}\n"
    solution = row.text("canonical_solution", "")
    return Task(
        id=row.text("task_id"),
        benchmark=name,
        number=number,
        prompt=prompt,
        form="code",
        tests=AssertTests(entry_point, ("check(candidate)",), setup),
        entry_point=entry_point,
        reference=prompt + solution if solution else "",
        facts={"test": test},
    )
