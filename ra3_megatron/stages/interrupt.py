"""Leaving in good order: one mechanism for the time limit, preemption, the stop file, and a deadline.

A stage's loop calls it once per step, on every rank; two lines are all it takes:

    if reason := context.interrupt.requested(step):  # alike on all ranks
        ...save and drain the checkpoint of this step...
        raise reason

where `step` only grows. Asked are: `<run>/STOP` (the user's), `save-and-go-on` in the attempt's folder (the job's, on
SIGUSR1 from Slurm), SIGUSR1 to any process, and the moment `RA3_MUST_SAVE_BY`. The ranks agree through one small
all-reduce every `AGREE_S` seconds or so, not at every step. The same call writes the heartbeat that the job watches,
and measures now and then how fast every process computes (`ra3_megatron.stages.stragglers`).
"""

import faulthandler
import json
import os
import signal
import socket
import statistics
import threading
import time
from collections import deque
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ra3_megatron.config.control import (
    EXIT_GO_ON,
    EXIT_STOPPED,
    HEARTBEAT_FILE,
    MUST_SAVE_BY,
    RANKS_FOLDER,
    REQUEST_FILE,
    SETUP_LIMIT,
    STARTUP_FILE,
    STEP_LIMIT,
    STOP_FILE,
    Interrupted,
    attempt_dir,
    process_start,
)
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.parallel.collectives import all_reduce_max
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.parallel.whereabouts import Group
from ra3_megatron.stages.stragglers import Stragglers

AGREE_S = 1.0
"""Seconds between two agreements of the ranks, about; longer when a step is."""

BEAT_S = 2.0
"""Least seconds between two writes of the heartbeat."""

_REASONS = (
    "",
    "SIGUSR1 came",
    "the job asked to save and make way",
    f"the moment of {MUST_SAVE_BY} has come",
    f"the stop file {STOP_FILE} is there",
)
"""In rising order of precedence: the ranks agree on the largest number. The last is not followed by another attempt."""

_signalled = threading.Event()

_startup: dict[str, float] = {}
"""When this process was started, had its imports, and was in its groups; seconds since 1970."""


def _remember(_number: int, _frame: FrameType | None) -> None:
    _signalled.set()


def listen() -> None:
    """Take SIGUSR1 as a wish to save and end; without it the signal would kill the process in the middle of a save."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, _remember)
    # The job asks a process that hangs for its stacks; this handler answers even out of native code.
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)


def was_asked() -> bool:
    """Whether this process got SIGUSR1."""
    return _signalled.is_set()


def pass_on() -> None:
    """Take for one's own what another process was asked, one that takes no part in the agreements."""
    _signalled.set()


def sign_in(rank: int) -> None:
    """Leave this process's number in the attempt's folder, when all that is imported is there."""
    folder = attempt_dir()
    if folder is not None:
        _startup.update(started=process_start(), imported=time.time())
        atomic_write_text(folder / RANKS_FOLDER / str(rank), f"{socket.gethostname()} {os.getpid()}")


class Interrupt:
    """The wishes to leave, seen alike by all ranks, and the sign of life of one process."""

    def __init__(self, parallel: Parallel, run_dir: Path, timeout_s: float) -> None:
        """`timeout_s` is the deadline of collectives: a hang is called one only after they had their say."""
        self._parallel, self._stop_file = parallel, run_dir / STOP_FILE
        self._attempt = attempt_dir()
        self._agreed_at: tuple[int, float] | None
        self._deadline = _seconds(MUST_SAVE_BY, float("inf"))
        self._step_limit = _seconds(STEP_LIMIT, timeout_s + 60.0)
        self._setup_limit = _seconds(SETUP_LIMIT, 1800.0)
        self._next, self._agreed_at = 0, None
        self._stage, self._what, self._beaten, self._stepped = "", "", 0.0, False
        self._marks: deque[float] = deque(maxlen=64)
        self._stragglers = Stragglers(parallel, self._attempt)

    def begin(self, stage: str, allow_s: float | None = None) -> None:
        """Say that a stage starts, and that up to its first step `allow_s` may pass; none = as setting up may take."""
        self._next, self._agreed_at = 0, None
        self._marks.clear()
        self._stage = stage
        _startup.setdefault("joined", time.time())
        self._write("setting up", None, allow_s or self._setup_limit)

    def beat(self, what: str, allow_s: float) -> None:
        """Say that something other than steps begins, such as a save, and that it may take `allow_s` seconds."""
        self._write(what, None, max(allow_s, self._step_limit))

    def requested(self, step: int, group: Group | None = None) -> Interrupted | None:
        """Why to save and leave after `step`, as the exception to raise; none = go on.

        Alike on all ranks of `group`, the whole world unless given; each of them must call it with the same `step`.
        """
        self._beat(step)
        if step < self._next:
            return None
        group = group or self._parallel.world
        leads, whole = group.rank == 0, group is self._parallel.world
        due = leads and whole and self._stragglers.due
        mine = torch.tensor([self._seen(leads), self._next_after(step) if leads else 0, due], dtype=torch.float64)
        code, following, measure = all_reduce_max(group, mine, "wish to leave").tolist()
        self._next, self._agreed_at = int(following), (step, time.monotonic())
        if measure:
            self._stragglers.measure(step)
        if not code:
            return None
        exit_code = EXIT_STOPPED if code == len(_REASONS) - 1 else EXIT_GO_ON
        return Interrupted(f"{_REASONS[int(code)]}; saved after step {step}", exit_code)

    def _seen(self, leads: bool) -> int:
        """Number of the weightiest reason this rank knows of; files and clock are looked at by one rank."""
        found = 1 if _signalled.is_set() else 0
        if leads:
            if self._attempt is not None and (self._attempt / REQUEST_FILE).exists():
                found = 2
            if time.time() >= self._deadline:
                found = 3
            if self._stop_file.exists():
                found = 4
        return found

    def _next_after(self, step: int) -> int:
        """Step of the next agreement, from the speed since the last one."""
        if self._agreed_at is None:
            return step + 1
        before, at = self._agreed_at
        seconds = (time.monotonic() - at) / max(1, step - before)
        # Not more than doubled at once: the first steps after a start say little about those to come.
        return step + max(1, min(round(AGREE_S / max(seconds, 1e-6)), 2 * max(1, step - before)))

    # ---------------------------------------------------------------- sign of life

    def _beat(self, step: int) -> None:
        now = time.monotonic()
        self._marks.append(now)
        if not self._stepped:
            self._stepped = True
            self._tell(STARTUP_FILE, {**_startup, "stepped": time.time()})
        # After a save the long time that was allowed for it ends at once.
        if self._what == "steps" and now - self._beaten < BEAT_S:
            return
        steps = [after - before for before, after in pairwise(self._marks)]
        typical = statistics.median(steps) if steps else 0.0
        self._write("steps", step, max(self._step_limit, 10 * typical))

    def _write(self, what: str, step: int | None, allow_s: float) -> None:
        self._what, self._beaten = what, time.monotonic()
        beat = {"what": what, "step": step, "time": time.time(), "allow_s": allow_s, "stage": self._stage}
        self._tell(HEARTBEAT_FILE, beat)

    def _tell(self, name: str, content: dict[str, Any]) -> None:
        """Write a file into the attempt's folder, by one process of a job."""
        if self._attempt is None or not self._parallel.is_main:
            return
        try:
            atomic_write_text(self._attempt / name, json.dumps(content))
        except OSError:
            return  # a full disk must not end the training that could still go on


def _seconds(name: str, default: float) -> float:
    """Value of a variable in seconds. Raises UserError for what is no number."""
    value = os.environ.get(name, "")
    try:
        return float(value) if value else default
    except ValueError:
        raise UserError(f"{name} is '{value}'; it must be a number of seconds") from None
