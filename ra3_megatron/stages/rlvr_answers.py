"""Where RLVR's judged answers come from: drawn and judged at the same time and recorded, or read back after a crash."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch

from ra3_megatron.checkpoint.capture import synchronise_parameters
from ra3_megatron.config.errors import UserError
from ra3_megatron.data.tokenizers import Tokenizer
from ra3_megatron.parallel.collectives import broadcast_object, raise_everywhere
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.parallel.phases import phase
from ra3_megatron.reward.judge import Judge
from ra3_megatron.reward.problem import Submission, Verdict
from ra3_megatron.rollout.answers import AnswerKey, AnswerLedger, DrawCost, Judged
from ra3_megatron.rollout.completion import Completion, CompletionSettings, Prompt, complete
from ra3_megatron.rollout.engine import RolloutEngine
from ra3_megatron.stages.rlvr_tasks import TrainTask

MESSAGE = 300
"""Characters of a verdict's message that are recorded."""


@dataclass(frozen=True)
class Asked:
    """A task put to the policy."""

    position: int
    """Place in the endless order of the tasks: with the member the key of its random numbers."""
    task: TrainTask
    """What is asked."""


@dataclass(frozen=True)
class Drawn:
    """Judged answers to the tasks of one call, and what they cost when they were made."""

    answers: list[list[Completion]]
    """Per task, in order of members."""
    verdicts: list[list[Judged]]
    """Likewise."""
    cost: DrawCost
    judge_seconds: float
    """Time that passed after the last answer until the last verdict."""


class AnswerSource:
    """Judged answers of one data replica.

    `chunks` are the model, `engine` samples from them. The first process of a replica has the `judge` and
    keeps the `ledger` (none on the others). All processes of a replica make the same calls.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        engine: RolloutEngine,
        parallel: Parallel,
        tokenizer: Tokenizer,
        sampling: CompletionSettings,
        all_tests: bool,
        judge: Judge | None,
        folder: Path,
        settings: str,
    ) -> None:
        self._chunks, self._engine, self._parallel = list(chunks), engine, parallel
        self._tokenizer, self._sampling, self._all_tests, self._judge = tokenizer, sampling, all_tests, judge
        self._folder = folder
        shard = f"{parallel.data_rank:05d}-of-{parallel.sizes.data:05d}"
        with raise_everywhere(parallel.world, "record of answers"):
            self._ledger = AnswerLedger(folder, shard, settings) if parallel.group("mp").rank == 0 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ledger is not None:
            self._ledger.close()

    def synchronise(self) -> None:
        """Collective over all processes: complete the weights before a draw, whether or not this replica has to make
        it: what is recorded, and how many tasks are asked, may differ between replicas."""
        synchronise_parameters(self._chunks)

    def draw(self, version: int, asked: Sequence[Asked], members: int, seed: int, weights: int | None = None) -> Drawn:
        """`members` judged answers to each task with the weights that have taken `version` steps: those there are.

        What the record has of the same draw takes its place. The random numbers are a function of `seed`, position and
        member. `weights`: steps taken by the weights there are, where these may be newer than the ones asked for; the
        draw must then be on record: raises UserError.
        """
        if not asked:
            return Drawn([], [], DrawCost(version, 0), 0.0)
        prompts = [Prompt(a.task.ids, a.position, m) for a in asked for m in range(members)]
        tasks = [a.task for a in asked for _ in range(members)]
        waiting: dict[int, Future[Verdict]] = {}
        found, cost = self._recorded(version, prompts)
        if found is None:
            with raise_everywhere(self._parallel.group("mp"), "recorded answers"):
                self._refuse_newer(version, weights)
            with phase("rollout"):
                found, cost = self._drawn(version, prompts, tasks, seed, waiting)
        start = time.monotonic()
        with phase("judge"):
            verdicts = self._judged(found, tasks, waiting)
        seconds = time.monotonic() - start
        groups = range(0, len(prompts), members)
        return Drawn(
            [found[i : i + members] for i in groups], [verdicts[i : i + members] for i in groups], cost, seconds
        )

    # ---------------------------------------------------------------- answers

    def _recorded(self, version: int, prompts: Sequence[Prompt]) -> tuple[list[Completion] | None, DrawCost]:
        """The draw as the record has it; none where it lacks an answer or has it of other weights."""
        found, cost = None, DrawCost(version, 0)
        ledger, replica = self._ledger, self._parallel.group("mp")
        with raise_everywhere(replica, "recorded answers"):
            if ledger is not None and all(ledger.has(_key(p), version) for p in prompts):
                found = [ledger.read(_key(p), version, p) for p in prompts]
                cost = ledger.cost(prompts[0].number, version)
        return broadcast_object(replica, (found, cost), "recorded answers")

    def _refuse_newer(self, version: int, weights: int | None) -> None:
        if weights not in (None, version):
            raise UserError(
                f"{self._folder} lacks answers that the weights of step {version} gave, and the newest checkpoint is "
                f"of step {weights}: they cannot be drawn again; restore the file, or delete the checkpoints after "
                f"step {version}: the run then goes on from an older one, or from its start"
            )

    def _drawn(
        self,
        version: int,
        prompts: Sequence[Prompt],
        tasks: Sequence[TrainTask],
        seed: int,
        waiting: dict[int, Future[Verdict]],
    ) -> tuple[list[Completion], DrawCost]:
        """Draw, hand every answer to the judge as it ends (`waiting`, by its number), record, and count."""
        counters = self._engine.counters
        passes, tokens = counters.forward_passes, counters.tokens
        self._engine.weights_version = version
        numbers = {(p.number, p.member): i for i, p in enumerate(prompts)}

        def hand_over(answer: Completion) -> None:
            if self._judge is not None:
                i = numbers[answer.prompt.number, answer.prompt.member]
                waiting[i] = self._judge.submit(self._submission(answer, tasks[i]))

        with raise_everywhere(self._parallel.group("mp"), "answers"):
            found = self._complete(prompts, tasks, seed, hand_over)
            cost = DrawCost(version, len(found), counters.forward_passes - passes, counters.tokens - tokens)
            if self._ledger is not None:
                self._ledger.add_draw(prompts[0].number, [_key(p) for p in prompts], found, cost)
        return found, cost

    def _complete(
        self,
        prompts: Sequence[Prompt],
        tasks: Sequence[TrainTask],
        seed: int,
        hand_over: Callable[[Completion], None],
    ) -> list[Completion]:
        """Answers in order; a call for each kind of ending there is, which is one for tasks of one form."""
        found: dict[int, Completion] = {}
        for stop in dict.fromkeys(t.asked.stop for t in tasks):
            own = [i for i, t in enumerate(tasks) if t.asked.stop == stop]
            sampling = replace(self._sampling, stop=(*stop, *self._sampling.stop))
            asked = [prompts[i] for i in own]
            answers = complete(self._engine, asked, sampling, self._tokenizer, seed, hand_over)
            found.update(zip(own, answers, strict=True))
        return [found[i] for i in range(len(prompts))]

    # ---------------------------------------------------------------- verdicts

    def _submission(self, answer: Completion, task: TrainTask) -> Submission:
        return task.submission(answer_text(self._tokenizer, answer), self._all_tests)

    def _judged(
        self, answers: Sequence[Completion], tasks: Sequence[TrainTask], waiting: dict[int, Future[Verdict]]
    ) -> list[Judged]:
        """Verdicts in order: recorded ones, then those under way; answers read back without one are judged now."""
        verdicts: list[Judged] = []
        ledger, replica = self._ledger, self._parallel.group("mp")
        with raise_everywhere(replica, "verdicts", self._patience(len(answers))):
            if ledger is not None:
                assert self._judge is not None
                known = [ledger.verdict(_key(a.prompt), a) for a in answers]
                for i, (answer, verdict) in enumerate(zip(answers, known, strict=True)):
                    if verdict is None and i not in waiting:
                        waiting[i] = self._judge.submit(self._submission(answer, tasks[i]))
                verdicts = [v or self._outcome(waiting[i], tasks[i]) for i, v in enumerate(known)]
                new = [(_key(a.prompt), a, v) for a, v, k in zip(answers, verdicts, known, strict=True) if k is None]
                if new:
                    ledger.add_verdicts(new)
        return broadcast_object(replica, verdicts, "verdicts")

    def _patience(self, answers: int) -> float:
        """Seconds the other processes of a replica wait for its verdicts."""
        return self._parallel.group("mp").timeout_s * max(1, answers)

    def _outcome(self, future: "Future[Verdict]", task: TrainTask) -> Judged:
        self._parallel.whereabouts.alive()
        seconds = self._parallel.group("mp").timeout_s
        try:
            verdict = future.result(timeout=seconds)
        except NotInTime:
            raise RuntimeError(
                f"no verdict on an answer to {task.task.id} for {seconds:.0f} s; see the judge's messages above, or "
                "raise parallel.timeout_s"
            ) from None
        return Judged(verdict.outcome.value, verdict.passed, verdict.total, verdict.message[:MESSAGE])


def answer_text(tokenizer: Tokenizer, answer: Completion) -> str:
    """What an answer says, up to where it ended."""
    return tokenizer.decode_bytes(answer.ids.tolist())[: answer.text_bytes].decode("utf-8", errors="replace")


def _key(prompt: Prompt) -> AnswerKey:
    return AnswerKey(prompt.number, prompt.member)
