"""All that one model is asked, and what became of it: questions with keys, answers read back from the records."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import RunConfig
from ra3_megatron.evaluation.asking import Asker
from ra3_megatron.evaluation.benchmarks.task import Task, TaskSet, digest_of
from ra3_megatron.evaluation.extraction import Extracted
from ra3_megatron.evaluation.judging import Judgement
from ra3_megatron.evaluation.prompts import Question, program_of, question
from ra3_megatron.evaluation.results import Answer
from ra3_megatron.evaluation.verdicts import from_record, limits_of, verdict_key
from ra3_megatron.reward.problem import Outcome
from ra3_megatron.rollout.completion import CompletionSettings

_NO_ROOM = Judgement(str(Outcome.MISSING), 0, 1, None, None, "the problem alone is longer than the model can read")
_LOST = Judgement(str(Outcome.LOST), 0, 0, None, None, "no verdict")


@dataclass(frozen=True)
class Ask:
    """One answer to be had from a model."""

    task: Task
    """The problem."""
    member: int
    """Which of the answers to it."""
    number: int
    """Place of the problem in its benchmark; with `member` the key of the random numbers."""
    question: Question
    """What is put to the model."""
    ids: np.ndarray
    """int32 [prompt]."""
    settings: CompletionSettings
    """How it is sampled, and where it ends."""
    room: int
    """Tokens it may have; not above 0 = the problem alone is too long."""
    key: str
    """Names everything it depends on, beyond rounding."""


class Sheet:
    """The questions to one model, by benchmark, and its answers."""

    def __init__(
        self, config: RunConfig, architecture: Architecture, sets: Mapping[str, TaskSet], asker: Asker, parameters: str
    ) -> None:
        self.asker, self.parameters = asker, parameters
        self._config, self._longest, self._sets = config, architecture.max_positions, sets
        self.asks = {benchmark: self._questions(tasks) for benchmark, tasks in sets.items()}

    def _questions(self, tasks: TaskSet) -> list[Ask]:
        """All answers of a benchmark, task by task."""
        s, found = self._config.evaluation, []
        for task in tasks.tasks:
            asked = question(task, tasks, s)
            ids = np.array(self.asker.ids(asked), dtype=np.int32)
            settings = CompletionSettings(s.max_tokens, s.temperature, s.top_p, asked.stop, self.asker.stop_ids)
            room = min(s.max_tokens, self._longest - len(ids))
            # Which of MBPP's tests are known depends on the prompt.
            own = replace(task, visible=asked.shown) if tasks.name == "mbpp" else task
            base = [self.parameters, self.asker.tokenizer.fingerprint, ids.tolist(), room, s.temperature, s.top_p]
            base += [asked.stop, self.asker.stop_ids, self._config.model.precision]
            for member in range(s.samples):
                draw = [s.seed, task.number, member] if s.temperature else []
                key = digest_of([json.dumps([*base, draw])])
                found.append(Ask(own, member, task.number, asked, ids, settings, room, key))
        return found

    def taken_out(self, ask: Ask, record: Mapping[str, Any]) -> tuple[str, Extracted]:
        """The text of a recorded answer and the program in it."""
        content = self.asker.tokenizer.decode_bytes(record["ids"])[: record["text_bytes"]]
        text = content.decode("utf-8", errors="replace")
        return text, program_of(ask.task, ask.question, text, self._config.evaluation.mode == "parity")

    def verdict_key(self, ask: Ask, program: str) -> str:
        """Key of a verdict, which does not depend on the model."""
        own = digest_of([self._sets[ask.task.benchmark].fingerprint, str(ask.task.visible)])
        return verdict_key(own, ask.task, program, self._config.evaluation.mode, limits_of(self._config.judge))

    def answer(self, ask: Ask, answers: Mapping[str, Any], verdicts: Mapping[str, Any]) -> Answer:
        """An answer with its judgement, from the records."""
        if ask.room <= 0:
            return Answer(ask.task.id, ask.member, "", "", _NO_ROOM, "no room", 0, 0.0)
        record = answers[ask.key]
        text, found = self.taken_out(ask, record)
        verdict = verdicts.get(self.verdict_key(ask, found.program))
        return Answer(
            task=ask.task.id,
            member=ask.member,
            text=text,
            program=found.program,
            judgement=_LOST if verdict is None else from_record(verdict),
            finish=record["finish"],
            tokens=len(record["ids"]),
            log_prob=record["log_prob"],
            notes=found.notes,
        )
