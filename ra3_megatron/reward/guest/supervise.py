"""The trusted side's hold on programs: starts them through the fork server, meters them, ends them."""

import json
import os
import select
import signal
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import zygote
from .kernel import clock_of

GRACE_S = 20.0
"""Wall seconds within which the fork server must have done what it was told."""
_LONGEST_WAIT_S = 0.1
"""Wall seconds between looks at the clocks: several threads may use more processor time than wall time passes."""

STRETCH = 5.0
"""A wall limit that nobody has set may become this many times as long for a program that keeps using the processor."""
_WORKING_S = 0.02
"""Processor seconds within a tenth of the wall limit from which on a program counts as working."""


class Broken(Exception):
    """The sandbox itself has failed; says nothing about the program."""


class Ended(Exception):
    """The program has ended, or was ended, before it had answered."""

    def __init__(self, outcome: str, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome
        self.message = message


@dataclass(frozen=True)
class Exit:
    """How a program's process ended."""

    status: int
    """Wait status."""
    cpu: float
    """Processor seconds, all threads."""


@dataclass
class Meter:
    """Processor time of one process against a limit that counts from the last `start`."""

    pid: int
    limit: float
    what: str
    base: float = 0.0

    def used(self) -> float:
        """Processor seconds since `start`; 0 when the process is gone."""
        try:
            return time.clock_gettime(clock_of(self.pid)) - self.base
        except OSError:
            return 0.0

    def start(self) -> None:
        """Count from now."""
        self.base += self.used()


class Link:
    """The line to the fork server; `host` is the descriptor of the line to the pool."""

    def __init__(self, sock: socket.socket, host: int) -> None:
        self.sock = sock
        self.host = host

    def _hear(self, timeout: float) -> dict[str, Any]:
        self.sock.settimeout(timeout)
        try:
            message = self.sock.recv(zygote.MESSAGE)
        except TimeoutError as error:
            raise Broken("the fork server does not answer") from error
        if not message:
            raise Broken("the fork server has died")
        answer: dict[str, Any] = json.loads(message)
        return answer

    def spawn(self, order: bytes, fds: Sequence[int]) -> int:
        """Start a program with `fds` as its descriptors 0, 1, 2, ...; its process id."""
        try:
            socket.send_fds(self.sock, [order], fds)
        except OSError as error:
            raise Broken("the fork server has died") from error
        pid: int = self._hear(GRACE_S)["pid"]
        return pid

    def kill(self) -> None:
        """End the program that runs."""
        try:
            self.sock.send(zygote.KILL)
        except OSError as error:
            raise Broken("the fork server has died") from error

    def exit(self, timeout: float = GRACE_S) -> Exit:
        """How the program ended; waits for it."""
        answer = self._hear(timeout)
        return Exit(answer["status"], answer["cpu"])


class Watch:
    """One running program: waiting for anything goes through here, so that its limits hold meanwhile."""

    def __init__(self, link: Link, pid: int, cpu_s: float, wall_s: float, stretch: float) -> None:
        self._link = link
        self._stretch = stretch
        self.meters = [Meter(pid, cpu_s, "the program")]
        self._wall_s = wall_s
        self._begin(time.monotonic())
        self._polls: dict[tuple[int, bool], select.poll] = {}
        self._reason: Ended | None = None
        self.exit: Exit | None = None

    def start_test(self) -> None:
        """Limits count from now."""
        for meter in self.meters:
            meter.start()
        self._begin(time.monotonic())

    def _begin(self, now: float) -> None:
        self._until = now + self._wall_s
        self._last = now + self._wall_s * self._stretch
        self._seen = 0.0

    def _starved(self, now: float) -> bool:
        """Whether the wall limit was met by a process that works, on a machine so busy that it cannot; puts it off."""
        used = sum(meter.used() for meter in self.meters)
        if now >= self._last or used - self._seen < _WORKING_S:
            return False
        self._seen = used
        self._until = min(self._last, now + self._wall_s / 10)
        return True

    def wait(self, fd: int, writing: bool, stay: bool = False) -> None:
        """Return when `fd` is ready, its other end closed included; for `Channel`. `stay`: as for `ready`.

        Raises:
            Ended: a limit was reached.
        """
        poll = self._polls.get((fd, writing))
        if poll is None:
            poll = self._polls[fd, writing] = select.poll()
            poll.register(fd, select.POLLOUT if writing else select.POLLIN)
        self.ready(poll, stay)

    def ready(self, poll: "select.poll", stay: bool = False) -> list[int]:
        """The descriptors of `poll` that are ready, at least one.

        `stay`: wait for them after the program's own end too, since somebody else writes to them.

        Raises:
            Ended: a limit was reached, or the program has ended and nothing is or will be ready.
        """
        link = self._link.sock.fileno()
        poll.register(self._link.host, 0)  # its end only
        if self.exit is None:
            poll.register(link, select.POLLIN)
        while True:
            ready = [fd for fd, _ in poll.poll(1000 * self._timeout())]
            if self._link.host in ready:
                # The signal that a parent's death sends may be forbidden: another user, no right to signal it.
                os._exit(1)
            if link in ready:
                ready.remove(link)
                poll.unregister(link)
                self.exit = self._link.exit()
                # What it wrote last is there by now.
                ready = [fd for fd, _ in poll.poll(0)]
                if not ready and not stay:
                    raise self.ended()
            if ready:
                return ready
            self._check()

    def _timeout(self) -> float:
        left = min(self._until - time.monotonic(), _LONGEST_WAIT_S, *(m.limit - m.used() for m in self.meters))
        return max(left, 0.001)

    def _check(self) -> None:
        for meter in self.meters:
            if meter.used() >= meter.limit:
                self.stop("cpu_limit", f"{meter.what} used more than {meter.limit:g} processor seconds")
        now = time.monotonic()
        if now >= self._until and not self._starved(now):
            self.stop("wall_limit", f"more than {self._wall_s:g} wall seconds with processor time left")

    def stop(self, outcome: str, message: str) -> None:
        """End the program for a reason.

        Raises:
            Ended: always, with that reason.
        """
        self._reason = self._reason or Ended(outcome, message)
        self.end()
        raise self._reason

    def end(self) -> Exit:
        """Kill the program if it still runs, and wait until nothing is left of it."""
        if self.exit is None:
            self._link.kill()
            self.exit = self._link.exit()
        return self.exit

    def finish(self) -> Exit:
        """Wait for the program's own end, within its limits."""
        if self.exit is None:
            try:
                self.ready(select.poll())
            except Ended:
                if self._reason is not None:
                    raise
        assert self.exit is not None
        return self.exit

    def ended(self) -> Ended:
        """Why the program ended, whether it was ended or ended itself."""
        if self._reason is not None:
            return self._reason
        try:
            status = self.finish().status
        except Ended as reason:
            return reason
        if os.WIFEXITED(status):
            return Ended("crashed", f"exited with {os.WEXITSTATUS(status)} before it had answered")
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU:
            return Ended("cpu_limit", "more processor time than allowed")
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        return Ended("crashed", f"ended by {name}")
