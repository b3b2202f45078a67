"""Many runs for the price of one import: a process that has everything in memory forks one child per rank.

`with ForkServer(folder) as server: server.cli(["midtrain", ...])` behaves like `python -m ra3_megatron midtrain ...`:
same `main`, same exit code, own standard output and error. `server.call("module:function", {...}, world=2)` runs a
function on each rank of a gloo world and returns what each returned.
"""

import contextlib
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ended:
    """How one rank ended."""

    code: int
    """Exit code; negative for a signal."""
    out: str
    """Standard output."""
    err: str
    """Standard error."""
    value: Any
    """What a called function returned."""
    seconds: float
    """Wall time of the whole job."""


class ForkServer:
    """The parent process, started on entry and ended, with all its children, on exit."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0

    def __enter__(self) -> "ForkServer":
        self.folder.mkdir(parents=True, exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._log = open(self.folder / "server.log", "wb")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.forked"],
            cwd=ROOT,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._log.close()

    def _job(self, job: dict[str, Any]) -> list[Ended]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._count += 1
        folder = self.folder / f"job{self._count:03d}"
        folder.mkdir()
        self._process.stdin.write(json.dumps({**job, "folder": str(folder)}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the fork server died: {(self.folder / 'server.log').read_text()[-3000:]}"
        answer = json.loads(line)
        ended = []
        for rank, code in enumerate(answer["codes"]):
            value = folder / f"{rank}.json"
            ended.append(
                Ended(
                    code,
                    (folder / f"{rank}.out").read_text(errors="replace"),
                    (folder / f"{rank}.err").read_text(errors="replace"),
                    json.loads(value.read_text()) if value.exists() else None,
                    answer["seconds"],
                )
            )
        return ended

    def cli(
        self,
        args: list[str],
        *,
        world: int = 1,
        timeout: float = 120,
        kill_when: tuple[Path, str] | None = None,
        killed: list[int] | None = None,
        variables: dict[str, str] | None = None,
    ) -> list[Ended]:
        """`ra3 ARGS` on `world` ranks. `kill_when` = (folder, glob): SIGKILL to all, or to the ranks `killed` alone, as
        soon as a path matches.

        `variables` are added to the environment.
        """
        when = None if kill_when is None else [str(kill_when[0]), kill_when[1]]
        return self._job(
            {
                "args": args,
                "world": world,
                "timeout": timeout,
                "kill_when": when,
                "killed": killed,
                "variables": variables or {},
            }
        )

    def call(self, target: str, arguments: dict[str, Any], *, world: int = 1, timeout: float = 120) -> list[Any]:
        """What `module:function`, given `arguments` as keywords, returned on each rank; fails if one raised."""
        ended = self._job(
            {"target": target, "arguments": arguments, "world": world, "timeout": timeout, "kill_when": None}
        )
        for rank, e in enumerate(ended):
            assert e.code == 0, f"rank {rank} ended with {e.code}: {e.err[-3000:]}"
        return [e.value for e in ended]


# ------------------------------------------------------------------------------------------------- the other process


def _place(rank: int, world: int, port: int) -> dict[str, str]:
    if world == 1:
        return {}
    return {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def _work(job: dict[str, Any], rank: int) -> int:
    """What a child does; returns its exit code."""
    if "target" in job:
        module, function = job["target"].split(":")
        value = getattr(importlib.import_module(module), function)(**job["arguments"])
        (Path(job["folder"]) / f"{rank}.json").write_text(json.dumps(value))
        return 0
    from ra3_megatron.cli import main

    sys.argv = ["ra3", *job["args"]]
    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def _child(job: dict[str, Any], rank: int, port: int) -> None:
    """The life of a forked child; never returns."""
    code = 1
    try:
        os.setsid()
        os.environ.update(_place(rank, job["world"], port) | job.get("variables", {}))
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{job['folder']}/{rank}.{name}", os.O_WRONLY | os.O_CREAT, 0o644), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code = _work(job, rank)
    except BaseException:  # noqa: BLE001  the child must never return into the parent's code
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _run(job: dict[str, Any]) -> list[int]:
    port, pids = _free_port() if job["world"] > 1 else 0, []
    for rank in range(job["world"]):
        pid = os.fork()
        if pid == 0:
            _child(job, rank, port)
        pids.append(pid)
    codes: dict[int, int] = {}
    end = time.monotonic() + job["timeout"]
    while len(codes) < len(pids):
        for pid in pids:
            if pid in codes:
                continue
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[pid] = os.waitstatus_to_exitcode(status)
        wanted = job["kill_when"]
        late = time.monotonic() > end
        if late or (wanted and next(Path(wanted[0]).glob(wanted[1]), None) is not None):
            for rank, pid in enumerate(pids):
                if pid not in codes and (late or job.get("killed") is None or rank in job["killed"]):
                    _kill(pid)
        time.sleep(0.003)
    for pid in pids:
        _kill(pid)  # what a child left in its session, such as a checkpoint writer
    return [codes[pid] for pid in pids]


def _serve() -> None:
    # Imported here so that every child starts with them in memory.
    import megatron.core.optimizer  # noqa: F401
    import scipy.stats  # noqa: F401

    from ra3_megatron.report import run_report  # noqa: F401
    from ra3_megatron.stages import dry_run, pipeline  # noqa: F401

    for line in sys.stdin:
        start = time.monotonic()
        codes = _run(json.loads(line))
        print(json.dumps({"codes": codes, "seconds": time.monotonic() - start}), flush=True)


if __name__ == "__main__":
    _serve()
