"""What a profiled stage does step by step: seconds and memory by phase, and which of its steps are measured."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from ra3_megatron.config.control import Interrupted
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.parallel.whereabouts import Group
from ra3_megatron.stages.interrupt import Interrupt

ENOUGH = 0
"""Exit code of the wish to leave when all steps are measured; nobody sees it."""


@dataclass(frozen=True)
class Interval:
    """One phase, as it happened."""

    name: str
    depth: int
    """0 = a phase of a step, 1 = a part of one, ..."""
    start: float
    """Seconds of the monotonic clock."""
    end: float
    held: int
    """Memory at the end, bytes: torch's on a GPU, that of the process on a CPU."""
    peak: int
    """Most memory inside; on a CPU the larger of both ends."""


@dataclass(frozen=True)
class Plan:
    """Steps to take: first those that warm up, then those that are timed, then those that are traced."""

    warm_up: int = 1
    timed: int = 3
    traced: int = 1

    @property
    def total(self) -> int:
        """All of them."""
        return self.warm_up + self.timed + self.traced


@dataclass
class Section:
    """Steps in a row: the timed ones, or the traced ones."""

    start: float
    end: float = 0.0
    steps: int = 0
    intervals: list[Interval] = field(default_factory=list)
    work: dict[str, float] = field(default_factory=dict)
    """What was done in these steps, by the names of the stage's counters, over all replicas."""

    @property
    def seconds(self) -> float:
        """Of all steps together."""
        return self.end - self.start


class Recorder:
    """A listener of phases. The device is waited for at both ends of each, so that its time lies where its work was
    asked for; every phase of a stage ends with such a wait anyhow, but for the optimizer's last kernels."""

    def __init__(self, parallel: Parallel) -> None:
        self._parallel, self._process = parallel, psutil.Process()
        self._open: list[tuple[str, float, int]] = []
        self._peaks: list[int] = []
        self.section: Section | None = None

    def begin(self, name: str) -> None:
        """See `Listener.begin`."""
        self._settle()
        self._open.append((name, time.monotonic(), self._held()))
        self._peaks.append(0)

    def end(self) -> None:
        """See `Listener.end`."""
        self._settle()
        (name, start, before), peak, held = self._open.pop(), self._peaks.pop(), self._held()
        peak = max(peak, before, held)
        if self._peaks:
            self._peaks[-1] = max(self._peaks[-1], peak)
        if self.section is not None:
            interval = Interval(name, len(self._open), start, time.monotonic(), held, peak)
            self.section.intervals.append(interval)

    def _held(self) -> int:
        if self._parallel.on_gpu:
            return int(torch.cuda.memory_allocated(self._parallel.device))
        return int(self._process.memory_info().rss)

    def _settle(self) -> None:
        """Wait for the device, and credit the most memory since the last call to all phases that are open."""
        self._parallel.synchronize()
        if self._parallel.on_gpu:
            found = int(torch.cuda.max_memory_allocated(self._parallel.device))
            torch.cuda.reset_peak_memory_stats(self._parallel.device)
            self._peaks = [max(peak, found) for peak in self._peaks]


class Steps(Interrupt):
    """Stands where a stage asks whether to save and leave: it is asked after every step, and so knows them all.

    When the plan is done it lets the stage save, or takes it out without. `count` is told by the driver: the stage's
    counters of work.
    """

    def __init__(self, parallel: Parallel, folder: Path, plan: Plan, save: bool, nsys: bool) -> None:
        super().__init__(parallel, folder, parallel.timeout_s)
        self.parallel, self.plan, self._save, self._nsys = parallel, plan, save, nsys
        self.recorder = Recorder(parallel)
        self.timed: Section | None = None
        self.traced: Section | None = None
        self.saving: Section | None = None
        self.trace: profile | None = None
        self.count: Callable[[], Mapping[str, float]] = dict
        self._at = 0

    def begin(self, stage: str, allow_s: float | None = None) -> None:
        """Nobody watches a profile for signs of life."""

    def beat(self, what: str, allow_s: float) -> None:
        """Likewise."""

    def requested(self, step: int, group: Group | None = None) -> Interrupted | None:
        """Called after `step`; begins and ends the sections of the plan."""
        plan, section = self.plan, self.recorder.section
        if section is not None:
            section.steps += step - self._at
        self._at = step
        if self.timed is None:
            if step >= plan.warm_up:
                self.timed = self._start()
        elif section is self.timed:
            if section.steps >= plan.timed:
                self._stop(section)
                if not plan.traced:
                    return self._leave()
                self._start_trace()
                self.traced = self._start()
        elif section is not None and section.steps >= plan.traced:
            self._stop(section)
            self._stop_trace()
            return self._leave()
        return None

    def _leave(self) -> Interrupted:
        wish = Interrupted("all steps of the profile are measured", ENOUGH)
        if not self._save:
            raise wish
        self.saving = self._start()
        return wish

    def finish(self) -> None:
        """The stage has left: what it saved is saved."""
        if self.saving is not None:
            self._stop(self.saving)

    def _start(self) -> Section:
        self.parallel.synchronize()
        section = Section(time.monotonic(), work={k: -v for k, v in self.count().items()})
        self.recorder.section = section
        return section

    def _stop(self, section: Section) -> None:
        self.parallel.synchronize()
        section.end = time.monotonic()
        for name, value in self.count().items():
            section.work[name] = section.work.get(name, 0.0) + value
        self.recorder.section = None

    def _start_trace(self) -> None:
        if self._nsys:
            # Only what lies between these calls is captured; nsys and torch's profiler cannot trace at once.
            torch.cuda.profiler.start()
            return
        if not self.parallel.on_gpu:
            # It says that it found no GPU, as an error.
            os.environ.setdefault("KINETO_LOG_LEVEL", "9")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.parallel.on_gpu
        self.trace = profile(activities=activities, acc_events=True)
        self.trace.start()

    def _stop_trace(self) -> None:
        if self._nsys:
            torch.cuda.profiler.stop()
        elif self.trace is not None:
            self.trace.stop()


class NvtxRanges:
    """A listener that marks the phases for nsys."""

    def begin(self, name: str) -> None:
        """See `Listener.begin`."""
        torch.cuda.nvtx.range_push(name)

    def end(self) -> None:
        """See `Listener.end`."""
        torch.cuda.nvtx.range_pop()


def under_nsys() -> bool:
    """Whether this process was started by Nsight Systems."""
    return any(name in os.environ for name in ("NSYS_PROFILING_SESSION_ID", "QUADD_INJECTION_PROXY"))


def totals(section: Section) -> list[dict[str, Any]]:
    """Per phase: seconds per step, calls, memory (bytes); parts of a phase after it, `within` names what they are in.

    Time of the steps outside of all phases is `other`.
    """
    steps = max(1, section.steps)
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for path, interval in _paths(section.intervals):
        name, within = path[-1], "/".join(path[:-1])
        start = {"name": name, "within": within, "seconds": 0.0, "calls": 0, "peak": 0, "held": 0}
        entry = found.setdefault(path, start)
        entry["seconds"] += (interval.end - interval.start) / steps
        entry["calls"] += 1
        entry["peak"], entry["held"] = max(entry["peak"], interval.peak), interval.held
    rest = section.seconds / steps - sum(entry["seconds"] for path, entry in found.items() if len(path) == 1)
    first = {path: number for number, path in enumerate(found)}
    ordered = sorted(found, key=lambda path: [first[path[: i + 1]] for i in range(len(path))])
    other = {"name": "other", "within": "", "seconds": max(0.0, rest), "calls": 0, "peak": 0, "held": 0}
    return [*(found[path] for path in ordered), other]


def _paths(intervals: list[Interval]) -> list[tuple[tuple[str, ...], Interval]]:
    """Intervals in the order of their beginnings, each with the names of the phases around it and its own."""
    names: list[str] = []
    found = []
    for interval in sorted(intervals, key=lambda i: (i.start, i.depth)):
        names = [*names[: interval.depth], interval.name]
        found.append((tuple(names), interval))
    return found
