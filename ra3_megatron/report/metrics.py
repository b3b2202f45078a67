"""The metrics log of one stage: `metrics.jsonl` first, TensorBoard, Weights & Biases and MLflow beside it."""

import json
import os
import time
from pathlib import Path
from typing import BinaryIO

from ra3_megatron.config.files import atomic_write_bytes
from ra3_megatron.config.sections import ReportConfig
from ra3_megatron.report.schema import METRICS_FILE, decode_record, encode_record, read_metrics
from ra3_megatron.report.trackers import Tracker, make_trackers


class MetricsLog:
    """Append-only record of a stage, fit to be cut and continued.

    A record is on disk when `log` returns. So log a step before its checkpoint is written: then everything up to the
    checkpoint's step is there after a crash, `truncate_after(step)` cuts what the checkpoint does not know, and the
    file ends up as if the run had never stopped (clock readings aside).
    """

    def __init__(self, folder: Path | str, config: ReportConfig, is_writer: bool) -> None:
        """Open or create `<folder>/metrics.jsonl`; processes that are not the writer do nothing at all.

        Raises UserError if a tracker is asked for whose extra is not installed (on every process alike), and for a
        file with a damaged line that is not the last.
        """
        self.path = Path(folder) / METRICS_FILE
        self._trackers: list[Tracker] = make_trackers(self.path.parent, config, is_writer)
        self._file: BinaryIO | None = None
        self._last_step = -1
        if not is_writer:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._repair()
        if self.path.exists():
            read_metrics(self.path)  # a damaged file is refused now, not at the resume after next
        self._open()

    def log(self, step: int, **values: float | int) -> None:
        """Append one record. `values` are fields of `schema.METRICS`; `time` is added.

        Raises ValueError for an unknown name or a step before the last one, TypeError for what is no Python number.
        """
        if self._file is None:
            return
        if step < self._last_step:
            raise ValueError(
                f"{self.path}: step {step} after step {self._last_step}; call truncate_after({step - 1}) first"
            )
        values = {**values, "time": time.time()}
        self._file.write(encode_record(step, values).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._last_step = step
        for tracker in self._trackers:
            tracker.log(step, values)

    def truncate_after(self, step: int) -> int:
        """Remove the records of steps later than `step`, that of the checkpoint resumed from; return how many.

        A stage that starts over without a checkpoint gives -1.
        """
        if self._file is None:
            return 0
        self._file.close()
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if decode_record(line.decode())["step"] <= step]
        if len(kept) < len(lines):
            atomic_write_bytes(self.path, b"".join(kept))
        self._open()
        for tracker in self._trackers:
            tracker.restart_after(step)
        return len(lines) - len(kept)

    def close(self) -> None:
        """Close the file and the trackers; further calls do nothing."""
        if self._file is None:
            return
        self._file.close()
        self._file = None
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _repair(self) -> None:
        """Cut or complete a last line without newline, which is what a crash in the middle of a write leaves."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        whole, _, tail = content.rpartition(b"\n")
        if not tail:
            return
        whole = whole + b"\n" if whole else b""
        try:
            decode_record(tail.decode("utf-8"))
        except (ValueError, AttributeError):
            atomic_write_bytes(self.path, whole)
        else:
            atomic_write_bytes(self.path, whole + tail + b"\n")

    def _open(self) -> None:
        self._last_step = -1
        if self.path.exists():
            lines = self.path.read_bytes().splitlines()
            if lines:
                self._last_step = json.loads(lines[-1])["step"]
        self._file = open(self.path, "ab")  # noqa: SIM115 - kept open between calls, closed by close()
