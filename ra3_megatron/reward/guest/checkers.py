"""What a checker program, run in a trusted process, says of an output."""

import os
import select
import signal
import time

from .supervise import Meter


def hear(pid: int, read: int, meter: Meter, wall_s: float) -> tuple[str, int | None]:
    """What the checker printed, and its exit status; none = it was ended."""
    poll = select.poll()
    poll.register(read, select.POLLIN)
    until = time.monotonic() + wall_s
    said = b""
    while meter.used() < meter.limit and time.monotonic() < until and len(said) < 1 << 16:
        if poll.poll(100):
            part = os.read(read, 4096)
            if not part:
                return said.decode("utf-8", "replace"), os.waitpid(pid, 0)[1]
            said += part
    end(pid)
    return "", None


def end(pid: int) -> None:
    """Kill a trusted process and take its status."""
    os.kill(pid, signal.SIGKILL)  # ours and not reaped yet, so the number cannot be another's
    os.waitpid(pid, 0)


def accepts(said: str, status: int) -> bool:
    """Codeforces' checkers: `1`, `ok` or a positive number first accepts; silent ones accept by ending with 0."""
    words = said.split()
    if not words:
        return status == 0
    if words[0].lower() == "ok":
        return True
    try:
        return float(words[0]) > 0
    except ValueError:
        return False
