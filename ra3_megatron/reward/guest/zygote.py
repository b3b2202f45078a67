"""The fork server: makes jailed processes for programs, waits for them, clears up. It never sees a test or a program.

One program at a time. Orders and answers are JSON messages on a packet socket; the files of a program (descriptors 0
to 4: input, output, errors, channel, source) come along as descriptors.
"""

import gc
import json
import os
import select
import signal
import socket
import time
import traceback
from dataclasses import dataclass
from typing import Any, NoReturn

from . import jail, kernel, probe, program
from .remove import remove_tree

MESSAGE = 1 << 16
KILL = b"kill"


@dataclass(frozen=True)
class Plan:
    """What a fork server keeps to."""

    jail: jail.Jail
    """The walls."""
    folder: str
    """Where work folders are made."""


def serve(link: socket.socket, plan: Plan) -> NoReturn:
    """Serve until `link` closes; never returns."""
    code = 1
    try:
        _close_others({link.fileno(), *plan.jail.read, *plan.jail.devices})
        signal.signal(signal.SIGCHLD, lambda *_: None)
        gc.collect()
        gc.freeze()
        serial = 0
        while True:
            message, fds, _, _ = socket.recv_fds(link, MESSAGE, 8)
            if not message:
                code = 0
                break
            if message == KILL:
                continue  # too late: that program had just ended
            serial += 1
            _one(link, plan, json.loads(message), fds, serial)
    except BaseException:  # noqa: BLE001 - the last words of this process
        traceback.print_exc()
    finally:
        os._exit(code)
    raise AssertionError("unreachable")


def _close_others(keep: set[int]) -> None:
    for fd in map(int, os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else range(256)):
        if fd > 2 and fd not in keep:
            try:
                os.close(fd)
            except OSError:
                continue


def _one(link: socket.socket, plan: Plan, order: dict[str, Any], fds: list[int], serial: int) -> None:
    """Start one program, see to its end, and leave nothing of it."""
    folder = os.path.join(plan.folder, f"job{serial}")
    os.mkdir(folder, 0o700)
    if plan.jail.uid is not None:
        os.chown(folder, plan.jail.uid, plan.jail.uid)
    parent = os.getpid()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _become(link, plan, order, fds, folder, parent)
    for fd in fds:
        os.close(fd)
    _tell(link, {"pid": pid})
    wait = _Reaper(pid)
    with wait:
        while not wait.over(link):
            message = link.recv(MESSAGE)
            os.kill(pid, signal.SIGKILL)  # the order can be nothing else, or the other side has gone
            if not message:
                os.waitpid(pid, 0)
                remove_tree(folder)
                os._exit(0)
    remove_tree(folder)
    usage = wait.usage
    answer = {"status": wait.status, "cpu": usage.ru_utime + usage.ru_stime, "wall": time.monotonic() - started}
    _tell(link, answer)


class _Reaper:
    """Waits for one child and for orders at the same time."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status = 0
        self.usage: Any = None

    def __enter__(self) -> "_Reaper":
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        os.close(self._read)
        os.close(self._write)

    def over(self, link: socket.socket) -> bool:
        """Block until the child has ended and is reaped (true) or there is an order (false)."""
        poll = select.poll()
        poll.register(self._read, select.POLLIN)
        poll.register(link.fileno(), select.POLLIN)
        while True:
            # Looked at after the pipe is set up: a child that ended before is found here, a later one wakes the pipe.
            pid, self.status, self.usage = os.wait4(self.pid, os.WNOHANG)
            if pid:
                return True
            ready = [fd for fd, _ in poll.poll()]
            if self._read in ready:
                os.read(self._read, 4096)
            elif link.fileno() in ready:
                return False


def _tell(link: socket.socket, answer: dict[str, Any]) -> None:
    link.send(json.dumps(answer).encode())


def _become(
    link: socket.socket, plan: Plan, order: dict[str, Any], fds: list[int], folder: str, parent: int
) -> NoReturn:
    """In the child: take the files, close everything else, enter the jail, run."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        highest = max(255, *fds)
        for target, fd in enumerate([os.dup2(fd, highest + 1 + i) for i, fd in enumerate(fds)]):
            os.dup2(fd, target)
        keep = {*plan.jail.read, *plan.jail.devices}
        first = len(fds)
        for fd in sorted(keep):
            os.closerange(first, fd)
            first = fd + 1
        os.closerange(first, highest + 16)
        jail.enter(plan.jail, folder, order["cpu"], order["memory"], parent)
        if order["mode"] == "probe":
            probe.run(program.CHANNEL_FD)
        program.start(order)
    except BaseException:  # noqa: BLE001 - the parent sees the exit code
        traceback.print_exc()
    finally:
        os._exit(97)
    raise AssertionError("unreachable")


def order(mode: str, *, cpu_s: float, memory_mb: int, limit: int, data: int = 0) -> bytes:
    """The order for one program; see `program.start`."""
    content = {"mode": mode, "cpu": cpu_s, "memory": memory_mb, "limit": limit, "data": data}
    return json.dumps(content).encode()


def fork_server(plan: Plan) -> tuple[socket.socket, int]:
    """Fork the server off this process, which must not have seen a job yet; its link and its process id."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        ours.close()
        os.setsid()
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL, "parent death signal")
        if os.getppid() != parent:
            os._exit(1)
        serve(theirs, plan)
    theirs.close()
    return ours, pid
