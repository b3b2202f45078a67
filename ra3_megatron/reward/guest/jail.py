"""Walls around one process that has just been forked: limits, user, Landlock, system call filter."""

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
class Jail:
    """What the walls of a worker are made of; found out once, when it starts."""

    landlock: int
    """Landlock's ABI, 0 = not there."""
    seccomp: bool
    """Whether system calls are filtered."""
    uid: int | None
    """User id that programs get; none = that of the worker."""
    read: tuple[int, ...]
    """Descriptors of the folders and files that may be read."""
    devices: tuple[int, ...]
    """Descriptors of the device files that may be read and written."""
    own_user: bool
    """Whether nobody else's threads count against the user id (own id, or own user namespace)."""


def find_walls(
    uid: int | None, own_user: bool, readable: Sequence[str], devices: Sequence[str]
) -> tuple[Jail, list[str]]:
    """What this machine offers for a jail, and what is missing, in words."""
    missing = []
    landlock = kernel.landlock_abi() if kernel.SUPPORTED else 0
    seccomp = kernel.SUPPORTED and _filter_works()
    if not seccomp:
        missing.append("seccomp: the kernel, or this machine's architecture, has no filter that works here")
    if not landlock:
        missing.append("Landlock: the kernel does not offer it, or something around this process forbids it")
    read = tuple(_open_path(path) for path in readable if os.path.exists(path)) if landlock else ()
    files = tuple(_open_path(path) for path in devices if os.path.exists(path)) if landlock else ()
    return Jail(landlock, seccomp, uid, read, files, own_user), missing


def _open_path(path: str) -> int:
    """A descriptor that stands for `path`, above those that a program is given."""
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 16)
    finally:
        os.close(fd)


def _filter_works() -> bool:
    """Whether a child can load the filter and still lives."""
    pid = os.fork()
    if pid == 0:
        try:
            kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1, "no_new_privs")
            kernel.load_filter(calls.assemble(os.getpid()))
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def enter(jail: Jail, folder: str | None, cpu_s: float, memory_mb: int, parent: int) -> None:
    """Shut this process in for good; `folder` becomes its working folder and the only one it may write to.

    Raises:
        OSError: a wall could not be built; the caller must end the process.
    """
    os.setpgid(0, 0)
    own = None
    if folder is not None:
        os.chdir(folder)
        own = os.open(folder, os.O_PATH)
    _limits(cpu_s, memory_mb, jail.own_user)
    if jail.uid is not None:
        os.setgroups([])
        os.setresgid(jail.uid, jail.uid, jail.uid)
        os.setresuid(jail.uid, jail.uid, jail.uid)
    elif kernel.SUPPORTED:
        kernel.drop_capabilities()  # those of an own user namespace
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL, "parent death signal")
    if os.getppid() != parent:
        os._exit(1)
    kernel.prctl(kernel.PR_SET_DUMPABLE, 0, "dumpable")
    kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1, "no_new_privs")
    if jail.landlock:
        kernel.landlock(jail.landlock, jail.read, jail.devices, own)
    if own is not None:
        os.close(own)
    for fd in (*jail.read, *jail.devices):
        os.close(fd)
    if jail.seccomp:
        kernel.load_filter(calls.assemble(os.getpid()))


def _limits(cpu_s: float, memory_mb: int, own_user: bool) -> None:
    whole = int(cpu_s) + 2  # the second line: the supervisor ends it earlier, in fractions of a second
    for what, soft, hard in (
        (resource.RLIMIT_CPU, whole, whole + 1),
        (resource.RLIMIT_AS, memory_mb << 20, memory_mb << 20),
        (resource.RLIMIT_FSIZE, FILE_BYTES, FILE_BYTES),
        (resource.RLIMIT_NOFILE, OPEN_FILES, OPEN_FILES),
        (resource.RLIMIT_CORE, 0, 0),
        (resource.RLIMIT_MEMLOCK, 0, 0),
        (resource.RLIMIT_STACK, STACK_BYTES, STACK_BYTES),
        (resource.RLIMIT_MSGQUEUE, 0, 0),
        *([(resource.RLIMIT_NPROC, THREADS, THREADS)] if own_user else []),
    ):
        ceiling = resource.getrlimit(what)[1]
        if ceiling != resource.RLIM_INFINITY:
            soft, hard = min(soft, ceiling), min(hard, ceiling)
        resource.setrlimit(what, (soft, hard))
