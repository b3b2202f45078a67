"""Where the new tokens of a forward pass belong, and which of them share an attention call.

All numbers of a pass go to the device in one copy: each copy by itself would wait for the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

BATCHED_QUERIES = 16
"""Rows with at most this many new tokens share one padded attention call; longer ones waste too much as padding."""

SPARSE = 1.5
"""Rows whose slots have gaps are attended to gaps and all while that is at most so many times as many rows: a copy of
their keys and values costs more."""

ALIGNED_KEYS = 8
"""Attention kernels of a GPU want the rows of a mask to begin at multiples of this many numbers."""


@dataclass(frozen=True)
class Run:
    """New tokens of one row: `count` of them from position `start` of slot `slot`."""

    slot: int
    start: int
    count: int


class Upload:
    """Whole numbers and float64s for the device, collected by name and sent as one tensor."""

    def __init__(self) -> None:
        self._arrays: dict[str, np.ndarray] = {}

    def add(self, name: str, values: np.ndarray | Sequence[int]) -> None:
        """`values` of any shape, int64 or float64."""
        array = np.asarray(values) if len(values) else np.zeros(0, dtype=np.int64)
        self._arrays[name] = array if array.dtype == np.float64 else array.astype(np.int64, copy=False)

    def send(self, device: torch.device) -> dict[str, Tensor]:
        """Everything on the device, under its name and in its shape."""
        flat = np.concatenate([a.reshape(-1).view(np.int64) for a in self._arrays.values()])
        there = torch.from_numpy(flat)
        if device.type == "cuda":
            there = there.pin_memory().to(device, non_blocking=True)
        found, at = {}, 0
        for name, array in self._arrays.items():
            part = there[at : at + array.size].view(array.shape)
            found[name] = part.view(torch.float64) if array.dtype == np.float64 else part
            at += array.size
        return found


@dataclass(frozen=True)
class Group:
    """Rows that share an attention call, padded to the longest of them."""

    slots: Tensor | slice
    """Their slots, [rows]."""
    take: Tensor | None
    """[rows, queries] index of every query among the new tokens; short rows repeat their last. None: each row has one,
    and the rows are all new tokens in order."""
    kept: Tensor | None
    """Which of the rows x queries results are no repetition; none = all."""
    target: Tensor | None
    """Index of each of these among the new tokens; none where `take` is."""
    keys: int
    """Longest row, tokens."""
    mask: Tensor
    """[rows, 1, queries, keys], added to the scores: 0 = seen, -inf = hidden."""


@dataclass(frozen=True)
class Single:
    """One row with many new tokens: `start:stop` of the new tokens, `past` tokens cached before."""

    slot: int
    start: int
    stop: int
    past: int
    mask: Tensor | None


@dataclass(frozen=True)
class PackedRuns:
    """Rows of any lengths in one attention call without padding."""

    take: Tensor
    """Index of their queries among the new tokens, int64 [queries]."""
    key_slots: Tensor | None
    """Slot of every key, int64 [keys]; none where no row has a past: the keys are then the new tokens' own."""
    key_positions: Tensor | None
    """Position of every key in its slot, int64 [keys]."""
    queries: Tensor
    """Where each row's queries begin, and their end, int32 [rows + 1]."""
    keys: Tensor
    """The same of keys."""
    longest: tuple[int, int]
    """Most queries and most keys of a row."""


@dataclass
class Layout:
    """Where the new tokens of one forward pass belong; made once, used by every layer."""

    tokens: int
    """New tokens of rows."""
    padding: int
    """Tokens behind them that belong to no row; they are written to a position no row has."""
    slots: Tensor
    """int64 [tokens + padding]: slot of every token."""
    write: Tensor
    """int64 [tokens + padding]: position its key is written to."""
    positions: Tensor
    """int64 [tokens + padding]: its position in its row."""
    groups: list[Group] = field(default_factory=list)
    """Attention calls of few tokens a row."""
    singles: list[Single] = field(default_factory=list)
    """Attention calls of one row each."""
    packed: PackedRuns | None = None
    """Attention call of the rows that are in neither."""
    rotation: tuple[Tensor, Tensor] | None = None
    """Cosine and signed sine of every new token, [tokens, 1, width], where the attention rotates."""


class LayoutPlan:
    """A layout on its way: what it needs on the device is put into an `Upload` first, and taken from there.

    `padding` and `scratch`: see `Layout`, the position is `scratch`. `pack`: rows with several new tokens share one
    packed call instead of padded ones and calls of their own.
    """

    def __init__(self, runs: Sequence[Run], padding: int, scratch: int, upload: Upload, pack: bool) -> None:
        self._runs, self._padding = runs, padding
        counts, slots, first = np.array([(r.count, r.slot, r.start) for r in runs]).T
        self._starts = counts.cumsum() - counts
        self._tokens = int(counts.sum())
        positions = np.arange(self._tokens) + (first - self._starts).repeat(counts)
        tail = np.zeros(padding, dtype=np.int64)
        upload.add("slots", np.concatenate((slots.repeat(counts), tail)))
        upload.add("write", np.concatenate((positions, tail + scratch)))
        upload.add("positions", np.concatenate((positions, tail)))
        buckets: dict[int, list[int]] = {}
        packed, self._singles = [], []
        for i, run in enumerate(runs):
            if pack and run.count > 1:
                packed.append(i)
            elif run.count <= BATCHED_QUERIES:
                buckets.setdefault((run.count - 1).bit_length(), []).append(i)
            else:
                self._singles.append(i)
        # In order of slots: their keys are then a slice of the cache, which need not be copied.
        ordered = [sorted(members, key=lambda i: runs[i].slot) for members in buckets.values()]
        self._groups = [
            _GroupPlan(f"group {n}", [runs[i] for i in m], self._starts[m], self._tokens, upload)
            for n, m in enumerate(ordered)
        ]
        self._packed = _PackedPlan([runs[i] for i in packed], self._starts[packed], upload) if packed else None

    def finish(self, sent: dict[str, Tensor], dtype: torch.dtype, room: int) -> Layout:
        """The layout, from what was sent. `dtype` is the queries', `room` the positions of a slot."""
        device = sent["slots"].device
        return Layout(
            self._tokens,
            self._padding,
            sent["slots"],
            sent["write"],
            sent["positions"],
            [g.finish(sent, dtype, room) for g in self._groups],
            [_single(self._runs[i], int(self._starts[i]), device) for i in self._singles],
            self._packed.finish(sent) if self._packed else None,
        )


class _GroupPlan:
    """`runs` by rising slot, `starts` [runs] their first tokens, `tokens` the pass's."""

    def __init__(self, name: str, runs: Sequence[Run], starts: np.ndarray, tokens: int, upload: Upload) -> None:
        counts, slots, first = np.array([(r.count, r.slot, r.start) for r in runs]).T
        span = int(slots[-1] - slots[0]) + 1
        self._name = name
        self._slots = slice(int(slots[0]), int(slots[0]) + span) if span <= SPARSE * len(runs) else None
        if self._slots is None:
            upload.add(f"{name} slots", slots)
        elif span > len(runs):
            # Slots in between take part, with a query of somebody else that sees one key: their results are left out.
            every = np.zeros((3, span), dtype=np.int64)
            every[:, slots - slots[0]] = counts, first, starts
            counts, first, starts = every
        index = np.arange(counts.max())
        clipped = np.minimum(index, np.maximum(counts - 1, 0)[:, None])
        real = index < counts[:, None]
        take = starts[:, None] + clipped
        self.keys = int((first + counts).max())
        upload.add(f"{name} seen", first[:, None] + clipped)
        self._in_order = take.shape == (tokens, 1) and bool((take[:, 0] == np.arange(tokens)).all())
        self._all = bool(real.all())
        if not self._in_order:
            upload.add(f"{name} take", take)
            upload.add(f"{name} target", take[real])
        if not self._all:
            upload.add(f"{name} kept", real.ravel().nonzero()[0])

    def finish(self, sent: dict[str, Tensor], dtype: torch.dtype, room: int) -> Group:
        """The group, from what was sent."""
        name, seen = self._name, sent[f"{self._name} seen"]
        keys = self.keys
        if seen.is_cuda:
            keys = min(room, -(-keys // ALIGNED_KEYS) * ALIGNED_KEYS)
        return Group(
            sent[f"{name} slots"] if self._slots is None else self._slots,
            None if self._in_order else sent[f"{name} take"],
            None if self._all else sent[f"{name} kept"],
            None if self._in_order else sent[f"{name} target"],
            keys,
            causal_mask(seen, keys, dtype),
        )


class _PackedPlan:
    """`runs` in any order, `starts` [runs] their first tokens."""

    def __init__(self, runs: Sequence[Run], starts: np.ndarray, upload: Upload) -> None:
        counts, slots, first = np.array([(r.count, r.slot, r.start) for r in runs]).T
        seen = first + counts
        upload.add("packed take", _ranges(starts, counts))
        upload.add("packed queries", np.concatenate(([0], counts.cumsum())))
        upload.add("packed keys", np.concatenate(([0], seen.cumsum())))
        self._past = bool(first.any())
        if self._past:
            upload.add("packed key slots", slots.repeat(seen))
            upload.add("packed key positions", _ranges(np.zeros_like(seen), seen))
        self._longest = int(counts.max()), int(seen.max())

    def finish(self, sent: dict[str, Tensor]) -> PackedRuns:
        """The packed rows, from what was sent."""
        return PackedRuns(
            sent["packed take"],
            sent["packed key slots"] if self._past else None,
            sent["packed key positions"] if self._past else None,
            sent["packed queries"].int(),
            sent["packed keys"].int(),
            self._longest,
        )


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`starts[i]`, `starts[i]` + 1, ... for `counts[i]` numbers, one range after the other."""
    return np.arange(counts.sum()) + (starts - (counts.cumsum() - counts)).repeat(counts)


def _single(run: Run, start: int, device: torch.device) -> Single:
    mask = None
    if run.start:
        seen = torch.ones(run.count, run.start + run.count, dtype=torch.bool, device=device)
        mask = seen.tril(run.start)
    return Single(run.slot, start, start + run.count, run.start, mask)


def causal_mask(seen: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """Added to scores of queries `seen` [rows, queries], the last key each of them sees; [rows, 1, queries, keys]."""
    hidden = torch.arange(keys, device=seen.device) > seen.unsqueeze(-1)
    return seen.new_zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf).unsqueeze(1)
