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
import traceback
from typing import Any, NoReturn

from . import jail, probe, program
from .remove import empty

MESSAGE = 1 << 16
KILL = b"kill"


def serve(link: socket.socket, walls: jail.Walls, folder: str) -> NoReturn:
    """Serve until `link` closes; never returns."""
    code = 1
    try:
        _close_others({link.fileno()})
        jail.enter(walls, walls.uid, folder)
        server = _Server(link, walls, folder)
        gc.collect()
        gc.freeze()  # the collector would write to, and so copy, every page in every child
        gc.disable()
        while True:
            message, fds, _, _ = socket.recv_fds(link, MESSAGE, 8)
            if not message:
                code = 0
                break
            if message != KILL:  # too late: that program had just ended
                server.run(json.loads(message), fds)
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


class _Server:
    """Runs programs one after the other."""

    def __init__(self, link: socket.socket, walls: jail.Walls, folder: str) -> None:
        self._link = link
        self._walls = walls
        self._folder = folder
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        self._poll = select.poll()
        self._poll.register(self._woken, select.POLLIN)
        self._poll.register(link.fileno(), select.POLLIN)

    def run(self, order: dict[str, Any], fds: list[int]) -> None:
        """Start one program, see to its end, and leave nothing of it."""
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            _become(self._walls, order, fds, parent)
        for fd in fds:
            os.close(fd)
        self._tell({"pid": pid})
        while (ended := self._wait(pid)) is None:
            message = self._link.recv(MESSAGE)
            os.kill(pid, signal.SIGKILL)  # the order can be nothing else, or the other side has gone
            if not message:
                os.waitpid(pid, 0)
                empty(self._folder)
                os._exit(0)
        empty(self._folder)
        status, usage = ended
        self._tell({"status": status, "cpu": usage.ru_utime + usage.ru_stime})

    def _wait(self, pid: int) -> tuple[int, Any] | None:
        """Block until the child is reaped (its status and usage) or there is an order (none)."""
        while True:
            # A child that ended before is found here, a later one wakes the poll.
            ended, status, usage = os.wait4(pid, os.WNOHANG)
            if ended:
                return status, usage
            ready = [fd for fd, _ in self._poll.poll()]
            if self._woken in ready:
                os.read(self._woken, 4096)
            elif ready:
                return None

    def _tell(self, answer: dict[str, Any]) -> None:
        self._link.send(json.dumps(answer).encode())


def _become(walls: jail.Walls, order: dict[str, Any], fds: list[int], parent: int) -> NoReturn:
    """In the child: take the files, close everything else, close the gate, run."""
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        jail.take(fds)
        jail.close_gate(walls, order["cpu"], order["memory"], parent)
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


def fork_server(walls: jail.Walls, folder: str) -> socket.socket:
    """Fork the server off this process, which must not have seen a job yet; the line to it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        os.setsid()
        serve(theirs, walls, folder)
    theirs.close()
    return ours
