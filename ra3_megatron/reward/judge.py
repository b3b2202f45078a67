"""The judge: programs and their tests in, verdicts out, whichever machine runs them."""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from types import TracebackType
from typing import Protocol, Self

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.reward.problem import InProcessTests, Outcome, Submission, Verdict, count_tests

logger = logging.getLogger(__name__)


class Backend(Protocol):
    """What runs the programs: this machine's pool, HTTP services, SandboxFusion."""

    level: str
    """Isolation reached, one of `config.judge.LEVELS`."""

    def submit(self, submission: Submission) -> "Future[Verdict]":
        """Queue one submission; thread-safe, blocks while too many wait.

        Infrastructure errors are retried by the backend and end as `Outcome.LOST`.
        """

    def close(self) -> None:
        """Stop and leave nothing behind; pending submissions end as `Outcome.LOST`. Idempotent."""


def _backend(config: JudgeConfig, training: bool) -> Backend:
    if config.backend == "local":
        from ra3_megatron.reward.sandbox.pool import LocalPool

        return LocalPool(config, training=training)
    from ra3_megatron.reward import remote

    return remote.backend(config, training=training)


class Judge:
    """Judges programs; a context manager that leaves no process and no file behind.

    `training` refuses to start below the configured isolation (`UserError`) and never runs `InProcessTests`;
    `allow_unsafe` lets those run, for comparison with reference evaluators. From asyncio:
    `await asyncio.wrap_future(judge.submit(...))`; `submit` blocks when the queue is full, so call it in a thread
    where that matters.
    """

    def __init__(self, config: JudgeConfig, *, training: bool = False, allow_unsafe: bool = False) -> None:
        if training and allow_unsafe:
            raise UserError(
                "the judge was asked for training and for tests that share a process with the program; "
                "such tests can be cheated, so rewards never use them; drop one of the two"
            )
        self._config = config
        self._allow_unsafe = allow_unsafe
        self._backend = _backend(config, training)
        self.level = self._backend.level

    def submit(self, submission: Submission) -> "Future[Verdict]":
        """Queue one submission; thread-safe, blocks while `max_pending` are waiting.

        Raises:
            RuntimeError: the judge is closed.
        """
        total = count_tests(submission.tests)
        if total == 0:
            raise UserError(f"task {submission.name or '(unnamed)'} has no tests; nothing would be judged; drop it")
        if isinstance(submission.tests, InProcessTests) and not self._allow_unsafe:
            refused: Future[Verdict] = Future()
            refused.set_result(
                Verdict(Outcome.UNSAFE, 0, total, "tests that share a process with the program are not run here")
            )
            return refused
        return self._backend.submit(submission)

    def judge(
        self, submissions: Sequence[Submission], on_verdict: Callable[[int, Verdict], None] | None = None
    ) -> list[Verdict]:
        """Judge all and keep their order; `on_verdict` is called in this thread as each one is known."""
        futures: list[Future[Verdict]] = []
        try:
            for submission in submissions:
                futures.append(self.submit(submission))  # noqa: PERF401 - those queued are cancelled on an error
            if on_verdict is not None:
                position = {future: index for index, future in enumerate(futures)}
                for future in as_completed(futures):
                    on_verdict(position[future], future.result())
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Stop all sandboxes; idempotent."""
        self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
