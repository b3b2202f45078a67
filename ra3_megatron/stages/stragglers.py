"""Slow processes: every one computes the same small thing now and then, alone, and the slowest nodes are named.

Times of whole steps cannot tell: in synchronous training everybody waits for the slowest. What is measured is matrix
products on the process's own device between two steps, without any communication; a throttled or broken GPU, a busy
processor and a wrong clock show, a slow network does not.
"""

import json
import os
import socket
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ra3_megatron.config.control import STRAGGLER_INTERVAL, STRAGGLERS_FILE
from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.parallel.collectives import gather_objects
from ra3_megatron.parallel.groups import Parallel

INTERVAL_S = 300.0
"""Seconds between two measurements unless the variable says otherwise."""
SLOW = 1.3
"""Times the median from which a process counts as slow."""
IN_A_ROW = 3
"""Measurements in a row after which its node is reported."""
REPEATS = 5
"""Products of which the fastest counts: what another process took of the processor meanwhile is left out."""


def own_seconds(parallel: Parallel) -> float:
    """Seconds of the fastest of some matrix products on this process's device."""
    size, dtype = (4096, torch.bfloat16) if parallel.on_gpu else (192, torch.float32)
    # Ones need no random numbers: the run's generators must not notice.
    factor = torch.ones(size, size, device=parallel.device, dtype=dtype)
    best = float("inf")
    for _ in range(REPEATS):
        parallel.synchronize()
        start = time.perf_counter()
        factor @ factor
        parallel.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def slow_nodes(seconds: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Nodes with a process slower than `SLOW` times the median of all, and how many times.

    `seconds` node and time of every process. Nothing when there is one node: there is no other to compare with.
    """
    if len({node for node, _ in seconds}) < 2:
        return {}
    typical = statistics.median(value for _, value in seconds)
    worst: dict[str, float] = {}
    for node, value in seconds:
        worst[node] = max(worst.get(node, 0.0), value / typical)
    return {node: ratio for node, ratio in worst.items() if ratio > SLOW}


class Series:
    """How often in a row each node was slow."""

    def __init__(self) -> None:
        self._row: Counter[str] = Counter()

    def add(self, slow: Mapping[str, float]) -> dict[str, float]:
        """Count a measurement; returns the nodes that were slow `IN_A_ROW` times, with their last ratio."""
        self._row = Counter({node: self._row[node] + 1 for node in slow})
        return {node: slow[node] for node, count in self._row.items() if count >= IN_A_ROW}


class Stragglers:
    """Measures at the cadence of `RA3_STRAGGLER_S` and writes a report into the attempt's folder; without one, never.

    `measure` is collective over all ranks.
    """

    def __init__(self, parallel: Parallel, attempt: Path | None) -> None:
        self._parallel, self._attempt = parallel, attempt
        interval = float(os.environ.get(STRAGGLER_INTERVAL, INTERVAL_S))
        self._interval = interval if attempt is not None and interval > 0 and parallel.world_size > 1 else None
        self._last, self._series = time.monotonic(), Series()

    @property
    def due(self) -> bool:
        """Whether it is time to measure, by this process's clock."""
        return self._interval is not None and time.monotonic() - self._last >= self._interval

    def measure(self, step: int) -> None:
        """Measure, gather and judge."""
        self._last = time.monotonic()
        own = (socket.gethostname(), own_seconds(self._parallel))
        seconds = gather_objects(self._parallel.world, own, "speed of every process")
        reported = self._series.add(slow_nodes(seconds))
        if self._parallel.is_main and self._attempt is not None:
            slow = {node: f"computes {ratio:.2f} times as long as the median" for node, ratio in reported.items()}
            record = {"step": step, "slow": slow, "seconds": [round(value, 6) for _, value in seconds]}
            try:
                atomic_write_text(self._attempt / STRAGGLERS_FILE, json.dumps(record))
            except OSError:
                return  # the report is not worth a run
