"""The system call filters of a sandbox, assembled here as classic BPF: no library is needed at run time.

Two layers: one for the servers of a sandbox, inherited by every process they fork, and a short one, the gate, that
such a process closes behind itself before it runs anything, and that takes away what only servers need.

Calls are refused with EPERM, so that a program sees an ordinary exception. Refused: the network, other processes
(looking at, signalling, making them), new programs, namespaces and mounts, kernel interfaces with a history of holes,
objects that outlive a process (System V IPC, message queues), memory that no limit counts (memfd). Unknown, newer
calls do not exist (ENOSYS), so nothing slips in with a new kernel.
"""

import errno
import platform
import struct
import sys

_LOAD, _JUMP_EQ, _JUMP_GE, _JUMP_SET, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NR, _ARCH = 0, 4
_ARG = (16, 24)
"""Offsets of the low halves of the first two arguments."""
_AUDIT = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
_LAST_KNOWN = 462
_CLONE_THREAD = 0x10000

# Numbers on x86_64 and on aarch64; -1 where a machine has no such call.
REFUSED = {
    # network; recvfrom and sendto stay, for asyncio's own pair of sockets
    "socket": (41, 198),
    "connect": (42, 203),
    "accept": (43, 202),
    "accept4": (288, 242),
    "bind": (49, 200),
    "listen": (50, 201),
    "sendmmsg": (307, 269),
    "recvmmsg": (299, 243),
    # other processes
    "fork": (57, -1),
    "vfork": (58, -1),
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "setsid": (112, 157),
    "setpriority": (141, 140),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # namespaces, mounts, the machine
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "statmount": (457, 457),
    "listmount": (458, 458),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "syslog": (103, 116),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "iopl": (172, -1),
    "ioperm": (173, -1),
    "modify_ldt": (154, -1),
    "personality": (135, 92),
    "vhangup": (153, 58),
    # attributes of a folder that is used again would tell the next program something
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    # kernel interfaces with a history
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_setup": (206, 0),
    "io_submit": (209, 2),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
    "inotify_init": (253, -1),
    "inotify_init1": (294, 26),
    "lookup_dcookie": (212, 18),
    "seccomp": (317, 277),
    # what outlives a process or is counted by no limit
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_secret": (447, 447),
}
"""Refused to all, whatever the arguments."""
GATE = {"sendmsg": (46, 211), "recvmsg": (47, 212), "setpgid": (109, 154), "memfd_create": (319, 279)}
"""Refused to what a server has forked."""
_CLONE, _CLONE3 = (56, 220), (435, 435)
_KILL_CALL, _TGKILL, _PRLIMIT, _AFFINITY = (62, 129), (234, 131), (302, 261), (203, 122)
_PRCTL, _FCNTL, _IOCTL = (157, 167), (72, 25), (16, 29)
_PDEATHSIG = 1
_OWNERS = (8, 10, 15, 1031)
"""fcntl: F_SETOWN, F_SETSIG, F_SETOWN_EX send signals to others; F_SETPIPE_SZ takes kernel memory."""
_IOCTLS = (0x8901, 0x8902, 0x5412)
"""FIOSETOWN and SIOCSPGRP as above; TIOCSTI types into a terminal."""
_OWN_PID = 0x7A7A7A7A
"""Stands for the process's own number in the gate that is made once."""

_Line = tuple[int, int, str | int, str | int]


class _Assembler:
    """Instructions with jumps to named ends; a jump that is not taken goes on with the next line."""

    def __init__(self, machine: str) -> None:
        self._column = {"x86_64": 0, "aarch64": 1}[machine]
        self._lines: list[_Line] = [(_LOAD, _ARCH, 0, 0), (_JUMP_EQ, _AUDIT[machine], 0, "kill"), (_LOAD, _NR, 0, 0)]
        if machine == "x86_64":
            self._lines.append((_JUMP_GE, _X32, "absent", 0))

    def at_least(self, number: int, end: str) -> None:
        """Decide all calls from `number` on."""
        self._lines.append((_JUMP_GE, number, end, 0))

    def calls(self, numbers: tuple[int, int], end: str) -> None:
        """Decide a call whatever its arguments."""
        if numbers[self._column] >= 0:
            self._lines.append((_JUMP_EQ, numbers[self._column], end, 0))

    def argument(self, numbers: tuple[int, int], index: int, tests: list[_Line]) -> None:
        """Decide a call by an argument; the last test must jump either way, since the number is loaded no more."""
        self._lines += [(_JUMP_EQ, numbers[self._column], 0, len(tests) + 1), (_LOAD, _ARG[index], 0, 0), *tests]

    def finish(self) -> bytes:
        """The code; what nothing has decided is allowed."""
        lines = [*self._lines, (_JUMP_GE, 0, "allow", "allow")]
        ends = {"allow": _ALLOW, "deny": _ERRNO | errno.EPERM, "absent": _ERRNO | errno.ENOSYS, "kill": _KILL}
        place = {name: len(lines) + index for index, name in enumerate(ends)}
        code = bytearray()
        for index, (kind, value, yes, no) in enumerate(lines):
            # An end is up to 255 lines away, which the number of calls allows; struct refuses more.
            jumps = [place[j] - index - 1 if isinstance(j, str) else j for j in (yes, no)]
            code += struct.pack("=HBBI", kind, *jumps, value)
        for value in ends.values():
            code += struct.pack("=HBBI", _RETURN, 0, 0, value)
        return bytes(code)


def _only(values: tuple[int, ...], found: str, other: str) -> list[_Line]:
    return [(_JUMP_EQ, v, found, other if v == values[-1] else 0) for v in values]


def for_servers(machine: str = platform.machine()) -> bytes:
    """The filter of a sandbox's servers and all that they fork."""
    asm = _Assembler(machine)
    asm.at_least(_LAST_KNOWN + 1, "absent")
    asm.calls(_CLONE3, "absent")  # its flags cannot be read here; libc then falls back to clone
    for numbers in REFUSED.values():
        asm.calls(numbers, "deny")
    for call in (_PRLIMIT, _AFFINITY):
        asm.argument(call, 0, _only((0,), "allow", "deny"))
    asm.argument(_FCNTL, 1, _only(_OWNERS, "deny", "allow"))
    asm.argument(_IOCTL, 1, _only(_IOCTLS, "deny", "allow"))
    return asm.finish()


def _gate(machine: str) -> bytes:
    asm = _Assembler(machine)
    for numbers in GATE.values():
        asm.calls(numbers, "deny")
    asm.argument(_CLONE, 0, [(_JUMP_SET, _CLONE_THREAD, "allow", "deny")])
    for call in (_KILL_CALL, _TGKILL):
        asm.argument(call, 0, _only((_OWN_PID,), "allow", "deny"))
    asm.argument(_PRCTL, 0, _only((_PDEATHSIG,), "deny", "allow"))
    return asm.finish()


_GATES: dict[str, bytes] = {}


def gate(pid: int, machine: str = platform.machine()) -> bytes:
    """The filter of the process `pid`, which may make threads but no processes, and signal itself only."""
    if machine not in _GATES:
        _GATES[machine] = _gate(machine)
    return _GATES[machine].replace(_OWN_PID.to_bytes(4, sys.byteorder), pid.to_bytes(4, sys.byteorder))
