"""What the traced steps were made of: kinds of operations by phase, and how much communication nothing covers.

On a GPU the kernels count, and the time in which none runs; on a CPU every operator's own time on the thread that
trains, and Python's between them.
"""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType

from ra3_megatron.parallel.phases import RANGE
from ra3_megatron.report.op_kinds import (
    COMMUNICATION,
    HOST,
    IDLE,
    Span,
    kind_of_kernel,
    kind_of_operator,
    length,
    overlap,
    union,
)

MICROSECOND = 1e-6


@dataclass(frozen=True)
class Part:
    """Operations of one kind in one phase."""

    phase: str
    """Innermost phase, with those around it: `update/optimizer`; `other` outside of all."""
    kind: str
    """One of `op_kinds.KINDS`."""
    seconds: float
    """In all traced steps."""
    count: int
    """Operations."""


@dataclass(frozen=True)
class TraceSummary:
    """The traced steps in numbers."""

    parts: tuple[Part, ...]
    communication: float
    """Seconds in which some collective was under way."""
    exposed: float
    """Of these, seconds in which nothing was computed."""
    top: tuple[tuple[str, float, int], ...]
    """The operations that took longest: name, seconds, how often."""


def summarise(events: Iterable[Any], steps: tuple[float, float] | None = None) -> TraceSummary:
    """Add up a profiler's events (`torch.profiler.profile.events()`); times are in microseconds there.

    `steps`: beginning and end of the traced steps on the events' clock; from the first to the last phase unless given.
    """
    everything = list(events)
    ranges = [e for e in everything if e.name.startswith(RANGE) and e.device_type == DeviceType.CPU and not e.is_async]
    if not ranges:
        return TraceSummary((), 0.0, 0.0, ())
    thread = ranges[0].thread
    begin, end = steps or (min(e.time_range.start for e in ranges), max(e.time_range.end for e in ranges))
    segments = _segments([e for e in ranges if e.thread == thread], begin, end)
    kernels = [e for e in everything if e.device_type != DeviceType.CPU and not e.is_user_annotation]
    if kernels:
        return _of_device(kernels, segments)
    return _of_host(everything, thread, segments)


@dataclass(frozen=True)
class _Segment:
    """A stretch of time and the innermost phase that it belongs to."""

    start: float
    end: float
    phase: str


def _segments(ranges: Sequence[Any], begin: float, end: float) -> list[_Segment]:
    """The time from `begin` to `end` by innermost phase, without gaps."""
    found: list[_Segment] = []
    open_ranges: list[tuple[str, float]] = []
    at = begin

    def until(moment: float) -> None:
        nonlocal at
        if moment > at:
            path = "/".join(name for name, _ in open_ranges) or "other"
            found.append(_Segment(at, moment, path))
            at = moment

    for event in sorted(ranges, key=lambda e: (e.time_range.start, -e.time_range.end)):
        while open_ranges and open_ranges[-1][1] <= event.time_range.start:
            until(open_ranges[-1][1])
            open_ranges.pop()
        until(event.time_range.start)
        open_ranges.append((event.name.removeprefix(RANGE), event.time_range.end))
    while open_ranges:
        until(open_ranges[-1][1])
        open_ranges.pop()
    until(end)
    return found


class _Table:
    """Seconds and counts by phase and kind, and by name."""

    def __init__(self, segments: Sequence[_Segment]) -> None:
        self.segments, self._starts = segments, [s.start for s in segments]
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.counts: dict[tuple[str, str], int] = defaultdict(int)
        self._names: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])

    def add(self, name: str, kind: str, start: float, microseconds: float) -> None:
        """Count one operation; what began outside of the steps is left out."""
        place = bisect_right(self._starts, start) - 1
        if place < 0 or start >= self.segments[place].end:
            return
        key = self.segments[place].phase, kind
        self.seconds[key] += microseconds * MICROSECOND
        self.counts[key] += 1
        self._names[name][0] += microseconds * MICROSECOND
        self._names[name][1] += 1

    def spans(self) -> dict[str, list[Span]]:
        """Moments of every phase, in order."""
        found: dict[str, list[Span]] = defaultdict(list)
        for segment in self.segments:
            found[segment.phase].append((segment.start, segment.end))
        return found

    def summary(self, communication: float, exposed: float) -> TraceSummary:
        parts = [Part(phase, kind, s, self.counts[phase, kind]) for (phase, kind), s in self.seconds.items() if s > 0]
        parts.sort(key=lambda p: -p.seconds)
        top = sorted(((n, s, int(c)) for n, (s, c) in self._names.items()), key=lambda t: -t[1])[:20]
        return TraceSummary(tuple(parts), communication * MICROSECOND, exposed * MICROSECOND, tuple(top))


def _span(event: Any) -> Span:
    return event.time_range.start, event.time_range.end


def _of_device(kernels: Sequence[Any], segments: Sequence[_Segment]) -> TraceSummary:
    """Phases wait for the device at both ends, so a kernel runs inside the phase that asked for it."""
    table = _Table(segments)
    kinds = [kind_of_kernel(e.name) for e in kernels]
    for event, kind in zip(kernels, kinds, strict=True):
        table.add(event.name, kind, event.time_range.start, event.time_range.end - event.time_range.start)
    busy = union(map(_span, kernels))
    talking = union(_span(e) for e, kind in zip(kernels, kinds, strict=True) if kind == COMMUNICATION)
    computing = union(_span(e) for e, kind in zip(kernels, kinds, strict=True) if kind != COMMUNICATION)
    for phase, spans in table.spans().items():
        table.seconds[phase, IDLE] = (length(spans) - overlap(spans, busy)) * MICROSECOND
    return table.summary(length(talking), length(talking) - overlap(talking, computing))


def _of_host(events: Sequence[Any], thread: int, segments: Sequence[_Segment]) -> TraceSummary:
    """A collective's own event lasts from its start to its end; the operator that starts it returns at once."""
    table = _Table(segments)
    own = [e for e in events if e.thread == thread and not e.is_async and e.device_type == DeviceType.CPU]
    for event in own:
        if event.name.startswith(RANGE):
            continue
        table.add(event.name, kind_of_operator(event.name), event.time_range.start, event.self_cpu_time_total)
    talking = union(_span(e) for e in events if e.is_async and kind_of_operator(e.name) == COMMUNICATION)
    computing = union(_span(e) for e in own if e.name.startswith("aten::"))
    exposed = 0.0
    for phase, spans in table.spans().items():
        told = sum(s for (p, _), s in table.seconds.items() if p == phase)
        alone = union((max(a, c), min(b, d)) for a, b in spans for c, d in talking if c < b and a < d)
        waited = length(alone) - overlap(alone, computing)
        exposed += waited
        # What no operator accounts for is Python's, or waiting for others.
        table.seconds[phase, COMMUNICATION] += waited * MICROSECOND
        rest = length(spans) * MICROSECOND - told - waited * MICROSECOND
        table.seconds[phase, HOST] += max(0.0, rest)
    return table.summary(length(talking), exposed)
