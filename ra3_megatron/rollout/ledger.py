"""The durable record of rollouts: append-only files, one per data replica, read back after a crash instead of redrawn.

A file is a sequence of frames, each with its length and checksum. A *draw* is what one call of the rollout engine
gave: its rollouts are appended and made durable, then a frame that says the draw is complete. Rollouts of a draw
without that frame do not count: a row's rounding depends on the rows beside it, so half a draw cannot be continued to
the same bits. What a crash leaves behind the last complete draw is cut when the file is opened; damage before it is
refused. A rollout is kept as its thoughts and figures and put together again with the expert's trajectory.

Frame: `RA3L`, uint32 length of the payload, uint32 CRC-32 of length and payload, payload. Payload: uint32 length of a
JSON header, the header, raw little-endian arrays in the header's order.
"""

import json
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import fsync_path
from ra3_megatron.data.trajectory import Trajectory, splice
from ra3_megatron.rollout.interleaved import Rollout

log = logging.getLogger(__name__)

FORMAT = 1
SUFFIX = ".rollouts"
_MAGIC = b"RA3L"
_FRAME = struct.Struct("<4sII")
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, order=True)
class RolloutKey:
    """Which rollout of a run."""

    em_round: int
    """EM round, from 1."""
    step: int
    """Optimizer step that uses it, from 1."""
    slot: int
    """Number of its snippet among the step's; a snippet may stand in two slots where the corpus is small."""
    member: int
    """Number in the snippet's group."""


@dataclass(frozen=True)
class Entry:
    """A rollout with its key and the id of its snippet in the corpus."""

    key: RolloutKey
    snippet: int
    rollout: Rollout


@dataclass(frozen=True)
class Draw:
    """One complete call of the rollout engine, and what it cost this replica."""

    em_round: int
    """EM round, from 1."""
    step: int
    """First optimizer step that uses its rollouts."""
    weights_version: int
    """Of the weights that sampled."""
    rollouts: int
    """Number of rollouts."""
    forward_passes: int = 0
    """Forward passes of the model."""
    tokens: int = 0
    """Tokens fed into them."""
    rolled_back: int = 0
    """Of these, tokens whose result was thrown away."""


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a rollout's frame lies, and what is asked about it without reading it."""

    path: Path
    offset: int
    end: int
    snippet: int
    weights_version: int


class RolloutLedger:
    """Rollouts of one stage in `folder`; this process appends to the file `shard` and reads all files.

    `settings` names what the rollouts depend on besides their key (policy, sampling, data): those of other settings
    are passed over. One process per shard. Raises UserError for a damaged file.
    """

    def __init__(self, folder: Path | str, shard: str, settings: str) -> None:
        self.folder, self.settings = Path(folder), settings
        self.path = self.folder / f"{shard}{SUFFIX}"
        self._places: dict[RolloutKey, _Place] = {}
        self._draws: dict[tuple[int, int], Draw] = {}
        self._waiting: dict[RolloutKey, _Place] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        # Own records win over those that another layout of processes wrote for the same key.
        for path in [*sorted(p for p in self.folder.glob(f"*{SUFFIX}") if p != self.path), self.path]:
            self._read(path)
        self._file: BinaryIO = open(self.path, "ab")  # noqa: SIM115  closed by close()
        fsync_path(self.folder)

    def _read(self, path: Path) -> None:
        """Index the complete draws of a file; the own file is cut behind the last one."""
        if not path.exists() or not path.stat().st_size:
            return
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            complete, lost = self._index(path, content)
            size = len(content)
        if path == self.path and complete < size:
            log.warning("%s: %d bytes cut, with %d whole rollouts of an unfinished draw", path, size - complete, lost)
            os.truncate(path, complete)
            fsync_path(path)

    def _index(self, path: Path, content: mmap.mmap) -> tuple[int, int]:
        """End of the last complete draw, and the number of whole rollouts behind it."""
        complete = end = 0
        waiting: dict[RolloutKey, _Place] = {}
        for offset, end, header in _frames(content):
            if header["kind"] == "rollout":
                key = RolloutKey(**header["key"])
                waiting[key] = _Place(path, offset, end, header["snippet"], header["values"]["weights_version"])
                continue
            if header["format"] != FORMAT:
                raise UserError(
                    f"{path} has format {header['format']}; this version reads {FORMAT}; go on with the version that "
                    "wrote it, or delete the file: its rollouts are then drawn again"
                )
            complete = end
            if header["settings"] == self.settings:
                self._places.update(waiting)
                if path == self.path:
                    draw = Draw(**header["draw"])
                    self._draws[draw.em_round, draw.step] = draw
            waiting = {}
        if any(header["kind"] == "draw" for header in _headers_behind(content, end)):
            raise _damage(path, end)
        return complete, len(waiting)

    # ---------------------------------------------------------------- writing

    def append(self, entries: Sequence[Entry]) -> None:
        """Add rollouts of the draw under way; they are on disk when this returns, and count once `commit` has."""
        for entry in entries:
            header, arrays = _pack_rollout(entry.rollout)
            header = {"kind": "rollout", "key": asdict(entry.key), "snippet": entry.snippet, **header}
            offset, end = self._write(header, arrays)
            self._waiting[entry.key] = _Place(self.path, offset, end, entry.snippet, entry.rollout.weights_version)
        self._sync()

    def commit(self, draw: Draw) -> None:
        """Make the rollouts appended since the last commit count; raises ValueError when their number is another."""
        if len(self._waiting) != draw.rollouts:
            raise ValueError(f"{self.path}: a draw of {draw.rollouts} rollouts, {len(self._waiting)} were appended")
        self._write({"kind": "draw", "format": FORMAT, "settings": self.settings, "draw": asdict(draw)}, [])
        self._sync()
        self._places.update(self._waiting)
        self._draws[draw.em_round, draw.step] = draw
        self._waiting = {}

    def _write(self, header: dict[str, Any], arrays: Sequence[np.ndarray]) -> tuple[int, int]:
        text = json.dumps(header, allow_nan=False).encode()
        payload = b"".join([_LENGTH.pack(len(text)), text, *(a.tobytes() for a in arrays)])
        length = _LENGTH.pack(len(payload))
        offset = self._file.tell()
        self._file.write(_FRAME.pack(_MAGIC, len(payload), zlib.crc32(length + payload)) + payload)
        return offset, offset + _FRAME.size + len(payload)

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    # ---------------------------------------------------------------- reading

    def draw(self, em_round: int, step: int) -> Draw | None:
        """The complete draw of this shard whose rollouts begin with `step`, or none."""
        return self._draws.get((em_round, step))

    def __contains__(self, key: RolloutKey) -> bool:
        """Whether the rollout belongs to a complete draw."""
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def snippet(self, key: RolloutKey) -> int:
        """Id of the snippet of a rollout that is there."""
        return self._places[key].snippet

    def weights_version(self, key: RolloutKey) -> int:
        """Version of the weights that sampled a rollout that is there."""
        return self._places[key].weights_version

    def read(self, key: RolloutKey, expert: Trajectory) -> Rollout:
        """A rollout that is there, put together with the `expert` trajectory it was drawn for.

        Raises UserError when that is another one, or when the file was damaged meanwhile.
        """
        place = self._places[key]
        with open(place.path, "rb") as file:
            file.seek(place.offset)
            raw = file.read(place.end - place.offset)
        payload = _payload(raw, 0)
        if payload is None:
            raise _damage(place.path, place.offset)
        return _unpack_rollout(payload, expert, str(place.path))

    def close(self) -> None:
        """Close the file; nothing may be appended afterwards."""
        self._file.close()

    def __enter__(self) -> "RolloutLedger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ------------------------------------------------------------------------------------------------- frames


def _payload(content: bytes | mmap.mmap, offset: int) -> bytes | None:
    """Payload of the frame at `offset`; None when there is no whole and undamaged one."""
    start = offset + _FRAME.size
    if start > len(content):
        return None
    magic, length, checksum = _FRAME.unpack_from(content, offset)
    if magic != _MAGIC or start + length > len(content):
        return None
    payload = content[start : start + length]
    return payload if zlib.crc32(_LENGTH.pack(length) + payload) == checksum else None


def _header(payload: bytes) -> tuple[dict[str, Any], int]:
    """Header of a payload, and where it ends."""
    (length,) = _LENGTH.unpack_from(payload)
    end = _LENGTH.size + length
    return json.loads(payload[_LENGTH.size : end]), end


def _frames(content: mmap.mmap) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(offset, end, header) of the undamaged frames from the start of a file, up to the first that is not."""
    offset = 0
    while (payload := _payload(content, offset)) is not None:
        end = offset + _FRAME.size + len(payload)
        yield offset, end, _header(payload)[0]
        offset = end


def _headers_behind(content: mmap.mmap, offset: int) -> Iterator[dict[str, Any]]:
    """Headers of undamaged frames anywhere behind `offset`, where none begins."""
    at = content.find(_MAGIC, offset)
    while at >= 0:
        payload = _payload(content, at)
        if payload is not None:
            yield _header(payload)[0]
        at = content.find(_MAGIC, at + 1)


def _damage(path: Path, offset: int) -> UserError:
    return UserError(
        f"{path} is damaged at byte {offset}, before rollouts that were complete; restore the file, or delete it: "
        "its rollouts are then drawn again"
    )


# ------------------------------------------------------------------------------------------------- rollouts


def _crc_of_ids(expert: Trajectory) -> int:
    return zlib.crc32(np.ascontiguousarray(expert.ids, dtype=np.int32).tobytes())


def _pack_rollout(rollout: Rollout) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Header fields and arrays: every field of the rollout but its trajectory, of which the thoughts alone."""
    thoughts = rollout.trajectory.thoughts()
    values: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {
        "decision_lines": np.array([d.line for d in rollout.trajectory.decisions], dtype=np.int32),
        "thought_lines": np.array(list(thoughts), dtype=np.int32),
        "thought_lengths": np.array([len(ids) for ids in thoughts.values()], dtype=np.int32),
        "thought_ids": np.concatenate([np.zeros(0, np.int32), *thoughts.values()]).astype(np.int32),
    }
    for field in fields(rollout):
        value = getattr(rollout, field.name)
        if isinstance(value, np.ndarray):
            arrays[field.name] = value
        elif field.name != "trajectory":
            values[field.name] = list(value) if isinstance(value, tuple) else value
    columns = [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]
    header = {"values": values, "columns": columns, "expert": _crc_of_ids(_without_thoughts(rollout.trajectory))}
    return header, list(arrays.values())


def _without_thoughts(trajectory: Trajectory) -> Trajectory:
    """The expert's ids; segments and decisions are left as they are."""
    kept = [trajectory.ids[s.start : s.end] for s in trajectory.segments if s.kind.name != "THOUGHT"]
    return replace(trajectory, ids=np.concatenate(kept))


def _unpack_rollout(payload: bytes, expert: Trajectory, where: str) -> Rollout:
    header, position = _header(payload)
    if header["expert"] != _crc_of_ids(expert):
        raise UserError(
            f"{where}: rollouts of another text than {expert.name or 'this snippet'}; "
            "the corpus changed since they were drawn: use the first one, or start a new run"
        )
    arrays: dict[str, Any] = {}
    for name, dtype, shape in header["columns"]:
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(payload, dtype, count, position).reshape(shape).copy()
        position += arrays[name].nbytes
    ends = np.cumsum(arrays.pop("thought_lengths"))
    ids = np.split(arrays.pop("thought_ids"), ends)[: len(ends)]
    thoughts = dict(zip(arrays.pop("thought_lines").tolist(), ids, strict=True))
    offered = set(arrays.pop("decision_lines").tolist())
    decisions = tuple(d for d in expert.decisions if d.line in offered)
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in header["values"].items()}
    return Rollout(trajectory=splice(replace(expert, decisions=decisions), thoughts), **arrays, **values)
