"""Ranks of jobs without the price of an import: one process has everything in memory and forks them into their nodes.

`python -m tests.slurm.zygote SOCKET` serves; `rank_python.py` (the RA3_PYTHON of the tests) is what srun starts in its
place: it sends its arguments, environment, folder and standard streams, passes signals on, and ends with the rank's
exit code. The forked rank enters all namespaces of the node it was asked from, so that a power cut, a wrong address, or
a port in use hit it as they would hit any process there. When the process that asked dies, so does the rank.
"""

import array
import contextlib
import json
import os
import select
import signal
import socket
import struct
import sys
import traceback
from typing import Any


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    fds = array.array("i")
    data, ancillary, *_ = connection.recvmsg(4, socket.CMSG_LEN(3 * fds.itemsize))
    for _level, _kind, content in ancillary:
        fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    (length,) = struct.unpack("!I", data)
    body = b""
    while len(body) < length:
        body += connection.recv(length - len(body))
    return json.loads(body), list(fds)


def _enter_node(pid: int) -> None:
    """Make the namespaces of process `pid` those of this process, and its process table that of its children."""
    opened = [os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY) for name in ("net", "uts", "pid", "mnt")]
    for fd in opened:
        os.setns(fd)
        os.close(fd)


def _rank(request: dict[str, Any], fds: list[int]) -> None:
    """The life of a rank; never returns."""
    code = 1
    try:
        os.setsid()
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        code = _main(request["argv"])
    except BaseException:  # noqa: BLE001  the rank must never return into the server's code
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _main(argv: list[str]) -> int:
    from ra3_megatron.cli import main

    sys.argv = ["ra3", *argv]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def _serve_one(connection: socket.socket) -> None:
    """Fork the rank that is asked for and stay between it and whoever asked, until one of them ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request, fds = _receive(connection)
    peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _enter_node(struct.unpack("3i", peer)[0])
    pid = os.fork()
    if pid == 0:
        connection.close()
        _rank(request, fds)
    for fd in fds:
        os.close(fd)
    while True:
        ready, _, _ = select.select([connection], [], [], 0.02)
        if ready:
            try:
                data = connection.recv(1)
            except ConnectionError:
                data = b""
            with contextlib.suppress(ProcessLookupError):
                if data:
                    os.kill(pid, data[0])
                else:
                    # Whoever asked is dead, killed by Slurm.
                    os.killpg(pid, signal.SIGKILL)
            if not data:
                os.waitpid(pid, 0)
                return
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)  # what it left in its session, such as a checkpoint writer
            with contextlib.suppress(OSError):
                connection.sendall(struct.pack("!i", os.waitstatus_to_exitcode(status)))
            return


def serve(path: str) -> None:
    """Listen until the parent is gone."""
    import megatron.core.optimizer  # noqa: F401
    import scipy.stats  # noqa: F401

    from ra3_megatron import cli  # noqa: F401
    from ra3_megatron.report import run_report  # noqa: F401
    from ra3_megatron.stages import pipeline  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen(256)
        parent = os.getppid()
        while os.getppid() == parent:
            ready, _, _ = select.select([server], [], [], 1.0)
            if not ready:
                continue
            connection, _ = server.accept()
            if os.fork() == 0:
                code = 1
                try:
                    server.close()
                    _serve_one(connection)
                    code = 0
                except BaseException:  # noqa: BLE001  a child must never go on as a server
                    traceback.print_exc()
                os._exit(code)
            connection.close()


if __name__ == "__main__":
    serve(sys.argv[1])
