"""Judging of answers beside generation: submitted as they come, verdicts recorded as they are known."""

import threading
from concurrent.futures import Future
from dataclasses import asdict
from typing import Any

from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.evaluation.benchmarks.task import Task, digest_of
from ra3_megatron.evaluation.journal import Journal
from ra3_megatron.evaluation.judging import Judgement, joined, submissions
from ra3_megatron.reward.judge import Judge
from ra3_megatron.reward.problem import Limits, Outcome, Verdict

_VERSION = 1
"""Raised when the same program would be judged otherwise, so that recorded verdicts are made again."""

NO_PROGRAM = Judgement(str(Outcome.MISSING), 0, 1, None, None, "the answer holds no program")
"""Of an answer without any code; no judge is asked."""


def limits_of(config: JudgeConfig) -> Limits:
    """What a program may use where its task says nothing."""
    return Limits(cpu_s=config.cpu_s, memory_mb=config.memory_mb)


def verdict_key(fingerprint: str, task: Task, program: str, mode: str, limits: Limits) -> str:
    """Names everything a verdict depends on but the machine.

    A reference's time, which may raise a task's own limits, is the machine's, and left out.
    """
    memory = str(task.limits.memory_mb if task.limits else limits.memory_mb)
    return digest_of([str(_VERSION), fingerprint, task.id, mode, memory, str(limits.cpu_s), program])


def from_record(record: dict[str, Any]) -> Judgement:
    """A judgement as it was recorded."""
    return Judgement(**{k: v for k, v in record.items() if k != "key"})


class Verdicts:
    """Programs to a judge, judgements into a journal; a context manager. The judge starts with the first program."""

    def __init__(self, config: JudgeConfig, mode: str, journal: Journal) -> None:
        self._config, self._mode, self._journal = config, mode, journal
        self._judge: Judge | None = None
        self._change, self._open = threading.Condition(), 0
        self._error: BaseException | None = None

    def put(self, key: str, task: Task, program: str) -> None:
        """Have a program judged; blocks while the judge's queue is full. Errors are raised here or by `wait`."""
        if self._error is not None:
            raise self._error
        if not program.strip():
            self._journal.add(key, asdict(NO_PROGRAM))
            return
        if self._judge is None:
            self._judge = Judge(self._config, allow_unsafe=self._mode == "parity")
        parts = submissions(task, program, self._mode, limits_of(self._config))
        found: dict[str, Verdict] = {}
        with self._change:
            self._open += 1

        def arrived(name: str, future: "Future[Verdict]") -> None:
            try:
                verdict = future.result()
                with self._change:
                    found[name] = verdict
                    whole = len(found) == len(parts)
                if whole:
                    self._finish(key, {n: found[n] for n in parts})
            except BaseException as error:  # noqa: BLE001  raised in the thread that waits
                with self._change:
                    self._error = self._error or error
                    self._change.notify_all()

        for name, submission in parts.items():
            future = self._judge.submit(submission)
            future.add_done_callback(lambda f, name=name: arrived(name, f))  # type: ignore[misc]

    def _finish(self, key: str, found: dict[str, Verdict]) -> None:
        judgement = joined(found)
        if judgement.known:
            # What failed for want of a sandbox is not recorded: the next attempt tries it again.
            self._journal.add(key, asdict(judgement))
        with self._change:
            self._open -= 1
            self._change.notify_all()

    def wait(self) -> None:
        """Return when all that was put is judged. Each program has its own deadline, so this ends."""
        with self._change:
            while self._open and self._error is None:
                self._change.wait(timeout=1.0)
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop the judge; nothing is left behind."""
        if self._judge is not None:
            self._judge.close()

    def __enter__(self) -> "Verdicts":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
