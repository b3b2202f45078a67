"""Start ranks as real processes and get their results: `run_ranks("module:function", 2, {...}, 120, tmp_path)`.

The function takes the arguments as keywords and returns plain data (JSON). It finds torchrun's variables in its
environment. The store is served by the caller's process, so there is no port to guess and it outlives rank 0.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class RankResult:
    """How one rank ended."""

    rank: int
    """Global rank."""
    code: int | None
    """Exit code; negative for a signal, None when it was killed at the deadline."""
    value: Any
    """What the function returned; None when it did not return."""
    error: str
    """Traceback of the exception it raised, empty if none."""
    log: str
    """Its stdout and stderr."""


def _environment(rank: int, world: int, port: int) -> dict[str, str]:
    env = dict(os.environ)
    env |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])]),
    }  # fmt: skip
    return env


def _start(target: str, rank: int, world: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    with open(folder / f"rank{rank}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__)), target, str(folder), str(rank)],
            env=_environment(rank, world, port),
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a rank with everything it started: its session is its process group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)


def start_and_wait(
    target: str, world_size: int, args: dict[str, Any] | None, timeout: float, tmp_path: Path
) -> list[RankResult]:
    """Run `target` on `world_size` ranks and say how each ended; nothing survives the call. Never raises for a rank."""
    import torch.distributed as dist

    folder = Path(tmp_path) / f"ranks-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps(args or {}))
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    processes = [_start(target, r, world_size, store.port, folder) for r in range(world_size)]
    end = time.monotonic() + timeout
    late: set[int] = set()
    try:
        for rank, process in enumerate(processes):
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                late.add(rank)
    finally:
        for process in processes:
            _kill(process)
    results = []
    for rank, process in enumerate(processes):
        value, error = None, ""
        out, bad = folder / f"rank{rank}.json", folder / f"rank{rank}.error"
        if out.exists():
            value = json.loads(out.read_text())
        if bad.exists():
            error = bad.read_text()
        log = (folder / f"rank{rank}.log").read_text(errors="replace")
        results.append(RankResult(rank, None if rank in late else process.returncode, value, error, log))
    return results


def run_ranks(
    target: str, world_size: int, args: dict[str, Any] | None = None, timeout: float = 180, tmp_path: Path | None = None
) -> list[Any]:
    """Run `module:function` on `world_size` ranks and return what each returned, in rank order.

    At `timeout` seconds, or when all have ended, every rank's whole process group is killed. Fails with the traceback
    and the last output of each rank that raised, crashed or was late.
    """
    assert tmp_path is not None, "pass pytest's tmp_path"
    results = start_and_wait(target, world_size, args, timeout, tmp_path)
    failed = [r for r in results if r.code != 0]
    if failed:
        parts = []
        for r in failed:
            how = f"still ran after {timeout:.0f} s" if r.code is None else f"exit code {r.code}"
            parts.append(f"--- rank {r.rank}: {how} ---\n{r.error or r.log[-3000:]}")
        raise AssertionError(f"{len(failed)} of {world_size} ranks failed in {target}\n" + "\n".join(parts))
    return [r.value for r in results]


def hang(seconds: float) -> None:
    """Sleep; what the launcher's own test waits for in vain."""
    time.sleep(seconds)


def _main() -> int:
    target, folder, rank = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    module, function = target.split(":")
    try:
        args = json.loads((folder / "args.json").read_text())
        value = getattr(importlib.import_module(module), function)(**args)
        text = json.dumps(value)
    except Exception:  # noqa: BLE001  whatever a rank raises is its result
        (folder / f"rank{rank}.error").write_text(traceback.format_exc())
        traceback.print_exc()
        return 1
    (folder / f"rank{rank}.json").write_text(text)
    return 0


if __name__ == "__main__":
    # Run as a script, python puts this folder first on the path; modules are named from the project's root.
    sys.path[0] = str(ROOT)
    sys.exit(_main())
