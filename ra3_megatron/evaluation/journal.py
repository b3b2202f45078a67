"""Records of an evaluation as it goes: one JSON object per line, appended, each under a key.

A killed process loses what it had not handed to the system; a line torn by the kill is cut when the file is opened
again. Every writer has a file of its own, and all read all.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError

_SYNC_S = 1.0
"""Seconds after which what was written is made durable against a crash of the machine too."""


def read_journals(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    """Records by key of every writer's file of one kind; torn last lines are left out.

    Raises UserError for a damaged line anywhere else.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob(f"{name}.*.jsonl")):
        found.update((record["key"], record) for record in _records(path, path.read_bytes()))
    return found


def _records(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    lines = content.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line)
            record["key"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path}, line {number} is no record ({error}); remove the line: what it held is made again"
            ) from None
        yield record


class Journal:
    """One writer's file. Thread-safe; a context manager."""

    def __init__(self, folder: Path, name: str, writer: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.{writer}.jsonl"
        self._lock, self._synced = threading.Lock(), time.monotonic()
        self._file = open(self.path, "ab+")  # noqa: SIM115  closed by `close`
        self._cut_torn_line()

    def _cut_torn_line(self) -> None:
        self._file.seek(0)
        content = self._file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            self._file.truncate(whole)

    def add(self, key: str, values: dict[str, Any]) -> None:
        """Append one record; it survives a kill of this process when this returns."""
        line = json.dumps({"key": key, **values}, allow_nan=False).encode() + b"\n"
        with self._lock:
            self._file.write(line)
            self._file.flush()
            if time.monotonic() - self._synced > _SYNC_S:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()

    def close(self) -> None:
        """Make everything durable and close."""
        with self._lock:
            if not self._file.closed:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
