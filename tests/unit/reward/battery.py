"""Runs every attack through judges and writes down what came of it; one process per user, so that both are tried.

    python -m tests.unit.reward.battery OUT.json [auto|own|bubblewrap|none [GROUPS]]

The second argument is `judge.namespaces`, the third limits the attacks to some groups, such as 67.

After every attack the same worker gets the right program. Orphans of the judge become children of this process, so a
process that was left behind is seen.
"""

import ctypes
import json
import os
import sys
import tempfile
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, cast

from ra3_megatron.config.judge import LEVELS, JudgeConfig
from ra3_megatron.reward.judge import Judge
from ra3_megatron.reward.problem import Verdict
from tests.unit.reward.attacks import Case, control, expand
from tests.unit.reward.canaries import Canaries
from tests.unit.reward.cheats import EXITS, FORGED, PROTOCOL
from tests.unit.reward.escapes import CONTROL_YES, ESCAPES, LEAVE, TRACES_LEFT
from tests.unit.reward.resources import RESOURCES
from tests.unit.reward.thefts import PATCHED, STOLEN

PR_SET_CHILD_SUBREAPER = 36
CHEATS = EXITS + FORGED + PROTOCOL + STOLEN + PATCHED
ATTACKS = (*CHEATS, *RESOURCES, *ESCAPES, *TRACES_LEFT, CONTROL_YES)
DEADLINE_S = 1200.0
PATIENCE_S = 5.0
"""How long an ended process may wait to be waited for."""
TOO_WEAK = 3
"""Exit code where programs can reach this machine, as its judge says itself."""
SANDBOX_UID, NOBODY = JudgeConfig().uid, 65534


def all_cases(groups: str = "123456789") -> list[Case]:
    """Every case of some groups; what one job leaves is looked for directly after it."""
    cases = [case for case in expand(ATTACKS) if str(case.attack.group) in groups]
    traces = [case for case in cases if case.attack in TRACES_LEFT]
    return [c for c in cases if c.attack not in TRACES_LEFT] + sorted(
        traces, key=lambda c: (c.kind, c.attack is not LEAVE)
    )


def descendants() -> list[tuple[int, str, str]]:
    """(process, state, command) of everything below this process."""
    parents: dict[int, list[tuple[int, str, str]]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                text = Path(f"/proc/{entry}/stat").read_text()
            except OSError:
                continue
            name, (state, parent, *_) = (
                text[text.index("(") + 1 : text.rindex(")")],
                text[text.rindex(")") + 2 :].split(),
            )
            parents.setdefault(int(parent), []).append((int(entry), state, name))
    found, queue = [], [os.getpid()]
    while queue:
        for process in parents.get(queue.pop(), []):
            found.append(process)
            queue.append(process[0])
    return found


def lasting_zombies() -> list[tuple[int, str, str]]:
    """Ended processes that nobody waits for: each is one for a moment, between its end and its parent's wait."""
    end = time.monotonic() + PATIENCE_S
    found = {p for p in descendants() if p[1] == "Z"}
    while found and time.monotonic() < end:
        time.sleep(0.1)
        found &= set(descendants())
    return sorted(found)


def places() -> set[str]:
    """What lies in the folder for temporary files, and what sandboxed programs own in those that all users share."""
    shared = {path for folder in ("/tmp", "/dev/shm", "/var/tmp") for path in Path(folder).glob("*")}
    found = {path for path in shared if SANDBOX_UID <= owner(path) < SANDBOX_UID + 1000 or owner(path) == NOBODY}
    return {str(path) for path in (*found, *Path(tempfile.gettempdir()).glob("*"))}


def owner(path: Path) -> int:
    """User id, -1 for what has gone meanwhile."""
    try:
        return path.lstat().st_uid
    except OSError:
        return -1


def open_descriptors() -> int:
    """Number of this process."""
    return len(os.listdir("/proc/self/fd"))


def record(case: Case, verdict: Verdict, after: Verdict | None) -> dict[str, Any]:
    """What the tests look at."""
    return {
        "outcome": verdict.outcome.value,
        "message": verdict.message,
        "cpu_s": verdict.cpu_s,
        "wall_s": verdict.wall_s,
        "control": None if after is None else after.outcome.value,
        "control_message": "" if after is None else after.message,
    }


def refuse_without_isolation(config: JudgeConfig, names: dict[str, str]) -> None:
    """Some attacks would end every process of this machine; a harmless one is tried first."""
    probes = [case for case in expand(ESCAPES) if case.attack.name in ("write_outside", "system")]
    with Judge(config) as judge:
        if LEVELS.index(judge.level) < LEVELS.index("syscalls"):
            print(f"this machine keeps programs in at level {judge.level} only; the attacks would harm it")
            sys.exit(TOO_WEAK)
        if any(v.ok for v in judge.judge([case.submission(names) for case in probes])):
            raise RuntimeError("the judge does not keep programs in; the other attacks would harm this machine")


def one_judge(config: JudgeConfig, cases: list[Case], names: dict[str, str]) -> tuple[dict[str, Any], str]:
    """Each case and, after it, the control, in order on one worker."""
    with Judge(config) as judge:
        queued: list[tuple[Case, Future[Verdict], Future[Verdict] | None]] = []
        for case in cases:
            verdict = judge.submit(case.submission(names))
            queued.append((case, verdict, None if case.attack is LEAVE else judge.submit(control(case.kind))))
        until = time.monotonic() + DEADLINE_S
        results = {}
        for case, first, second in queued:
            left = until - time.monotonic()
            results[case.name] = record(case, first.result(left), second.result(left) if second else None)
        return {"results": results, "zombies": lasting_zombies()}, judge.level


def run(namespaces: Literal["auto", "bubblewrap", "own", "none"], groups: str, workers: int = 2) -> dict[str, Any]:
    """The battery, over judges of one worker each."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    cases = all_cases(groups)
    traces = [case for case in cases if case.attack in TRACES_LEFT]
    shares = [[c for c in cases if c not in traces][n::workers] for n in range(workers)]
    shares[0] += traces
    before_places, before_descriptors = places(), open_descriptors()
    began = time.monotonic()
    with Canaries() as canaries:
        config = JudgeConfig(workers=1, max_pending=4096, namespaces=namespaces)
        refuse_without_isolation(config, canaries.names)
        with ThreadPoolExecutor(workers) as threads:
            done = list(threads.map(lambda share: one_judge(config, share, canaries.names), shares))
        # A daemon that got out writes half a second later.
        time.sleep(1.0)
        touched = canaries.touched()
        left = [p for p in descendants() if p[0] != canaries.victim.pid]
        seconds = time.monotonic() - began
    return {
        "uid": os.getuid(),
        "level": done[0][1],
        "results": {name: value for part, _ in done for name, value in part["results"].items()},
        "zombies": [z for part, _ in done for z in part["zombies"]],
        "touched": touched,
        "processes": left,
        "places": sorted(places() - before_places),
        "descriptors": [before_descriptors, open_descriptors()],
        "wall_s": seconds,
    }


if __name__ == "__main__":
    out, way, only = [*sys.argv[1:], *["auto", "123456789"][len(sys.argv) - 2 :]]
    outcome = run(cast(Literal["auto", "bubblewrap", "own", "none"], way), only)
    Path(out).write_text(json.dumps(outcome, indent=1), encoding="utf-8")
