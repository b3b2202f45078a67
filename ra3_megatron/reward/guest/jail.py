"""Walls around the processes of a sandbox: user, Landlock, system call filter, limits.

A server builds them around itself once (`enter`), and what it forks is born inside; each such process then only
takes its limits and closes the gate behind itself (`close_gate`), which is what makes a fork cheap.
"""

import fcntl
import os
import resource
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from . import filter as calls
from . import kernel

FILE_BYTES = 16 << 20
"""Largest file that a program may write."""
OPEN_FILES = 64
THREADS = 64
STACK_BYTES = 64 << 20


@dataclass(frozen=True)
class Walls:
    """What the walls of a sandbox are made of; found out once, when it starts."""

    landlock: int
    """Landlock's ABI, 0 = not there."""
    seccomp: bool
    """Whether system calls are filtered."""
    uid: int | None
    """User id that programs get; none = that of the sandbox's starter."""
    own_user: bool
    """Whether nobody else's threads count against the user id (own id, or own user namespace)."""
    readable: tuple[str, ...]
    """Folders and files that may be read."""
    devices: tuple[str, ...]
    """Device files that may be read and written."""


def find_walls(
    uid: int | None, own_user: bool, readable: Sequence[str], devices: Sequence[str]
) -> tuple[Walls, list[str]]:
    """What this machine offers for walls, and what is missing, in words."""
    missing = []
    landlock = kernel.landlock_abi() if kernel.SUPPORTED else 0
    seccomp = kernel.SUPPORTED and _filter_works()
    if not seccomp:
        missing.append("seccomp: the kernel, or this machine's architecture, has no filter that works here")
    if not landlock:
        missing.append("Landlock: the kernel does not offer it, or something around this process forbids it")
    return Walls(landlock, seccomp, uid, own_user, tuple(readable), tuple(devices)), missing


def _filter_works() -> bool:
    """Whether a child can load the filters and still lives."""
    pid = os.fork()
    if pid == 0:
        try:
            kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1, "no_new_privs")
            kernel.load_filter(calls.for_servers())
            kernel.load_filter(calls.gate(os.getpid()))
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def enter(walls: Walls, uid: int | None, folder: str) -> None:
    """Shut this server in for good, as the user `uid`, with `folder` as the only one to write to and to work in.

    Raises:
        OSError: a wall could not be built; the caller must end the process.
    """
    parent = os.getppid()
    os.chdir(folder)
    for what, value in (
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_STACK, STACK_BYTES),
        (resource.RLIMIT_MSGQUEUE, 0),
        *([(resource.RLIMIT_NPROC, THREADS)] if walls.own_user else []),
    ):
        _limit(what, value, value)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    elif kernel.SUPPORTED and os.getuid() != 0:
        kernel.drop_capabilities()  # those of an own user namespace
    # A change of user forgets the first and the second of these.
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL, "parent death signal")
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0, "dumpable")
    if os.getppid() != parent:
        os._exit(1)
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1, "no_new_privs")
    if walls.landlock:
        kernel.landlock(walls.landlock, walls.readable, walls.devices, folder)
    if walls.seccomp:
        kernel.load_filter(calls.for_servers())
        calls.gate(0)  # assembled here, once, and not in every child


def close_gate(walls: Walls, cpu_s: float, memory_mb: int, parent: int) -> None:
    """The last step of a process that a server has forked: its limits, and no way to others any more.

    Raises:
        OSError: as for `enter`.
    """
    os.setpgid(0, 0)
    whole = int(cpu_s) + 2  # the second line: the supervisor ends it earlier, in fractions of a second
    _limit(resource.RLIMIT_CPU, whole, whole + 1)
    _limit(resource.RLIMIT_AS, memory_mb << 20, memory_mb << 20)
    _limit(resource.RLIMIT_FSIZE, FILE_BYTES, FILE_BYTES)
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL, "parent death signal")
    if os.getppid() != parent:
        os._exit(1)
    if walls.seccomp:
        kernel.load_filter(calls.gate(os.getpid()))


def _limit(what: int, soft: int, hard: int) -> None:
    ceiling = resource.getrlimit(what)[1]
    if ceiling != resource.RLIM_INFINITY:
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(what, (soft, hard))


def take(fds: Sequence[int]) -> None:
    """Make `fds` this process's descriptors 0, 1, 2, ... and close all others."""
    spare = [fcntl.fcntl(fd, fcntl.F_DUPFD, len(fds)) for fd in fds]
    for target, fd in enumerate(spare):
        os.dup2(fd, target)
    os.closerange(len(fds), OPEN_FILES)
