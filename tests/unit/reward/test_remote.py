"""Clients of remote judges against servers that are slow, full, broken or gone."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.reward import remote
from ra3_megatron.reward.judge import Judge
from ra3_megatron.reward.problem import Outcome, Verdict
from ra3_megatron.reward.protocol import FORMAT, pack_verdict, unpack_submission
from tests.unit.reward.attacks import control

pytestmark = pytest.mark.timeout(120)
Answer = tuple[int, dict[str, str], bytes]
PASSED = (200, {}, pack_verdict(Verdict(Outcome.PASSED, 3, 3)))


@dataclass
class Machine:
    """A server whose answers a test decides; what a broken network or machine does cannot be had from a real one."""

    answer: Callable[["Machine"], Answer]
    level: str = "namespaces"
    workers: int = 4
    requests: list[float] = field(default_factory=list)
    most: int = 0
    url: str = ""
    _now: int = 0
    _lock: Any = field(default_factory=threading.Lock)

    def health(self) -> Answer:
        state = {"format": FORMAT, "level": self.level, "workers": self.workers, "pending": 0, "capacity": 8}
        return 200, {}, json.dumps(state).encode()

    def judge(self, body: bytes) -> Answer:
        unpack_submission(body)
        with self._lock:
            self.requests.append(time.monotonic())
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            return self.answer(self)
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def running(machine: Machine) -> Iterator[Machine]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _send(self, answer: Answer) -> None:
            status, headers, body = answer
            if status == 0:
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
                return
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self._send(machine.health())

        def do_POST(self) -> None:
            self._send(machine.judge(self.rfile.read(int(self.headers["Content-Length"]))))

        def log_message(self, *_: Any) -> None:
            pass

        def handle(self) -> None:
            with contextlib.suppress(OSError):
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    machine.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield machine
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits that suit a test."""
    monkeypatch.setattr(remote, "REST_S", 0.02)
    monkeypatch.setattr(remote, "START_S", 1.0)


def config(*machines: Machine, **more: Any) -> JudgeConfig:
    return JudgeConfig(backend="service", addresses=tuple(m.url for m in machines), **more)


def in_turn(*answers: Answer) -> Callable[[Machine], Answer]:
    """One answer after another, the last one for ever."""
    return lambda machine: answers[min(len(machine.requests), len(answers)) - 1]


def slow(machine: Machine) -> Answer:
    time.sleep(0.1)
    return PASSED


def test_work_is_spread() -> None:
    """All programs went to the first address, and the other machines stood idle."""
    with running(Machine(slow, workers=1)) as small, running(Machine(slow, workers=3)) as large:
        with Judge(config(small, large)) as judge:
            verdicts = judge.judge([control("calls")] * 32)
        assert all(verdict.ok for verdict in verdicts)
        assert len(small.requests) + len(large.requests) == 32
        assert small.most <= 2
        assert 2 < large.most <= 6
        assert len(large.requests) > len(small.requests)


@pytest.mark.parametrize(
    "failure",
    [(500, {}, b"no"), (200, {}, b"{}"), (0, {}, b""), (200, {}, pack_verdict(Verdict(Outcome.LOST, 0, 3, "died")))],
    ids=["status 500", "no verdict", "hangs up", "lost there"],
)
def test_failure_is_tried_again(failure: Answer) -> None:
    """One failure of the network was a reward of 0."""
    with running(Machine(in_turn(failure, failure, PASSED))) as machine:
        with Judge(config(machine, retries=2)) as judge:
            assert judge.judge([control("calls")])[0].ok
        assert len(machine.requests) == 3


def test_failures_end_as_lost() -> None:
    """A program was judged wrong because a machine was broken, or the run waited for ever."""
    with running(Machine(in_turn((500, {}, b"no")))) as machine:
        with Judge(config(machine, retries=2)) as judge:
            (verdict,) = judge.judge([control("calls")])
        assert verdict.outcome is Outcome.LOST
        assert verdict.total == 3
        assert "3 attempts failed" in verdict.message
        assert "status 500" in verdict.message
        assert len(machine.requests) == 3


def test_another_server_takes_over() -> None:
    """A dead machine took a share of the samples with it."""
    with running(Machine(in_turn((500, {}, b"no")))) as broken, running(Machine(in_turn(PASSED))) as sound:
        with Judge(config(broken, sound, retries=3)) as judge:
            verdicts = judge.judge([control("calls")] * 20)
        assert [v.outcome for v in verdicts] == [Outcome.PASSED] * 20
        assert len(broken.requests) < 10


def test_busy_server_is_no_failure() -> None:
    """Back-pressure used up the attempts."""
    full = (503, {"Retry-After": "0.1"}, b"")
    with running(Machine(in_turn(*[full] * 6, PASSED))) as machine:
        with Judge(config(machine, retries=0)) as judge:
            assert judge.judge([control("calls")])[0].ok
        gaps = [b - a for a, b in zip(machine.requests, machine.requests[1:], strict=False)]
        assert min(gaps) >= 0.09


def test_servers_that_stay_full_lose_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run waited without end for servers that somebody else kept full."""
    monkeypatch.setattr(remote, "BUSY_S", 0.3)
    with running(Machine(in_turn((503, {"Retry-After": "0.1"}, b"")))) as machine, Judge(config(machine)) as judge:
        (verdict,) = judge.judge([control("calls")])
    assert verdict.outcome is Outcome.LOST
    assert "were full" in verdict.message


def test_refusal_is_not_repeated() -> None:
    """A request that a server can never take was sent again and again."""
    with running(Machine(in_turn((413, {}, b"too large")))) as machine:
        with Judge(config(machine)) as judge:
            (verdict,) = judge.judge([control("calls")])
        assert verdict.outcome is Outcome.LOST
        assert "413 too large" in verdict.message
        assert len(machine.requests) == 1


def test_silent_server_meets_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that took the request and said nothing stopped the run."""
    over = threading.Event()

    def silent(machine: Machine) -> Answer:
        over.wait(60)
        return PASSED

    monkeypatch.setattr(remote, "longest_s", lambda _: 0.1)
    monkeypatch.setattr(remote, "QUEUE_S", 0.2)
    with running(Machine(silent)) as machine:
        with Judge(config(machine, retries=1)) as judge:
            (verdict,) = judge.judge([control("calls")])
        over.set()
    assert verdict.outcome is Outcome.LOST
    assert "ReadTimeout" in verdict.message


def test_closing_ends_what_is_pending() -> None:
    """A run that stopped hung on verdicts that would never come."""
    over = threading.Event()

    def silent(machine: Machine) -> Answer:
        over.wait(60)
        return PASSED

    with running(Machine(silent, workers=1)) as machine:
        judge = Judge(config(machine))
        futures = [judge.submit(control("calls")) for _ in range(5)]
        cancelled = futures[-1].cancel()
        judge.close()
        over.set()
    assert cancelled
    assert [f.result(10).outcome for f in futures[:-1]] == [Outcome.LOST] * 4
    assert not any(thread.name == "ra3-judge-remote" for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="closed"):
        judge.submit(control("calls"))
    judge.close()


def test_submitting_waits_when_too_many_are_pending() -> None:
    """A producer that ran ahead filled the memory with programs."""
    go = threading.Event()

    def gated(machine: Machine) -> Answer:
        go.wait(60)
        return PASSED

    with running(Machine(gated, workers=1)) as machine, Judge(config(machine, max_pending=3)) as judge:
        futures = [judge.submit(control("calls")) for _ in range(3)]
        blocked = threading.Thread(target=lambda: futures.append(judge.submit(control("calls"))))
        blocked.start()
        blocked.join(0.3)
        assert blocked.is_alive()
        go.set()
        blocked.join(30)
        assert all(f.result(30).ok for f in futures)
        assert len(futures) == 4


def test_silent_addresses_are_left_out_or_refused() -> None:
    """A run with a wrong address started, and lost every sample."""
    with running(Machine(in_turn(PASSED))) as machine:
        gone = "http://127.0.0.1:9"
        two = JudgeConfig(backend="service", addresses=(gone, machine.url))
        with Judge(two) as judge:
            assert judge.judge([control("calls")])[0].ok
    for address in (gone, "node7:8099", "ftp://node7"):
        with pytest.raises(UserError, match=r"no judge answers|judge\.addresses"):
            Judge(JudgeConfig(backend="service", addresses=(address,)))


def test_weakest_server_counts() -> None:
    """Training was content because the first of its servers was well isolated."""
    with (
        running(Machine(in_turn(PASSED), level="namespaces")) as strong,
        running(Machine(in_turn(PASSED), level="syscalls")) as weak,
    ):
        with pytest.raises(UserError, match=f"{weak.url} keeps programs in at level 'syscalls'"):
            Judge(config(strong, weak), training=True)
        with Judge(config(strong, weak)) as judge:
            assert judge.level == "syscalls"
        with Judge(config(strong), training=True) as judge:
            assert judge.level == "namespaces"


def test_something_else_at_the_address_is_told() -> None:
    """The port of another service was given, and every sample was lost."""

    class Other(Machine):
        def health(self) -> Answer:
            return 200, {}, b'{"status": "ok"}'

    with running(Other(in_turn(PASSED))) as machine, pytest.raises(UserError, match="is no ra3 judge"):
        Judge(config(machine))
