"""While processes run: signals, the stop file, the heartbeat, the end; and the stacks of those that hang."""

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from ra3_megatron.config.control import HEARTBEAT_FILE, REQUEST_FILE, read_json
from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.launch.slurm import command
from ra3_megatron.launch.step import Step, beside_command

END_S = 2.0
"""Seconds that processes may take to end after SIGTERM to the job: then Slurm kills them, and soon the job as well."""

DUMP_S = 60.0
"""Seconds the dump of the stacks may take."""


class Signals:
    """What Slurm has sent to the job: SIGUSR1 before its limit, SIGTERM when it is to end."""

    def __init__(self) -> None:
        self.save = self.end = False

    def listen(self) -> None:
        """Take both signals from now on."""
        signal.signal(signal.SIGUSR1, self._on_save)
        signal.signal(signal.SIGTERM, self._on_end)

    def _on_save(self, _number: int, _frame: FrameType | None) -> None:
        self.save = True

    def _on_end(self, _number: int, _frame: FrameType | None) -> None:
        self.end = True


@dataclass(frozen=True)
class Ended:
    """How the processes ended."""

    code: int
    """Exit code of srun."""
    hung: str
    """What they were doing when they were ended for not being heard of; empty when they were not."""


class Heartbeat:
    """Says for how long nothing has been heard, by this machine's clock alone."""

    def __init__(self, attempt: Path, setup_s: float) -> None:
        self._path, self._allow, self._setup = attempt / HEARTBEAT_FILE, setup_s, setup_s
        self._last: dict[str, Any] | None = None
        self._since = time.monotonic()

    def overdue(self) -> str:
        """What was last heard of, when it is longer ago than was allowed; else empty."""
        beat = read_json(self._path)
        if beat is not None and beat != self._last:
            self._last, self._since, self._allow = beat, time.monotonic(), float(beat["allow_s"])
        silent = time.monotonic() - self._since
        if silent <= self._allow:
            return ""
        if self._last is None:
            return f"no sign of life within {silent:.0f} s of the start"
        step = f", step {self._last['step']}" if self._last["step"] is not None else ""
        return f"silent for {silent:.0f} s in {self._last['stage']}, {self._last['what']}{step}"


def run_step(
    arguments: Sequence[str], env: dict[str, str], step: Step, signals: Signals, setup_s: float, poll_s: float
) -> Ended:
    """Start the processes and wait for their end, passing on wishes to leave; ends them when they hang."""
    heartbeat, asked = Heartbeat(step.attempt, setup_s), False
    process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, env=env)
    while True:
        try:
            return Ended(process.wait(poll_s), "")
        except subprocess.TimeoutExpired:
            pass
        if signals.end:
            return Ended(_wait(process, END_S), "")
        if signals.save and not asked:
            asked = True
            say("SIGUSR1: the processes are asked to save and make way")
            atomic_write_text(step.attempt / REQUEST_FILE, "SIGUSR1 to the job")
        if why := heartbeat.overdue():
            say(f"hang: {why}; stacks are in {step.attempt}")
            dump_stacks(step)
            end_steps(env["SLURM_JOB_ID"])
            return Ended(_wait(process, 60.0), why)


def say(text: str) -> None:
    """A line in the job's log."""
    print(f"{time.strftime('%H:%M:%S')} ra3 job: {text}", flush=True)


def dump_stacks(step: Step) -> None:
    """Stacks of every process of this attempt into its folder, taken on each node."""
    command = beside_command(step, [sys.executable, "-m", "ra3_megatron.launch.dump", str(step.attempt)])
    with open(step.attempt / "dump.log", "wb") as log:
        try:
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=DUMP_S, check=False)
        except subprocess.TimeoutExpired:
            say(f"the stacks could not be had within {DUMP_S:.0f} s")


def end_steps(job_id: str) -> None:
    """Kill all steps of this job, but not the job."""
    listed = command(["squeue", "--steps", f"--jobs={job_id}", "--noheader", "--format=%i"])
    for name in listed.split():
        if name.rpartition(".")[2].isdigit():
            subprocess.run(["scancel", "--signal=KILL", name], timeout=60, check=False)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
