"""Trajectories of a whole corpus on disk: one file per column, memory-mapped when read."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.data.latent import ThinkTokens
from ra3_megatron.data.trajectory import Decision, Kind, Segment, Trajectory

_HEADER = "columns.json"
_FORMAT = 1
_COLUMNS = {
    "ids": "uint32",
    "segment_kind": "uint8",
    "segment_line": "int32",
    "segment_length": "int32",
    "decision_line": "int32",
    "decision_position": "int32",
    "decision_forced": "uint16",
    "decision_set": "int32",
    "cuts": "int16",
    "text": "uint8",
    "flags": "uint8",
    # cumulative counts, one more than there are trajectories
    "ids_end": "int64",
    "segments_end": "int64",
    "decisions_end": "int64",
    "lines_end": "int64",
    "text_end": "int64",
}
_HAS_START, _ENDS_DOCUMENT = 1, 2


@dataclass(frozen=True)
class Columns:
    """Trajectories as arrays, cheap to send between processes.

    `arrays`: the columns, where a column of ends holds lengths; `decision_set` counts within `think_keys`.
    """

    count: int
    arrays: dict[str, np.ndarray]
    think_keys: tuple[tuple[str, tuple[int, ...]], ...]


def to_columns(trajectories: Sequence[Trajectory], think_tokens: ThinkTokens) -> Columns:
    """Arrays of some trajectories whose think sets are numbered by `think_tokens`."""
    segments = [s for t in trajectories for s in t.segments]
    decisions = [d for t in trajectories for d in t.decisions]
    used = list(dict.fromkeys(d.think_set for d in decisions))
    local = {number: i for i, number in enumerate(used)}
    texts = ["\0".join((t.name, t.prefix, t.suffix)).encode("utf-8", "surrogatepass") for t in trajectories]
    columns: dict[str, Any] = {
        "ids": np.concatenate([t.ids for t in trajectories]) if trajectories else [],
        "segment_kind": [s.kind for s in segments],
        "segment_line": [s.line for s in segments],
        "segment_length": [s.end - s.start for s in segments],
        "decision_line": [d.line for d in decisions],
        "decision_position": [d.position for d in decisions],
        "decision_forced": [len(d.forced) for d in decisions],
        "decision_set": [local[d.think_set] for d in decisions],
        "cuts": np.concatenate([t.cuts for t in trajectories]) if trajectories else [],
        "text": np.frombuffer(b"".join(texts), dtype=np.uint8),
        "flags": [_HAS_START * t.has_start + _ENDS_DOCUMENT * t.ends_document for t in trajectories],
        "ids_end": [len(t.ids) for t in trajectories],
        "segments_end": [len(t.segments) for t in trajectories],
        "decisions_end": [len(t.decisions) for t in trajectories],
        "lines_end": [t.num_lines for t in trajectories],
        "text_end": [len(text) for text in texts],
    }
    arrays = {name: np.asarray(values, dtype=_COLUMNS[name]) for name, values in columns.items()}
    return Columns(len(trajectories), arrays, tuple(think_tokens.key(number) for number in used))


class TrajectoryWriter:
    """Appends trajectories to a folder; memory does not grow with the corpus. `close` writes the header last.

    Think sets are numbered in the order of their first use, so the content depends on the trajectories alone.
    """

    def __init__(self, folder: Path | str, think_tokens: ThinkTokens):
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._think_tokens = think_tokens
        self._stack = ExitStack()
        paths = {c: self._folder / f"{c}.bin" for c in _COLUMNS}
        self._files: dict[str, BinaryIO] = {c: self._stack.enter_context(p.open("wb")) for c, p in paths.items()}
        self._hashes = {c: hashlib.sha256() for c in _COLUMNS}
        self._sizes = dict.fromkeys(_COLUMNS, 0)
        self._ends = {c: 0 for c in _COLUMNS if c.endswith("_end")}
        self._keys: dict[tuple[str, tuple[int, ...]], int] = {}
        for column in self._ends:
            self._write(column, np.zeros(1, np.int64))
        self.count = 0

    def _write(self, column: str, values: np.ndarray) -> None:
        raw = values.tobytes()
        self._files[column].write(raw)
        self._hashes[column].update(raw)
        self._sizes[column] += len(values)

    def append(self, trajectory: Trajectory) -> None:
        """Add one trajectory; its think sets are those of the writer's ThinkTokens."""
        self.append_columns(to_columns([trajectory], self._think_tokens))

    def append_columns(self, columns: Columns) -> None:
        """Add trajectories that are arrays already."""
        numbers = np.array([self._keys.setdefault(k, len(self._keys)) for k in columns.think_keys], dtype=np.int32)
        for name, values in columns.arrays.items():
            if name == "decision_set":
                values = numbers[values] if len(values) else values
            elif name in self._ends:
                values = np.cumsum(values) + self._ends[name]
                self._ends[name] = int(values[-1]) if len(values) else self._ends[name]
            self._write(name, values)
        self.count += columns.count

    def close(self) -> str:
        """Finish the files. Returns the store's fingerprint (SHA-256 of all columns and think sets)."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._stack.close()
        columns = {
            c: {"dtype": _COLUMNS[c], "length": self._sizes[c], "sha256": self._hashes[c].hexdigest()} for c in _COLUMNS
        }
        body = {
            "format": _FORMAT,
            "count": self.count,
            "latent": self._think_tokens.format.name,
            "tokenizer": self._think_tokens.tokenizer.fingerprint,
            "think_sets": [[remainder, list(rest)] for remainder, rest in self._keys],
            "columns": columns,
        }
        fingerprint = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        atomic_write_text(self._folder / _HEADER, json.dumps({**body, "fingerprint": fingerprint}, indent=1))
        return fingerprint

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._stack.close()


class TrajectoryStore:
    """A corpus of trajectories, read by number.

    `lengths` tokens per trajectory int64 `[count]`; `ends_document` bool `[count]`; `fingerprint` names the content.
    Raises UserError for a folder that is no finished store or was written for another tokenizer or format.
    """

    def __init__(self, folder: Path | str, think_tokens: ThinkTokens):
        self.folder = Path(folder)
        header = self.folder / _HEADER
        if not header.is_file():
            raise UserError(f"{self.folder} holds no finished corpus ({_HEADER} is missing); prepare it again")
        self._header = json.loads(header.read_text(encoding="utf-8"))
        if self._header["format"] != _FORMAT:
            raise UserError(
                f"{self.folder} has format {self._header['format']}; this version reads {_FORMAT}; prepare it again"
            )
        if self._header["tokenizer"] != think_tokens.tokenizer.fingerprint:
            raise UserError(
                f"{self.folder} was made with tokenizer {self._header['tokenizer'][:12]}; the one given is "
                f"{think_tokens.tokenizer.fingerprint[:12]}; use the same tokenizer or prepare the corpus again"
            )
        if self._header["latent"] != think_tokens.format.name:
            raise UserError(
                f"{self.folder} was made for latent.format = {self._header['latent']}; {think_tokens.format.name} is "
                "asked for; set the same format or prepare the corpus again"
            )
        self.fingerprint: str = self._header["fingerprint"]
        self.think_tokens = think_tokens
        self._sets = think_tokens.restore(self._header["think_sets"])
        self._columns = {c: self._map(c) for c in _COLUMNS}
        self.lengths = np.diff(self._columns["ids_end"])
        self.ends_document = (np.asarray(self._columns["flags"]) & _ENDS_DOCUMENT) > 0

    def _map(self, column: str) -> np.ndarray:
        entry = self._header["columns"][column]
        path = self.folder / f"{column}.bin"
        expected = entry["length"] * np.dtype(entry["dtype"]).itemsize
        found = path.stat().st_size if path.is_file() else -1
        if found != expected:
            raise UserError(f"{path} has {found} bytes; {expected} were written; prepare the corpus again")
        if not expected:
            return np.zeros(0, entry["dtype"])
        return np.memmap(path, dtype=entry["dtype"], mode="r")

    def verify(self) -> None:
        """Read every column and compare checksums. Raises UserError at the first difference."""
        for column, entry in self._header["columns"].items():
            if hashlib.sha256((self.folder / f"{column}.bin").read_bytes()).hexdigest() != entry["sha256"]:
                raise UserError(f"{self.folder / column}.bin changed after it was written; prepare the corpus again")

    def __len__(self) -> int:
        return int(self._header["count"])

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[i] for i in range(len(self)))

    def _rows(self, ends: str, index: int) -> slice:
        column = self._columns[ends]
        return slice(int(column[index]), int(column[index + 1]))

    def ids(self, index: int) -> np.ndarray:
        """Token ids of one trajectory, int32 `[tokens]`."""
        return self._columns["ids"][self._rows("ids_end", index)].astype(np.int32)

    def __getitem__(self, index: int) -> Trajectory:
        if not 0 <= index < len(self):
            raise IndexError(f"trajectory {index} of {len(self)}")
        c = self._columns
        ids = self.ids(index)
        rows = self._rows("segments_end", index)
        ends = np.cumsum(c["segment_length"][rows])
        segments = tuple(
            Segment(Kind(kind), line, end - length, end)
            for kind, line, length, end in zip(
                c["segment_kind"][rows].tolist(),
                c["segment_line"][rows].tolist(),
                c["segment_length"][rows].tolist(),
                ends.tolist(),
                strict=True,
            )
        )
        rows = self._rows("decisions_end", index)
        decisions = tuple(
            Decision(line, position, tuple(ids[position - forced : position].tolist()), self._sets[think_set])
            for line, position, forced, think_set in zip(
                *(c[f"decision_{k}"][rows].tolist() for k in ("line", "position", "forced", "set")), strict=True
            )
        )
        text = c["text"][self._rows("text_end", index)].tobytes().decode("utf-8", "surrogatepass")
        name, prefix, suffix = text.split("\0")
        flags = int(c["flags"][index])
        return Trajectory(
            ids,
            segments,
            decisions,
            np.array(c["cuts"][self._rows("lines_end", index)]),
            name,
            bool(flags & _HAS_START),
            bool(flags & _ENDS_DOCUMENT),
            prefix,
            suffix,
        )


def write_store(folder: Path | str, trajectories: Iterable[Trajectory], think_tokens: ThinkTokens) -> TrajectoryStore:
    """Write trajectories (for example with thoughts spliced in) as a store and open it."""
    with TrajectoryWriter(folder, think_tokens) as writer:
        for trajectory in trajectories:
            writer.append(trajectory)
    return TrajectoryStore(folder, think_tokens)
