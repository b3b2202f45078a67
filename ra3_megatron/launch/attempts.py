"""What has been tried for a job: an account of every attempt, what it brought forward, and when to give up."""

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ra3_megatron.config.control import PARTS_FOLDER, part_name
from ra3_megatron.config.files import is_done

RECORD = "attempts.jsonl"

STARTED, STARTUP, RESET = "started", "startup", "reset"
"""Lines of the record that are no outcome; `startup` has the seconds up to the first step."""
NO_OUTCOME = (STARTED, STARTUP, RESET)


@dataclass(frozen=True)
class Work:
    """What a job is to do, seen from the disk alone."""

    stage: Path
    """Folder of the stage."""
    part: tuple[int, int] | None = None
    """Number and count of the array's parts; none = the whole stage."""

    @property
    def done(self) -> bool:
        """Whether there is nothing left to do."""
        if is_done(self.stage):
            return True
        return self.part is not None and (self.stage / PARTS_FOLDER / part_name(*self.part)).is_file()

    def progress(self) -> list[int]:
        """Figures that only grow while the stage gets on: newest complete checkpoint, shards, bytes of rollouts."""
        names = [path.parent.name for path in self.stage.glob("checkpoints/step_*/DONE")]
        steps = [int(m[1]) for name in names if (m := re.fullmatch(r"step_(\d+)", name))]
        shards = sum(1 for _ in self.stage.glob("data/*/shard-*.json"))
        # Rollouts and answers since the last checkpoint are read back, so a restart has less to do.
        logs = [p for folder in ("rollouts", "answers", "validation") for p in self.stage.glob(f"data/{folder}/**/*")]
        return [max(steps, default=0), shards, sum(_size(path) for path in logs)]


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0  # removed meanwhile


class Record:
    """The record of one job, a line per event; lines are appended and never changed."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RECORD

    def events(self) -> list[dict[str, Any]]:
        """All of it; a torn last line, which a power cut leaves, is left out."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
        return found

    def add(self, event: str, **facts: Any) -> None:
        """Append an event with the time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"event": event, "time": time.time(), **facts}) + "\n"
        with open(self.path, "a", encoding="utf-8") as file:
            # A line of its own also after a torn one.
            file.write(line if self._whole() else "\n" + line)
            file.flush()
            os.fsync(file.fileno())

    def _whole(self) -> bool:
        content = self.path.read_bytes() if self.path.exists() else b""
        return not content or content.endswith(b"\n")

    def last(self) -> dict[str, Any] | None:
        """The newest outcome."""
        return next((e for e in reversed(self.events()) if e["event"] not in NO_OUTCOME), None)


@dataclass(frozen=True)
class Fruitless:
    """Attempts in a row, up to now, that brought nothing forward."""

    ended: int
    """Those that ended by themselves: crashes, hangs, saves without a step."""
    lost: int
    """Those that were ended from outside: nodes that died, preemptions without notice."""


def fruitless(events: list[dict[str, Any]], progress: list[int]) -> Fruitless:
    """Count back from now, as long as attempts began with no less than the `progress` there is now."""
    ended = lost = 0
    outcome: str | None = None
    for event in reversed(events):
        if event["event"] == RESET:
            break
        if event["event"] == STARTUP:
            continue
        if event["event"] != STARTED:
            outcome = event["event"]
            continue
        if any(now > before for now, before in zip(progress, event["progress"], strict=True)):
            break
        if outcome in (None, "terminated"):
            lost += 1
        else:
            ended += 1
        outcome = None
    return Fruitless(ended, lost)
