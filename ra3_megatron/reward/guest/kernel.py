"""System calls that Python does not offer, by ctypes: seccomp, Landlock, namespaces, mounts, capabilities."""

import ctypes
import os
import platform
import struct
from collections.abc import Sequence

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_NOATIME = 1, 2, 4, 8, 32, 1024
MS_NODIRATIME, MS_BIND, MS_REC, MS_PRIVATE, MS_RELATIME = 2048, 4096, 16384, 1 << 18, 1 << 21
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
SECCOMP_MODE_FILTER = 2

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
SUPPORTED = platform.machine() in ("x86_64", "aarch64")
"""Machines whose system call numbers are known here."""
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(platform.machine(), -1)
_CAPSET = {"x86_64": 126, "aarch64": 91}.get(platform.machine(), -1)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def _syscall(what: str, number: int, *args: object) -> int:
    return _check(_libc.syscall(ctypes.c_long(number), *args), what)


def prctl(option: int, value: int, what: str) -> None:
    """prctl with one number."""
    zero = ctypes.c_ulong(0)
    _check(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), what)


def unshare(flags: int) -> None:
    """Leave the namespaces of `flags` for new ones."""
    _check(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    """Mount, bind or remount."""
    result = _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _check(result, f"mount {target}")


def pivot_root(new: str) -> None:
    """Make `new`, a mount point, the root and drop the old one."""
    os.chdir(new)
    _syscall("pivot_root", _PIVOT_ROOT, b".", b".")
    _check(_libc.umount2(b".", MNT_DETACH), "umount2")
    os.chdir("/")


def drop_capabilities() -> None:
    """Give up every capability, of this user namespace too."""
    header = struct.pack("<Ii", 0x20080522, 0)
    _syscall("capset", _CAPSET, header, b"\0" * 24)


def clock_of(pid: int) -> int:
    """Clock id of the processor time of all threads of `pid`, for `time.clock_gettime`."""
    return (~pid << 3) | 2


def load_filter(program: bytes) -> None:
    """Load a seccomp filter (assembled by `filter.assemble`); needs no privilege once no new ones can be had."""
    code = ctypes.create_string_buffer(program, len(program))
    pointer = ctypes.create_string_buffer(struct.pack("@HxxxxxxQ", len(program) // 8, ctypes.addressof(code)))
    result = _libc.prctl(
        PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)
    )
    _check(result, "seccomp filter")


# Landlock rights (linux/landlock.h).
_READ_FILE, _READ_DIR, _WRITE_FILE, _TRUNCATE = 1 << 2, 1 << 3, 1 << 1, 1 << 14
_REMOVE = 1 << 4 | 1 << 5
_MAKE = 1 << 7 | 1 << 8 | 1 << 12
_REFER = 1 << 13


def landlock_abi() -> int:
    """Version of Landlock that the kernel offers; 0 = none."""
    result = _libc.syscall(ctypes.c_long(LANDLOCK_CREATE), None, ctypes.c_size_t(0), ctypes.c_uint(1))
    return max(0, result)


def landlock(abi: int, readable: Sequence[str], devices: Sequence[str], own: str) -> None:
    """Restrict this process for ever: reading below the paths `readable`, files `devices`, all in the folder `own`.

    From ABI 4 on no TCP either, from ABI 6 on no abstract sockets of others.
    """
    handled = (1 << 13) - 1
    for version, right in ((2, _REFER), (3, _TRUNCATE), (5, 1 << 15)):
        handled |= right if abi >= version else 0
    # Signals are not scoped (bit 1): a server must be able to end what it has forked; the gate sees to them.
    size = 24 if abi >= 6 else 16 if abi >= 4 else 8
    attributes = struct.pack("<QQQ", handled, 3, 1)[:size]
    rules = _syscall("landlock", LANDLOCK_CREATE, attributes, ctypes.c_size_t(size), ctypes.c_uint(0))
    try:
        for path in readable:
            _allow(rules, path, _READ_FILE | _READ_DIR)
        for path in devices:
            _allow(rules, path, _READ_FILE | _WRITE_FILE)
        everything = _READ_FILE | _READ_DIR | _WRITE_FILE | _REMOVE | _MAKE | _REFER | _TRUNCATE
        _allow(rules, own, everything & handled)
        _syscall("landlock", LANDLOCK_RESTRICT, ctypes.c_int(rules), ctypes.c_uint(0))
    finally:
        os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    if not os.path.isdir(path):
        rights &= ~_READ_DIR
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        rule = struct.pack("<Qi", rights, fd)
        _syscall("landlock rule", LANDLOCK_ADD, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint(0))
    finally:
        os.close(fd)
