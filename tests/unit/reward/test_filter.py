"""The system call filters, run in a small interpreter of BPF: both machines, every call, arguments included."""

import errno
import platform
import struct

import pytest

from ra3_megatron.reward.guest import filter as calls

MACHINES = ("x86_64", "aarch64")
ALLOW, KILL = 0x7FFF0000, 0x80000000
DENY, ABSENT = 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS


def run(program: bytes, machine: str, number: int, *args: int, audit: int | None = None) -> int:
    """What the filter says of one call."""
    audit = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine] if audit is None else audit
    data = struct.pack("<IIQ6Q", number, audit, 0, *(args + (0,) * (6 - len(args))))
    lines = [struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8)]
    at = accumulator = 0
    while True:
        kind, yes, no, value = lines[at]
        at += 1
        if kind == 0x20:
            accumulator = struct.unpack_from("<I", data, value)[0]
        elif kind == 0x06:
            return value
        else:
            taken = {0x15: accumulator == value, 0x35: accumulator >= value, 0x45: bool(accumulator & value)}[kind]
            at += yes if taken else no


@pytest.mark.parametrize("machine", MACHINES)
def test_every_listed_call_is_refused(machine: str) -> None:
    """A jump too far by one let a call through."""
    column = MACHINES.index(machine)
    servers, gate = calls.for_servers(machine), calls.gate(77, machine)
    for name, numbers in calls.REFUSED.items():
        if numbers[column] >= 0:
            assert run(servers, machine, numbers[column]) == DENY, name
    for name, numbers in calls.GATE.items():
        assert run(servers, machine, numbers[column]) == ALLOW, name
        assert run(gate, machine, numbers[column]) == DENY, name


@pytest.mark.parametrize("machine", MACHINES)
def test_ordinary_calls_pass(machine: str) -> None:
    """read, write, mmap, futex and thread creation must work, or nothing runs."""
    column = MACHINES.index(machine)
    for numbers in ((0, 63), (1, 64), (9, 222), (202, 98), (231, 94), (318, 278), (3, 57), (53, 199)):
        for program in (calls.for_servers(machine), calls.gate(77, machine)):
            assert run(program, machine, numbers[column]) == ALLOW, numbers


@pytest.mark.parametrize("machine", MACHINES)
def test_arguments_decide(machine: str) -> None:
    """Threads yes, processes no; signals to itself only; the death signal cannot be switched off."""
    column = MACHINES.index(machine)
    servers, gate = calls.for_servers(machine), calls.gate(77, machine)
    clone, kill, tgkill = (56, 220)[column], (62, 129)[column], (234, 131)[column]
    assert run(gate, machine, clone, 0x3D0F00) == ALLOW  # what pthread_create asks for
    assert run(gate, machine, clone, 17) == DENY  # fork
    assert run(servers, machine, clone, 17) == ALLOW
    for call in (kill, tgkill):
        assert run(gate, machine, call, 77, 9) == ALLOW
        for other in (1, 76, 0, 0xFFFFFFFF):
            assert run(gate, machine, call, other, 9) == DENY
    prctl, fcntl, ioctl = (157, 167)[column], (72, 25)[column], (16, 29)[column]
    assert run(gate, machine, prctl, 1, 0) == DENY
    assert run(gate, machine, prctl, 15, 0) == ALLOW  # the name of a thread
    for command, says in ((3, ALLOW), (8, DENY), (10, DENY), (15, DENY), (1031, DENY), (1030, ALLOW)):
        assert run(servers, machine, fcntl, 5, command) == says
    for command, says in ((0x5401, ALLOW), (0x5412, DENY), (0x8901, DENY), (0x8902, DENY)):
        assert run(servers, machine, ioctl, 0, command) == says
    prlimit = (302, 261)[column]
    assert run(servers, machine, prlimit, 0) == ALLOW
    assert run(servers, machine, prlimit, 76) == DENY


@pytest.mark.parametrize("machine", MACHINES)
def test_unknown_calls_and_other_architectures(machine: str) -> None:
    """New calls, the 32-bit entry and x32 numbers went round the list."""
    servers = calls.for_servers(machine)
    assert run(servers, machine, 435) == ABSENT  # clone3
    assert run(servers, machine, 463) == ABSENT
    assert run(servers, machine, 0x7FFFFFFF) == ABSENT
    assert run(servers, machine, 1, audit=0x40000003) == KILL
    if machine == "x86_64":
        assert run(servers, machine, 0x40000000 | 41) == ABSENT
        assert run(calls.gate(77, machine), machine, 0x40000000 | 56, 17) == ABSENT


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers to compare with are those of x86_64")
def test_numbers_are_those_of_the_kernel_headers() -> None:
    """A number was copied wrongly and another call was refused in its place."""
    import re
    from pathlib import Path

    header = next(
        (
            p
            for p in map(Path, ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "/usr/include/asm/unistd_64.h"))
            if p.is_file()
        ),
        None,
    )
    if header is None:
        pytest.skip("the kernel headers are not installed")
    known = dict(re.findall(r"#define __NR_(\w+) (\d+)", header.read_text()))
    for name, (number, _) in (calls.REFUSED | calls.GATE).items():
        if number >= 0 and name in known:
            assert int(known[name]) == number, name
    generic = Path("/usr/include/asm-generic/unistd.h")
    if generic.is_file():
        names = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", generic.read_text()))
        for name, (_, number) in (calls.REFUSED | calls.GATE).items():
            if number >= 0 and name in names:
                assert int(names[name]) == number, name
