"""MBPP (Austin et al. 2021, arXiv 2108.07732): the test part, and the parts that may be trained on."""

from collections.abc import Sequence

from ra3_megatron.evaluation.benchmarks.functions import entry_point_of, import_lines
from ra3_megatron.evaluation.benchmarks.rows import Hub, Row
from ra3_megatron.evaluation.benchmarks.task import Task
from ra3_megatron.reward.problem import AssertTests

FILES = ("mbpp.jsonl", "mbpp.jsonl.gz")
HUB = Hub("google-research-datasets/mbpp", "full", ("prompt", "test", "validation", "train"))

TEST_IDS = range(11, 511)
"""The part that models are measured on."""
TRAIN_IDS = (range(601, 975), range(511, 601))
"""Training and validation parts: tasks for reinforcement learning."""
SHOT_IDS = (2, 3, 4)
"""The paper's few-shot examples."""


def read(rows: Sequence[Row]) -> list[Task]:
    """All tasks of the file; `part_of` picks one part."""
    return [_task(number, row) for number, row in enumerate(rows)]


def part_of(tasks: Sequence[Task], *ids: range | tuple[int, ...]) -> list[Task]:
    """The tasks whose ids are in one of `ids`, in that order."""
    return [task for chosen in ids for task in tasks if task.facts["task_id"] in chosen]


def _task(number: int, row: Row) -> Task:
    task_id = row.number("task_id")
    if task_id is None or int(task_id) != task_id:
        raise row.refuse("field task_id holds no whole number")
    text, code = row.text("text"), row.text("code", "")
    asserts = row.texts("test_list")
    # The file has carriage returns in nearly all of its solutions and none in its tests.
    code = code.replace("\r\n", "\n").rstrip() + "\n" if code else ""
    entry_point = entry_point_of(asserts, code)
    if entry_point is None:
        raise row.refuse(f"test_list calls no function that field code defines ({asserts[0][:80]!r})")
    setup = row.text("test_setup_code", "").replace("\r\n", "\n")
    return Task(
        id=f"Mbpp/{int(task_id)}",
        benchmark="mbpp",
        number=number,
        prompt=text,
        form="text",
        # Tests of a few tasks use modules that the reference imports.
        tests=AssertTests(entry_point, tuple(asserts), f"{import_lines(code)}\n{setup}\n"),
        entry_point=entry_point,
        examples=tuple(asserts),
        reference=code,
        facts={"task_id": int(task_id), "test_list": asserts, "test_setup_code": setup},
    )
