"""The tasks of RLVR: read, checked against their own references, put into tokens, divided."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.evaluation import EvaluationConfig
from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.config.rlvr import RlvrConfig
from ra3_megatron.config.run import RunConfig
from ra3_megatron.evaluation.asking import Asker
from ra3_megatron.evaluation.benchmarks.registry import Source, load_tasks
from ra3_megatron.evaluation.benchmarks.task import Task, TaskSet, digest_of, submission
from ra3_megatron.evaluation.prompts import Question, program_of, question
from ra3_megatron.reward.judge import Judge, count_tests
from ra3_megatron.reward.problem import InProcessTests, Limits, Outcome, Submission
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.run_folder import StageFolder

_SELECTION = 20250926
"""Seed of the choice of held-out tasks: the same in every run and arm."""

TASKS_FILE = "tasks.json"


@dataclass(frozen=True)
class TrainTask:
    """A task as the policy sees it."""

    task: Task
    """The problem."""
    asked: Question
    """What is put to the policy, and what its answer is taken for."""
    ids: np.ndarray = field(repr=False)
    """int32 [prompt]: what the answer goes on from."""
    limits: Limits = field(default_factory=Limits)
    """What its program may use, unless the problem says so itself."""

    def submission(self, text: str, all_tests: bool) -> Submission:
        """The program in an answer's `text`, with the task's tests."""
        return submission(self.task, program_of(self.task, self.asked, text).program, self.limits, all_tests)


@dataclass(frozen=True)
class RlvrTasks:
    """What is trained on, and what is held out."""

    train: tuple[TrainTask, ...]
    validation: tuple[TrainTask, ...]
    stop_ids: tuple[int, ...]
    """Ids that end an answer."""
    fingerprint: str
    """SHA-256 of the tasks in use, their prompts' ids included."""

    @property
    def longest_prompt(self) -> int:
        """Tokens."""
        return max(len(t.ids) for t in (*self.train, *self.validation))


class TaskReader:
    """From the configured file to tasks with prompts in tokens; `model` is a folder with the tokenizer in `hf`."""

    def __init__(self, config: RunConfig, model: Path) -> None:
        self._config, r = config, config.rlvr
        self._form = EvaluationConfig(
            prompt=r.prompt, mbpp_prompt=r.mbpp_prompt, start_token=r.start_token, thoughts="allowed"
        )
        self.asker = Asker(model, self._form)

    def read(self) -> TaskSet:
        """Tasks of the file. Raises UserError for a malformed one, with file, line and field."""
        r = self._config.rlvr
        return load_tasks(r.layout, Source(path=r.tasks)).first(r.max_tasks)

    def task(self, task: Task, tasks: TaskSet) -> TrainTask:
        """A task as the policy sees it; `tasks` gives the solved examples of few-shot prompts."""
        judge = self._config.judge
        asked = question(task, tasks, self._form)
        asked = replace(asked, text=self._config.rlvr.template.replace("{prompt}", asked.text))
        limits = Limits(cpu_s=judge.cpu_s, memory_mb=judge.memory_mb)
        return TrainTask(task, asked, np.array(self.asker.ids(asked), dtype=np.int32), limits)


def prepare_tasks(context: Context, stage: StageFolder, reader: TaskReader) -> dict[str, Any]:
    """Choose the tasks that can be trained on, on one process; returns the stage's result.

    Result: `train`, `validation`, `read` (numbers of tasks), `dropped` (by reason), `unchecked` (without a reference),
    `longest_prompt`, `fingerprint`, `source`. `data/tasks.json` names every task's fate.
    Raises UserError for a malformed file, when nothing is left, and for an unfit task with `rlvr.unfit_tasks` `error`.
    """
    config, r = context.config, context.config.rlvr
    found = reader.read()
    context.say(f"tasks: {len(found.tasks)} of layout {found.name} from {found.source}; checking ...")
    fates = {task.id: _fate(reader.task(task, found), config) for task in found.tasks}
    fates |= _judged_references(config.judge, [t for t in found.tasks if not fates[t.id] and t.reference])
    left_out = {i: why for i, why in fates.items() if why}
    if r.unfit_tasks == "error" and left_out:
        first, why = next(iter(left_out.items()))
        raise UserError(
            f"{len(left_out)} of {len(fates)} tasks of {found.source} cannot be trained on, the first is {first}: "
            f"{why}; correct or remove them, or set rlvr.unfit_tasks=drop"
        )
    fit = [t.id for t in found.tasks if not fates[t.id]]
    held_out = _held_out(fit, r)
    dropped = Counter(found.dropped) + Counter(why.split(":")[0] for why in left_out.values())
    if len(fit) <= len(held_out):
        reasons = ", ".join(f"{n} with {why}" for why, n in dropped.most_common()) or "none"
        raise UserError(
            f"no task of {found.source} is left to train on: of {len(found.tasks)}, {len(held_out)} are held out, and "
            f"left out are {reasons}; give other tasks, or change what the reasons name"
        )
    record = {
        "source": found.source,
        "content": found.fingerprint,
        "train": [i for i in fit if i not in held_out],
        "validation": [i for i in fit if i in held_out],
        "dropped": left_out,
    }
    atomic_write_text(stage.path / "data" / TASKS_FILE, json.dumps(record, indent=1))
    tasks = open_tasks(reader, stage.path)
    return {
        "train": len(tasks.train),
        "validation": len(tasks.validation),
        "read": len(found.tasks),
        "dropped": dict(dropped),
        "unchecked": sum(not t.reference for t in found.tasks if not fates[t.id]),
        "longest_prompt": tasks.longest_prompt,
        "fingerprint": tasks.fingerprint,
        "source": found.source,
    }


def open_tasks(reader: TaskReader, folder: Path) -> RlvrTasks:
    """The tasks that `prepare_tasks` chose into the stage's `folder`, read anew from where they were.

    Raises UserError when the file has changed since.
    """
    chosen = json.loads((folder / "data" / TASKS_FILE).read_text(encoding="utf-8"))
    found = reader.read()
    if found.fingerprint != chosen["content"]:
        raise UserError(
            f"{found.source} holds other tasks ({found.fingerprint[:12]}) than the run began with "
            f"({chosen['content'][:12]}); bring the first file back, or start a new run"
        )
    by_id = {t.id: t for t in found.tasks}
    train, validation = (tuple(reader.task(by_id[i], found) for i in chosen[part]) for part in ("train", "validation"))
    stop = reader.asker.stop_ids
    parts = [*chosen["train"], "", *chosen["validation"], "", *map(str, stop)]
    digest = digest_of([found.fingerprint, *parts, *(t.ids.tobytes().hex() for t in (*train, *validation))])
    return RlvrTasks(train, validation, stop, digest)


def _fate(task: TrainTask, config: RunConfig) -> str:
    """Why a task cannot be trained on; empty when it can, as far as can be seen without running anything."""
    if isinstance(task.task.tests, InProcessTests):
        return "tests that must share a process with the program: they could be cheated"
    if not count_tests(task.task.tests):
        return "no tests: nothing would be judged"
    longest = config.rlvr.longest_reference
    if longest is not None and not 0 < len(task.task.reference) <= longest:
        return f"a reference that is too long: {len(task.task.reference)} characters (0 = none), at most {longest}"
    length, room = len(task.ids), config.train.seq_length - config.rlvr.max_tokens
    if length > room:
        return (
            f"a prompt without room: {length} tokens, train.seq_length - rlvr.max_tokens = "
            f"{config.train.seq_length} - {config.rlvr.max_tokens} leaves {room}"
        )
    return ""


def _judged_references(judge: JudgeConfig, tasks: Sequence[Task]) -> dict[str, str]:
    """Why tasks' own references fail, by id; empty for those that pass."""
    if not tasks:
        return {}
    limits = Limits(cpu_s=judge.cpu_s, memory_mb=judge.memory_mb)
    with Judge(judge, training=True) as found:
        verdicts = found.judge([submission(t, t.reference, limits) for t in tasks])
    lost = [t.id for t, v in zip(tasks, verdicts, strict=True) if v.outcome is Outcome.LOST]
    if lost:
        raise RuntimeError(f"the judge lost {len(lost)} references, the first {lost[0]}; see its messages above")
    return {
        t.id: "" if v.ok else f"tests that fail on the task's own reference: {v.outcome.value}, {v.message[:200]}"
        for t, v in zip(tasks, verdicts, strict=True)
    }


def _held_out(ids: Sequence[str], r: RlvrConfig) -> set[str]:
    order = np.random.default_rng(_SELECTION).permutation(len(ids))
    return {ids[i] for i in order[: r.validation_tasks]}
