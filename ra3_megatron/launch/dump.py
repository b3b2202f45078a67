"""Stacks of this node's processes of an attempt: `python -m ra3_megatron.launch.dump ATTEMPT_FOLDER`.

Every process that trains has left its number in the folder. Python's own handler (SIGUSR2) writes the stacks into the
node's log, also when the process is stuck in native code; py-spy, where it is installed, says the same with native
frames and whoever holds the interpreter's lock.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from ra3_megatron.config.control import RANKS_FOLDER


def own_processes(attempt: Path) -> dict[int, int]:
    """Rank and process number of what runs here."""
    found = {}
    for path in sorted((attempt / RANKS_FOLDER).iterdir()):
        host, _, pid = path.read_text(encoding="utf-8").partition(" ")
        if host == socket.gethostname() and Path("/proc", pid).exists():
            found[int(path.name)] = int(pid)
    return found


def dump(attempt: Path) -> None:
    """Write `stacks-<rank>.txt` for every rank of this node, and have each write its own into the log."""
    spy = shutil.which("py-spy") or _beside_python("py-spy")
    for rank, pid in own_processes(attempt).items():
        os.kill(pid, signal.SIGUSR2)
        if spy is None:
            continue
        done = subprocess.run(
            [spy, "dump", "--pid", str(pid)], capture_output=True, text=True, timeout=30, check=False
        )  # fmt: skip
        (attempt / f"stacks-{rank}.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
        print(f"rank {rank}, process {pid}: py-spy {'dumped' if done.returncode == 0 else done.stderr.strip()}")


def _beside_python(name: str) -> str | None:
    """A program of the same environment, which need not be on PATH."""
    path = Path(sys.executable).with_name(name)
    return str(path) if path.exists() else None


if __name__ == "__main__":
    dump(Path(sys.argv[1]))
