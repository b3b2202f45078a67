"""The durable record of rollouts: append-only files, one per data replica, read back after a crash instead of redrawn.

A *draw* is what one call of the rollout engine gave: its rollouts are appended and made durable, then a frame that says
the draw is complete (`rollout/frames.py`). Rollouts of a draw without that frame do not count: a row's rounding depends
on the rows beside it, so half a draw cannot be continued to the same bits. A rollout is kept as its thoughts and
figures and put together again with the expert's trajectory.
"""

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from ra3_megatron.config.errors import UserError
from ra3_megatron.data.trajectory import Trajectory, splice
from ra3_megatron.rollout.frames import Batch, FrameFiles, Place, arrays_of, columns_of, read_frame
from ra3_megatron.rollout.interleaved import Rollout

FORMAT = 1
SUFFIX = ".rollouts"


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
class _Known:
    """Where a rollout's frame lies, and what is asked about it without reading it."""

    place: Place
    snippet: int
    weights_version: int


class RolloutLedger:
    """Rollouts of one stage in `folder`; this process appends to the file `shard` and reads all files.

    `settings` names what the rollouts depend on besides their key (policy, sampling, data): those of other settings
    are passed over. One process per shard. Raises UserError for a damaged file.
    """

    def __init__(self, folder: Path | str, shard: str, settings: str) -> None:
        self.settings = settings
        self._files = FrameFiles(folder, shard, SUFFIX, ("draw",))
        self.folder, self.path = self._files.folder, self._files.path
        self._known: dict[RolloutKey, _Known] = {}
        self._draws: dict[tuple[int, int], Draw] = {}
        self._waiting: dict[RolloutKey, _Known] = {}
        # Own records come last and win over those that another layout of processes wrote for the same key.
        for batch in self._files.batches():
            self._index(batch)

    def _index(self, batch: Batch) -> None:
        header = batch.closing
        if header["format"] != FORMAT:
            raise UserError(
                f"{batch.path} has format {header['format']}; this version reads {FORMAT}; go on with the version that "
                "wrote it, or delete the file: its rollouts are then drawn again"
            )
        if header["settings"] != self.settings:
            return
        for place, found in batch.frames:
            key = RolloutKey(**found["key"])
            self._known[key] = _Known(place, found["snippet"], found["values"]["weights_version"])
        if batch.path == self.path:
            draw = Draw(**header["draw"])
            self._draws[draw.em_round, draw.step] = draw

    # ---------------------------------------------------------------- writing

    def append(self, entries: Sequence[Entry]) -> None:
        """Add rollouts of the draw under way; they are on disk when this returns, and count once `commit` has."""
        for entry in entries:
            header, arrays = _pack_rollout(entry.rollout)
            header = {"kind": "rollout", "key": asdict(entry.key), "snippet": entry.snippet, **header}
            place = self._files.append(header, arrays)
            self._waiting[entry.key] = _Known(place, entry.snippet, entry.rollout.weights_version)
        self._files.sync()

    def commit(self, draw: Draw) -> None:
        """Make the rollouts appended since the last commit count; raises ValueError when their number is another."""
        if len(self._waiting) != draw.rollouts:
            raise ValueError(f"{self.path}: a draw of {draw.rollouts} rollouts, {len(self._waiting)} were appended")
        self._files.append({"kind": "draw", "format": FORMAT, "settings": self.settings, "draw": asdict(draw)}, [])
        self._files.sync()
        self._known.update(self._waiting)
        self._draws[draw.em_round, draw.step] = draw
        self._waiting = {}

    # ---------------------------------------------------------------- reading

    def draw(self, em_round: int, step: int) -> Draw | None:
        """The complete draw of this shard whose rollouts begin with `step`, or none."""
        return self._draws.get((em_round, step))

    def __contains__(self, key: RolloutKey) -> bool:
        """Whether the rollout belongs to a complete draw."""
        return key in self._known

    def __len__(self) -> int:
        return len(self._known)

    def snippet(self, key: RolloutKey) -> int:
        """Id of the snippet of a rollout that is there."""
        return self._known[key].snippet

    def weights_version(self, key: RolloutKey) -> int:
        """Version of the weights that sampled a rollout that is there."""
        return self._known[key].weights_version

    def read(self, key: RolloutKey, expert: Trajectory) -> Rollout:
        """A rollout that is there, put together with the `expert` trajectory it was drawn for.

        Raises UserError when that is another one, or when the file was damaged meanwhile.
        """
        place = self._known[key].place
        header, content = read_frame(place)
        return _unpack_rollout(header, content, expert, str(place.path))

    def close(self) -> None:
        """Close the file; nothing may be appended afterwards."""
        self._files.close()

    def __enter__(self) -> "RolloutLedger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ------------------------------------------------------------------------------------------------- rollouts


def _crc_of_ids(expert: Trajectory) -> int:
    return zlib.crc32(np.ascontiguousarray(expert.ids, dtype=np.int32).tobytes())


def packed(rollout: Rollout) -> tuple[dict[str, Any], bytes]:
    """The rollout as plain values and bytes, without the expert's text: what `unpacked` puts together again where the
    think sets may be numbered in another order."""
    header, arrays = _pack_rollout(rollout)
    return header, b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)


def unpacked(header: dict[str, Any], content: bytes, expert: Trajectory) -> Rollout:
    """Inverse of `packed`, for the `expert` trajectory it was drawn for. Raises UserError for another text."""
    return _unpack_rollout(header, content, expert, "rollouts of another process")


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
    expert = _crc_of_ids(_without_thoughts(rollout.trajectory))
    header = {"values": values, "columns": columns_of(arrays), "expert": expert}
    return header, list(arrays.values())


def _without_thoughts(trajectory: Trajectory) -> Trajectory:
    """The expert's ids; segments and decisions are left as they are."""
    kept = [trajectory.ids[s.start : s.end] for s in trajectory.segments if s.kind.name != "THOUGHT"]
    return replace(trajectory, ids=np.concatenate(kept))


def _unpack_rollout(header: dict[str, Any], content: bytes, expert: Trajectory, where: str) -> Rollout:
    if header["expert"] != _crc_of_ids(expert):
        raise UserError(
            f"{where}: rollouts of another text than {expert.name or 'this snippet'}; "
            "the corpus changed since they were drawn: use the first one, or start a new run"
        )
    arrays: dict[str, Any] = arrays_of(header["columns"], content)
    ends = np.cumsum(arrays.pop("thought_lengths"))
    ids = np.split(arrays.pop("thought_ids"), ends)[: len(ends)]
    thoughts = dict(zip(arrays.pop("thought_lines").tolist(), ids, strict=True))
    offered = set(arrays.pop("decision_lines").tolist())
    decisions = tuple(d for d in expert.decisions if d.line in offered)
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in header["values"].items()}
    return Rollout(trajectory=splice(replace(expert, decisions=decisions), thoughts), **arrays, **values)
