"""The judge of this machine: a thread and a sandbox per worker, one queue."""

import dataclasses
import logging
import os
import queue
import threading
from concurrent.futures import Future
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.reward.guest.supervise import STRETCH
from ra3_megatron.reward.problem import (
    AssertTests,
    CallTests,
    InProcessTests,
    Limits,
    Outcome,
    StdinTests,
    Submission,
    Verdict,
    count_tests,
)
from ra3_megatron.reward.sandbox.level import Level, measured
from ra3_megatron.reward.sandbox.process import Sandbox, SandboxError

logger = logging.getLogger(__name__)

_SLACK_S = 120.0
"""Wall seconds that a sandbox may take beyond all of a job's own limits before it counts as dead."""
_TICK_S = 0.25
"""Wall seconds between looks of a waiting thread at whether the pool has been closed."""
_Item = tuple["Future[Verdict]", Submission]


def wall_limit(limits: Limits) -> float:
    """Wall seconds of one test."""
    return limits.wall_s if limits.wall_s is not None else max(20.0, 10 * limits.cpu_s)


def as_job(submission: Submission) -> dict[str, Any]:
    """A submission as the plain data that a sandbox takes."""
    tests, limits = submission.tests, submission.limits
    job: dict[str, Any] = {
        "program": submission.program,
        "all_tests": submission.all_tests,
        "cpu": float(limits.cpu_s),
        "wall": float(wall_limit(limits)),
        "stretch": limits.wall_s is None and not isinstance(tests, InProcessTests),
        "memory": limits.memory_mb,
        "limit": limits.output_bytes,
    }
    match tests:
        case AssertTests():
            job |= {"kind": "assert", "before": "", "oracle": "", "entry_point": tests.entry_point}
            job |= {"tests": list(tests.tests), "setup": tests.setup, "class_name": None}
        case CallTests():
            job |= {"kind": "call", "before": tests.setup + "\n" if tests.setup else "", "oracle": tests.oracle}
            job |= {"entry_point": tests.entry_point, "class_name": tests.class_name}
            job |= {"compare": tests.compare, "atol": float(tests.atol)}
            job["cases"] = [(tuple(case.args), case.expected) for case in tests.cases]
        case StdinTests():
            job |= {"kind": "stdin", "compare": tests.compare, "tolerance": float(tests.tolerance)}
            job |= {"checker": tests.checker, "cases": [(case.stdin, case.stdout) for case in tests.cases]}
        case InProcessTests():
            job |= {"kind": "in_process", "program": tests.program, "data": tests.data, "wall": float(tests.wall_s)}
    return job


class LocalPool:
    """A `Backend`: sandboxes of this machine.

    Raises:
        UserError: no sandbox can be started, or, for training, none is as isolated as configured.
    """

    def __init__(self, config: JudgeConfig, *, training: bool) -> None:
        self._config = config
        self._queue: queue.Queue[_Item] = queue.Queue(config.max_pending)
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._running: dict[int, Sandbox] = {}
        self._ready: Future[tuple[Level, str]] = Future()
        count = config.workers or default_workers()
        first = threading.Thread(target=self._first, args=(training,), name="judge-0", daemon=True)
        self._threads = [first]
        first.start()
        try:
            self.account, self._namespaces = self._ready.result()
        except BaseException:
            self.close()
            raise
        self.level = self.account.name
        for number in range(1, count):
            thread = threading.Thread(target=self._work, args=(number, None), name=f"judge-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    # Level

    def _first(self, training: bool) -> None:
        """Thread of the first worker: it finds out which namespaces work, since a sandbox dies with its thread."""
        try:
            sandbox, level, namespaces = self._probe()
            self._running[0] = sandbox
            minimum = self._config.minimum_level
            if training and not level.at_least(minimum):
                raise UserError(
                    f"training asks for isolation level {minimum} (judge.minimum_level); this machine reaches "
                    f"{level.account()}; run elsewhere, use judge.backend = service, or lower judge.minimum_level"
                )
            (logger.info if level.at_least(minimum) else logger.warning)("judge: %s", level.account())
        except BaseException as error:  # noqa: BLE001 - handed to the thread that waits
            self._ready.set_exception(error)
            return
        self._ready.set_result((level, namespaces))
        self._work(0, sandbox, namespaces)

    def _probe(self) -> tuple[Sandbox, Level, str]:
        asked = self._config.namespaces
        choices = ("bubblewrap", "own", "none") if asked == "auto" else (asked,)
        missing: list[str] = []
        for namespaces in choices:
            try:
                sandbox = Sandbox(self._config, namespaces, 0)
            except SandboxError as error:
                missing.append(" ".join(f"{namespaces}: {error}".split()))
                continue
            level = measured(sandbox.hello, tuple(missing) if namespaces == "none" else ())
            return sandbox, level, namespaces
        raise UserError(
            f"judge.namespaces = {asked}; no sandbox starts on this machine: {'; '.join(missing)[-1500:]}; "
            "cure that, or set judge.namespaces to another way"
        )

    # Work

    def _work(self, number: int, sandbox: Sandbox | None, namespaces: str | None = None) -> None:
        """One worker: takes submissions until the pool closes; starts its sandbox anew when it must."""
        way = namespaces or self._namespaces
        jobs = 0
        try:
            while not self._closed.is_set():
                try:
                    future, submission = self._queue.get(timeout=_TICK_S)
                except queue.Empty:
                    continue
                if not future.set_running_or_notify_cancel():
                    continue
                if sandbox is not None and jobs >= self._config.jobs_per_sandbox:
                    self._drop(number)
                    sandbox = None
                verdict, sandbox, jobs = self._attempt(number, way, sandbox, jobs, submission)
                future.set_result(verdict)
        finally:
            self._drop(number)

    def _attempt(
        self, number: int, way: str, sandbox: Sandbox | None, jobs: int, submission: Submission
    ) -> tuple[Verdict, Sandbox | None, int]:
        """Verdict on one submission, the sandbox to go on with and its age; retried when the sandbox fails."""
        total = count_tests(submission.tests)
        try:
            job = as_job(submission)
        except Exception as error:  # noqa: BLE001 - bad data of one task must not end the worker
            return Verdict(Outcome.LOST, 0, total, f"not a submission: {error}"), sandbox, jobs
        limits = submission.limits
        deadline = _SLACK_S + (total + 1) * (STRETCH * wall_limit(limits) + 2 * limits.cpu_s + 20)
        problem = ""
        for _ in range(self._config.retries + 1):
            if self._closed.is_set():
                problem = "the judge was closed"
                break
            try:
                if sandbox is None:
                    sandbox, jobs = self._start(number, way), 0
                answer = sandbox.run(job, deadline)
                jobs += 1
                return _verdict(answer), sandbox, jobs
            except Exception as error:  # noqa: BLE001 - whatever broke, this worker goes on with a fresh sandbox
                problem = f"{type(error).__name__}: {error}"
                self._drop(number)
                sandbox = None
                if not self._closed.is_set():
                    logger.warning("judge: sandbox %d failed on %r: %s", number, submission.name, problem)
        return Verdict(Outcome.LOST, 0, total, problem[-500:]), sandbox, jobs

    def _start(self, number: int, way: str) -> Sandbox:
        sandbox = Sandbox(self._config, way, number)
        with self._lock:
            self._running[number] = sandbox
            closed = self._closed.is_set()
        if closed:
            sandbox.stop()
        return sandbox

    def _drop(self, number: int) -> None:
        with self._lock:
            sandbox = self._running.pop(number, None)
        if sandbox is not None:
            sandbox.close()

    # Backend

    def submit(self, submission: Submission) -> "Future[Verdict]":
        """Queue one submission; blocks while `max_pending` are waiting."""
        future: Future[Verdict] = Future()
        while True:
            if self._closed.is_set():
                raise RuntimeError("the judge is closed")
            try:
                self._queue.put((future, submission), timeout=_TICK_S)
                break
            except queue.Full:
                continue
        if self._closed.is_set():
            self._drain()
        return future

    def _drain(self) -> None:
        while True:
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return
            if item[0].set_running_or_notify_cancel():
                total = count_tests(item[1].tests)
                item[0].set_result(Verdict(Outcome.LOST, 0, total, "the judge was closed"))

    def close(self) -> None:
        """End all sandboxes; what waits or runs ends as `Outcome.LOST`. Idempotent."""
        self._closed.set()
        self._drain()
        with self._lock:
            for sandbox in self._running.values():
                sandbox.stop()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._drain()
        for number in list(self._running):
            self._drop(number)


def default_workers() -> int:
    """Cores that this process may use, less those of the trainers on this machine (LOCAL_WORLD_SIZE), at least 1."""
    trainers = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, len(os.sched_getaffinity(0)) - trainers)


def _verdict(answer: dict[str, Any]) -> Verdict:
    fields = {field.name for field in dataclasses.fields(Verdict)}
    renamed = {{"cpu": "cpu_s", "wall": "wall_s"}.get(key, key): value for key, value in answer.items()}
    assert set(renamed) == fields, f"a verdict with the fields {sorted(renamed)}"
    return Verdict(**{**renamed, "outcome": Outcome(renamed["outcome"])})
