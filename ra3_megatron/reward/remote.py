"""Judging on other machines: spread over servers, with deadlines and retries, and `LOST` when all of that failed."""

import asyncio
import logging
import random
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.judge import LEVELS, JudgeConfig
from ra3_megatron.reward.judge import Backend
from ra3_megatron.reward.problem import Outcome, Submission, Verdict, count_tests
from ra3_megatron.reward.protocol import (
    FORMAT,
    HEALTH_PATH,
    JUDGE_PATH,
    MAX_BODY,
    ProtocolError,
    pack_submission,
    read_secret,
    unpack_verdict,
)
from ra3_megatron.reward.sandbox.pool import wall_limit

logger = logging.getLogger(__name__)

CONNECT_S = 10.0
"""Seconds to reach a server."""
QUEUE_S = 120.0
"""Seconds a submission may wait on a server beside the time that its tests may take."""
BUSY_S = 900.0
"""Seconds that all servers may stay full before a submission is lost."""
REST_S, MOST_REST_S = 0.5, 30.0
"""Seconds a server that failed is left alone: first, and at most; doubled each time."""
START_S = 30.0
"""Seconds that the servers get to answer at the start."""


class Lost(Exception):
    """No verdict; the message says why."""


class Busy(Exception):
    """A server is full; asked to wait `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"full, wait {seconds:g} s")
        self.seconds = seconds


class Refused(Exception):
    """A server will never take this request."""


class Failed(Exception):
    """A server answered with something that is no answer; another may do better."""


@dataclass
class Server:
    """One address and what is known of it."""

    url: str
    capacity: int = 1
    """Requests it works on at once."""
    level: str = LEVELS[0]
    outstanding: int = 0
    failures: int = 0
    """In a row."""
    rests_until: float = field(default=0.0)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Counts a request while it is under way."""
        self.outstanding += 1
        try:
            yield
        finally:
            self.outstanding -= 1

    def rest(self, seconds: float) -> None:
        """Leave it alone for a while."""
        self.rests_until = time.monotonic() + seconds

    def failed(self) -> None:
        """Leave it alone, longer each time."""
        self.rest(min(REST_S * 2**self.failures, MOST_REST_S))
        self.failures += 1


class RemoteBackend(ABC):
    """Submissions to HTTP servers from one thread with an event loop; subclasses say what one server is asked.

    The least busy server gets the next request, relative to its size; one that failed is left alone for a while.
    """

    def __init__(self, config: JudgeConfig, *, training: bool, headers: dict[str, str] | None = None) -> None:
        self._config = config
        self._headers = headers or {}
        self.servers = [Server(address.rstrip("/")) for address in config.addresses]
        self._room = threading.BoundedSemaphore(config.max_pending)
        self._lock = threading.Lock()
        self._pending: dict[Future[Verdict], Submission] = {}
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="ra3-judge-remote", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(START_S + CONNECT_S)
            self.level = min((s.level for s in self.servers), key=LEVELS.index)
            if training and LEVELS.index(self.level) < LEVELS.index(config.minimum_level):
                raise UserError(self.too_weak())
        except BaseException:
            self.close()
            raise

    # What subclasses say.

    @abstractmethod
    async def probe(self, server: Server) -> None:
        """Ask a server what it is and write it down. Raises UserError when it will never work, others to try again."""

    @abstractmethod
    async def ask(self, server: Server, submission: Submission) -> Verdict:
        """The verdict of one server. Raises Busy, Refused, Failed or an error of the transport."""

    def too_weak(self) -> str:
        """What to say when training asks for more isolation than there is."""
        weakest = min(self.servers, key=lambda s: LEVELS.index(s.level))
        return (
            f"the judge at {weakest.url} keeps programs in at level '{weakest.level}', and judge.minimum_level is "
            f"'{self._config.minimum_level}'; give it what it lacks (its log says what), or lower the minimum"
        )

    # What users call.

    def submit(self, submission: Submission) -> "Future[Verdict]":
        """Queue one submission; thread-safe, blocks while `max_pending` are waiting."""
        if self._closed:
            raise RuntimeError("the judge is closed")
        self._room.acquire()
        future: Future[Verdict] = Future()
        future.add_done_callback(self._forget)
        with self._lock:
            if not self._closed:
                self._pending[future] = submission
                asyncio.run_coroutine_threadsafe(self._judge(submission, future), self._loop)
                return future
        future.set_result(_lost(submission, "the judge was closed"))
        return future

    def _forget(self, future: "Future[Verdict]") -> None:
        with self._lock:
            self._pending.pop(future, None)
        self._room.release()

    def close(self) -> None:
        """Hang up; what is pending ends as `Outcome.LOST`. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(CONNECT_S)
        with self._lock:
            pending = list(self._pending.items())
        for future, submission in pending:
            if future.running() or future.set_running_or_notify_cancel():
                future.set_result(_lost(submission, "the judge was closed"))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CONNECT_S)
        self._loop.close()

    async def _stop(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if hasattr(self, "client"):
            await self.client.aclose()

    # On the loop.

    async def _start(self) -> None:
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self.client = httpx2.AsyncClient(headers=self._headers, limits=limits, trust_env=False)
        reasons = await asyncio.gather(*(self._first_answer(server) for server in self.servers))
        silent = {s.url: reason for s, reason in zip(self.servers, reasons, strict=True) if reason}
        if len(silent) == len(self.servers):
            said = "; ".join(f"{url}: {reason}" for url, reason in silent.items())
            raise UserError(f"no judge answers at judge.addresses ({said}); start them, or correct the addresses")
        for url, reason in silent.items():
            logger.warning("the judge at %s does not answer (%s); the others go on without it", url, reason)
        self.servers = [server for server in self.servers if server.url not in silent]
        self._slots = asyncio.Semaphore(sum(server.capacity for server in self.servers))

    async def _first_answer(self, server: Server) -> str:
        """Empty once a server has answered, else why it has not."""
        until, pause = time.monotonic() + START_S, REST_S
        while True:
            try:
                await self.probe(server)
                return ""
            except (httpx2.HTTPError, httpx2.InvalidURL, Failed) as error:
                if time.monotonic() + pause > until or isinstance(
                    error, httpx2.InvalidURL | httpx2.UnsupportedProtocol
                ):
                    return f"{type(error).__name__}: {error}"
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)

    async def _judge(self, submission: Submission, future: "Future[Verdict]") -> None:
        try:
            async with self._slots:
                # From here on `cancel` has no effect, as for a program that runs already.
                if not future.set_running_or_notify_cancel():
                    return
                verdict = await self.attempts(submission.name, lambda server: self.ask(server, submission))
        except Lost as lost:
            verdict = _lost(submission, str(lost))
        except Exception as error:
            logger.exception("judging %s failed", submission.name or "a program")
            verdict = _lost(submission, f"{type(error).__name__}: {error}")
        future.set_result(verdict)

    async def attempts[T](self, name: str, ask: Callable[[Server], Awaitable[T]]) -> T:
        """Ask one server after another. Raises Lost."""
        failures, until = 0, time.monotonic() + BUSY_S
        while True:
            server = await self._pick()
            try:
                with server.working():
                    answer = await ask(server)
                server.failures = 0
                return answer
            except Busy as busy:
                server.rest(busy.seconds)
                if time.monotonic() > until:
                    raise Lost(f"all servers were full for {BUSY_S:g} s") from None
            except Refused as refused:
                raise Lost(f"{server.url}: {refused}") from None
            except (httpx2.HTTPError, Failed, TimeoutError) as error:
                server.failed()
                failures += 1
                reason = f"{server.url}: {type(error).__name__}: {error}"
                if failures > self._config.retries:
                    raise Lost(f"{failures} attempts failed, the last at {reason}") from None
                logger.warning("judging %s: attempt %d failed at %s", name or "a program", failures, reason)

    async def _pick(self) -> Server:
        """The least busy server that does not rest; waits for the first to wake when all do."""
        while True:
            now = time.monotonic()
            awake = [server for server in self.servers if server.rests_until <= now]
            if awake:
                fewest = min(s.outstanding / s.capacity for s in awake)
                return random.choice([s for s in awake if s.outstanding / s.capacity == fewest])
            pause = min(server.rests_until for server in self.servers) - now
            # Not all clients at the same moment.
            await asyncio.sleep(pause * random.uniform(1.0, 1.3))


def _lost(submission: Submission, reason: str) -> Verdict:
    return Verdict(Outcome.LOST, 0, count_tests(submission.tests), reason)


def longest_s(submission: Submission) -> float:
    """Wall seconds that judging may take: all tests and loading at their limits."""
    return wall_limit(submission.limits) * (count_tests(submission.tests) + 1)


def retry_after(response: httpx2.Response) -> float:
    """Seconds that a full server asks for."""
    try:
        return min(max(float(response.headers.get("retry-after", "1")), 0.1), MOST_REST_S)
    except ValueError:
        return 1.0


class ServiceBackend(RemoteBackend):
    """`ra3 judge serve` on other machines."""

    def __init__(self, config: JudgeConfig, *, training: bool) -> None:
        secret = None if config.secret_file is None else read_secret(config.secret_file)
        super().__init__(
            config, training=training, headers={} if secret is None else {"Authorization": f"Bearer {secret}"}
        )

    async def probe(self, server: Server) -> None:
        """Level and size of a server."""
        response = await self.client.get(server.url + HEALTH_PATH, timeout=CONNECT_S)
        if response.status_code == 401:
            raise UserError(
                f"the judge at {server.url} refuses the secret ({'none' if not self._headers else 'that'} of "
                "judge.secret_file); give the file that it was started with"
            )
        try:
            state: Any = response.json() if response.status_code == 200 else None
            known = isinstance(state, dict) and state["format"] == FORMAT and state["level"] in LEVELS
            workers = int(state["workers"]) if known else 0
        except (ValueError, KeyError, TypeError):
            workers = 0
        if workers < 1:
            raise UserError(f"{server.url} answers, but is no ra3 judge of this version; correct judge.addresses")
        # Twice its workers, so that none waits for the next submission to travel.
        server.level, server.capacity = state["level"], 2 * workers

    async def ask(self, server: Server, submission: Submission) -> Verdict:
        """The verdict of one server."""
        try:
            body = await asyncio.to_thread(pack_submission, submission)
        except ProtocolError as error:
            return Verdict(Outcome.UNSAFE, 0, count_tests(submission.tests), str(error))
        if len(body) > MAX_BODY:
            raise Refused(f"the submission has {len(body)} bytes, more than the {MAX_BODY} that a service takes")
        timeout = httpx2.Timeout(CONNECT_S, read=longest_s(submission) + QUEUE_S, write=QUEUE_S)
        headers = {"Content-Type": "application/json"}
        response = await self.client.post(server.url + JUDGE_PATH, content=body, headers=headers, timeout=timeout)
        if response.status_code == 503:
            raise Busy(retry_after(response))
        if response.status_code in (400, 401, 413):
            raise Refused(f"{response.status_code} {response.text[:200]}")
        if response.status_code != 200:
            raise Failed(f"status {response.status_code}")
        try:
            verdict = unpack_verdict(response.content)
        except ProtocolError as error:
            raise Failed(str(error)) from None
        if verdict.outcome is Outcome.LOST:
            raise Failed(verdict.message)
        return verdict


def backend(config: JudgeConfig, *, training: bool) -> Backend:
    """The backend that `judge.backend` names."""
    if config.backend == "service":
        return ServiceBackend(config, training=training)
    from ra3_megatron.reward.fusion import FusionBackend

    return FusionBackend(config, training=training)
