"""From the start of a job to its first step: when each part was over, and how long it took."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ra3_megatron.config.control import STARTUP_FILE, read_json

PARTS = (
    ("script", "Slurm's part"),
    ("job", "start of the job"),
    ("checked", "check of the nodes"),
    ("started", "srun"),
    ("imported", "imports"),
    ("joined", "process groups"),
    ("stepped", "model, data and first step"),
)
"""Names of the moments, in their order, and what the time before each was for."""


def seconds_of(granted: float | None, moments: Mapping[str, float], attempt: Path) -> dict[str, float]:
    """Seconds of every part, and their sum under `first step`; empty before the first step.

    `granted` is when Slurm started the job, none where it does not say; `moments` are those of the job, and those of
    the processes lie in the attempt's folder.
    """
    found: dict[str, Any] = {**moments, **(read_json(attempt / STARTUP_FILE) or {})}
    if not all(name in found for name, _ in PARTS):
        return {}
    before = begin = granted if granted is not None else moments["script"]
    seconds = {}
    for name, what in PARTS:
        seconds[what] = round(found[name] - before, 2)
        before = found[name]
    return {"first step": round(before - begin, 2), **seconds}


def in_words(seconds: Mapping[str, float]) -> str:
    """For the job's log."""
    parts = ", ".join(f"{what} {value:.1f}" for what, value in seconds.items() if what != "first step")
    return f"first step {seconds['first step']:.1f} s after the start of the job: {parts}"


def moment_of(text: str) -> float | None:
    """A moment as Slurm writes it, seconds since 1970; none where it says nothing, such as Unknown."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None
