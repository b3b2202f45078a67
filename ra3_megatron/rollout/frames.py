"""Append-only files of checksummed frames, in batches that count as a whole: what the records of rollouts are made of.

Each data replica appends to a file of its own and reads those of all. Frames are appended and made durable, then a
frame that closes the batch. What a crash leaves behind the last closed batch is cut when the file is opened; damage
before it is refused.

Frame: `RA3L`, uint32 length of the payload, uint32 CRC-32 of length and payload, payload. Payload: uint32 length of a
JSON header, the header, raw little-endian arrays in the order the owner of the header knows.
"""

import json
import logging
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import fsync_path

log = logging.getLogger(__name__)

_MAGIC = b"RA3L"
_FRAME = struct.Struct("<4sII")
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a frame lies."""

    path: Path
    offset: int
    end: int


@dataclass(frozen=True)
class Batch:
    """Frames that one closing frame made count."""

    path: Path
    """The file."""
    frames: list[tuple[Place, dict[str, Any]]]
    """Place and header of each, in order."""
    closing: dict[str, Any]
    """Header of the closing frame."""


class FrameFiles:
    """The files `*<suffix>` of a folder; this process appends to the one named `shard`, and no other process does.

    `closing` are the kinds (`header["kind"]`) that close a batch. Read `batches` to the end before the first append.
    """

    def __init__(self, folder: Path | str, shard: str, suffix: str, closing: Sequence[str]) -> None:
        self.folder = Path(folder)
        self.path = self.folder / f"{shard}{suffix}"
        self._suffix, self._closing = suffix, frozenset(closing)
        self._file: BinaryIO | None = None
        self.folder.mkdir(parents=True, exist_ok=True)

    def batches(self) -> Iterator[Batch]:
        """Closed batches of all files, those of the own file last; it is cut behind the last one.

        Raises UserError for a damaged file.
        """
        others = sorted(p for p in self.folder.glob(f"*{self._suffix}") if p != self.path)
        for path in [*others, self.path]:
            yield from self._read(path)
        fsync_path(self.folder)

    def _read(self, path: Path) -> Iterator[Batch]:
        if not path.exists() or not path.stat().st_size:
            return
        waiting: list[tuple[Place, dict[str, Any]]] = []
        complete = end = 0
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for offset, end, header in _frames(content):
                if header["kind"] not in self._closing:
                    waiting.append((Place(path, offset, end), header))
                    continue
                yield Batch(path, waiting, header)
                complete, waiting = end, []
            if any(header["kind"] in self._closing for header in _headers_behind(content, end)):
                raise _damage(path, end)
            size = len(content)
        if path == self.path and complete < size:
            log.warning("%s: %d bytes cut, with %d whole records of an unfinished batch", path, size - complete,
                        len(waiting))  # fmt: skip
            os.truncate(path, complete)
            fsync_path(path)

    def append(self, header: dict[str, Any], arrays: Sequence[np.ndarray]) -> Place:
        """Add a frame; it is on disk after the next `sync`."""
        if self._file is None:
            self._file = open(self.path, "ab")  # noqa: SIM115  closed by close()
        text = json.dumps(header, allow_nan=False).encode()
        payload = b"".join([_LENGTH.pack(len(text)), text, *(a.tobytes() for a in arrays)])
        length = _LENGTH.pack(len(payload))
        offset = self._file.tell()
        self._file.write(_FRAME.pack(_MAGIC, len(payload), zlib.crc32(length + payload)) + payload)
        return Place(self.path, offset, offset + _FRAME.size + len(payload))

    def sync(self) -> None:
        """Make durable what was appended."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file; nothing may be appended afterwards."""
        if self._file is not None:
            self._file.close()


def read_frame(place: Place) -> tuple[dict[str, Any], bytes]:
    """Header and arrays (as bytes) of a frame. Raises UserError when the file was damaged meanwhile."""
    with open(place.path, "rb") as file:
        file.seek(place.offset)
        raw = file.read(place.end - place.offset)
    payload = _payload(raw, 0)
    if payload is None:
        raise _damage(place.path, place.offset)
    header, end = _header(payload)
    return header, payload[end:]


def columns_of(arrays: dict[str, np.ndarray]) -> list[list[Any]]:
    """Name, type and shape of each array, for the header."""
    return [[name, array.dtype.str, list(array.shape)] for name, array in arrays.items()]


def arrays_of(columns: Sequence[Sequence[Any]], content: bytes) -> dict[str, np.ndarray]:
    """The arrays again, by name, from what `columns_of` said and `read_frame` gave."""
    arrays, position = {}, 0
    for name, dtype, shape in columns:
        count = int(np.prod(shape, dtype=np.int64))
        arrays[name] = np.frombuffer(content, dtype, count, position).reshape(shape).copy()
        position += arrays[name].nbytes
    return arrays


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
