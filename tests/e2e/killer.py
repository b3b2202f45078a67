"""Kill a run at random moments until it is done: `python -m tests.e2e.killer FOLDER CONFIG KILLS SEED`.

With KILLS = `stages` it is killed twice in every stage, at its first file and at half of its files.
Everything heavy is imported once; each attempt is a forked process in a session of its own, so that twenty attempts
cost seconds of start-up and not minutes. Prints one JSON line: how often it was killed, how often during a save, and
in which stages.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

# Imported here so that every attempt starts with them in memory.
import megatron.core.optimizer  # noqa: F401

from ra3_megatron.config.run import load_config
from ra3_megatron.stages import pipeline

DEADLINE_S = 300.0


def attempt(config_path: str, run_dir: Path, log: Path) -> int:
    """Start the run in a child; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        pipeline.run(load_config(config_path, [f"run.dir={run_dir}"]))
        sys.stdout.flush()
        os._exit(0)
    except BaseException:  # noqa: BLE001  the child must never return into the parent's code
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def ended(pid: int) -> int | None:
    """Exit code of a child that has ended, else None."""
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def kill(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        # Killed so early that it has no session of its own yet; without this it would live on and finish the run.
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def saving(run_dir: Path) -> bool:
    return any(run_dir.glob("*/checkpoints/*.partial"))


def run_to_the_end(config_path: str, run_dir: Path, log: Path) -> float:
    start = time.monotonic()
    pid = attempt(config_path, run_dir, log)
    while (code := ended(pid)) is None:
        if time.monotonic() - start > DEADLINE_S:
            kill(pid)
            raise SystemExit(f"run did not end in {DEADLINE_S} s: {log.read_text()[-3000:]}")
        time.sleep(0.02)
    if code != 0:
        raise SystemExit(f"run failed with {code}: {log.read_text()[-3000:]}")
    return time.monotonic() - start


def last_step(run_dir: Path) -> int:
    """Step of the newest metrics record; -1 before the first."""
    lines = [line for path in run_dir.glob("*/metrics.jsonl") for line in path.read_bytes().splitlines(keepends=True)]
    whole = [line for line in lines if line.endswith(b"\n")]
    return json.loads(whole[-1])["step"] if whole else -1


def saved_step(run_dir: Path) -> int:
    """Step of the newest finished checkpoint; 0 before the first. (`step_N.partial` may hold a DONE already.)"""
    names = [path.parent.name.removeprefix("step_") for path in run_dir.glob("*/checkpoints/step_*/DONE")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def moment(run_dir: Path, chance: random.Random) -> Callable[[float], bool]:
    """When the coming attempt is killed: after a while, as soon as a save is under way, or some steps on.

    Events and not times, so that the test does the same on a slow machine. The function is given the seconds since the
    attempt started.
    """
    kind = chance.choice(("early", "save", "save", "steps"))
    if kind == "early":
        seconds = chance.uniform(0.0, 0.3)
        return lambda passed: passed > seconds
    if kind == "save":
        latest = saved_step(run_dir) + 4  # a short save can be missed
        return lambda _: saving(run_dir) or last_step(run_dir) >= latest
    wanted = saved_step(run_dir) + chance.randint(1, 3)
    return lambda _: last_step(run_dir) >= wanted


def files(folder: Path) -> int:
    """Files a stage has written so far, accounts of its attempts left out."""
    return sum(1 for p in folder.rglob("*") if p.is_file() and "logs" not in p.relative_to(folder).parts)


def in_stage(run_dir: Path, whole: Path, name: str, share: float, chance: random.Random) -> Callable[[float], bool]:
    """A moment inside of one stage: when it has written that share of the files it leaves, and a little later."""
    least = max(1, int(share * files(whole / name)))
    wait, begun = chance.uniform(0.0, 0.1), []

    def due(_: float) -> bool:
        if not begun and ((run_dir / name / "DONE").exists() or files(run_dir / name) >= least):
            begun.append(time.monotonic())
        return bool(begun) and time.monotonic() - begun[0] > wait

    return due


def run_with_kills(
    config_path: str,
    run_dir: Path,
    log: Path,
    moments: list[Callable[[], Callable[[float], bool]]],
    chance: random.Random,
) -> dict[str, Any]:
    """As many attempts that are killed as there are `moments`, then one that is not."""
    killed = in_save = 0
    where: list[str] = []
    for make in moments:
        start, due = time.monotonic(), make()
        pid, code = attempt(config_path, run_dir, log), None
        try:
            while (code := ended(pid)) is None and not due(time.monotonic() - start):
                if time.monotonic() - start > DEADLINE_S:
                    raise SystemExit(f"attempt made no progress in {DEADLINE_S} s: {log.read_text()[-3000:]}")
                time.sleep(0.002)
            if code is None:
                time.sleep(chance.uniform(0.0, 0.02))
                in_save += saving(run_dir)
                where += [p.name for p in sorted(run_dir.glob("*-*")) if p.is_dir() and not (p / "DONE").exists()][:1]
        finally:
            # Whatever went wrong here, no attempt may live on by itself.
            if code is None:
                kill(pid)
        if code == 0:
            return {"killed": killed, "in_save": in_save, "stages": where}
        if code is not None:
            raise SystemExit(f"attempt failed by itself with {code}: {log.read_text()[-3000:]}")
        killed += 1
    run_to_the_end(config_path, run_dir, log)
    return {"killed": killed, "in_save": in_save, "stages": where}


def main() -> None:
    folder, config_path, kills, chance = Path(sys.argv[1]), sys.argv[2], sys.argv[3], random.Random(int(sys.argv[4]))
    whole = run_to_the_end(config_path, folder / "whole", folder / "whole.log")
    run_dir = folder / "killed"
    if kills == "stages":
        stages = sorted(p.parent.name for p in (folder / "whole").glob("*/DONE") if files(p.parent) > 3)
        moments = [
            partial(in_stage, run_dir, folder / "whole", name, share, chance) for name in stages for share in (0.0, 0.5)
        ]
    else:
        moments = [partial(moment, run_dir, chance)] * int(kills)
    counts = run_with_kills(config_path, run_dir, folder / "killed.log", moments, chance)
    print(json.dumps({**counts, "whole_seconds": whole}))


if __name__ == "__main__":
    main()
