"""Packing of sequences of different length into windows of one length, without attention from one to another."""

import hashlib
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ra3_megatron.config.errors import UserError
from ra3_megatron.data.store import TrajectoryStore
from ra3_megatron.data.trajectory import Kind, Trajectory

BUFFER = 16384
"""Sequences packed together; more packs tighter, fewer leaves the order closer to a plain shuffle."""


@dataclass(frozen=True)
class TrainSequence:
    """One sequence of a window. All arrays are aligned with the tokens.

    `ids` int32 `[n]`. `weights[component][i]` float32: how much predicting `ids[i]` counts (the first token is never
    predicted). `extras` float32 `[n]` per name, likewise. `kinds` uint8 `[n]` (`trajectory.Kind`).
    `branches`: where continuations of one beginning start, for a sequence that is a beginning `ids[:branches[0]]` and
    several continuations of it, one after the other, that do not see each other; empty = an ordinary sequence. The
    first token of a continuation is predicted by nothing in the window.
    """

    ids: np.ndarray
    weights: dict[str, np.ndarray]
    extras: dict[str, np.ndarray] = field(default_factory=dict)
    kinds: np.ndarray | None = None
    branches: tuple[int, ...] = ()

    @property
    def unshared_tokens(self) -> int:
        """Tokens of the texts it stands for, each with the beginning."""
        return len(self.ids) + max(0, len(self.branches) - 1) * (self.branches[0] if self.branches else 0)


@dataclass(frozen=True)
class Packing:
    """Which sequences share a window: those of window w are `order[ends[w]:ends[w + 1]]`.

    `order` int64 `[sequences]`, `ends` int64 `[windows + 1]`; `tokens` useful tokens in all.
    """

    order: np.ndarray
    ends: np.ndarray
    seq_length: int
    pad_multiple: int
    tokens: int

    def __len__(self) -> int:
        return len(self.ends) - 1

    def window(self, number: int) -> np.ndarray:
        """Numbers of the sequences in a window, int64 `[sequences]`."""
        return self.order[self.ends[number] : self.ends[number + 1]]

    @property
    def useful(self) -> float:
        """Useful tokens over all positions, 0 to 1."""
        return self.tokens / (len(self) * self.seq_length) if len(self) else 0.0


def padded(lengths: np.ndarray, multiple: int) -> np.ndarray:
    """Lengths rounded up to a multiple."""
    return -(-np.asarray(lengths, dtype=np.int64) // multiple) * multiple


def _best_fit(sizes: list[int], seq_length: int) -> list[list[int]]:
    """Bins of positions in `sizes` (falling), each put where the least room is left over."""
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []  # rooms of open bins, sorted, each once
    for position, size in enumerate(sizes):
        at = bisect_left(rooms, size)
        if at == len(rooms):
            target, room = len(bins), seq_length
            bins.append([])
        else:
            room = rooms[at]
            target = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
        bins[target].append(position)
        room -= size
        if room:
            if room not in by_room:
                by_room[room] = []
                rooms.insert(bisect_left(rooms, room), room)
            by_room[room].append(target)
    return bins


def pack(lengths: np.ndarray, seq_length: int, pad_multiple: int = 1, seed: int = 0, buffer: int = BUFFER) -> Packing:
    """Best-fit-decreasing packing within buffers of a seeded shuffle; equal arguments give equal windows.

    `lengths` `[sequences]` tokens, each up to `seq_length`. Every sequence takes a multiple of `pad_multiple`
    positions, which must divide `seq_length`; context parallelism over n ranks needs 2n. Choose it once for a run, for
    the most ranks the run may be resumed with: another value gives other windows.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if seq_length % pad_multiple:
        raise UserError(
            f"sequence length {seq_length} is no multiple of {pad_multiple} (2 x context-parallel ranks); "
            f"use {padded(np.array(seq_length), pad_multiple)}"
        )
    if len(lengths) and int(lengths.max()) > seq_length:
        raise UserError(
            f"a sequence has {int(lengths.max())} tokens; windows hold {seq_length}; split it or raise that"
        )
    used = lengths > 0
    sizes = padded(lengths, pad_multiple)
    shuffled = np.random.default_rng([seed, len(lengths)]).permutation(np.flatnonzero(used))
    windows: list[np.ndarray] = []
    for begin in range(0, len(shuffled), buffer):
        part = shuffled[begin : begin + buffer]
        part = part[np.argsort(-sizes[part], kind="stable")]
        windows += [part[members] for members in _best_fit(sizes[part].tolist(), seq_length)]
    order = np.concatenate(windows) if windows else np.zeros(0, np.int64)
    ends = np.cumsum([0, *map(len, windows)], dtype=np.int64)
    return Packing(order, ends, seq_length, pad_multiple, int(lengths.sum()))


def train_sequence(
    trajectory: Trajectory, eos_id: int | None, loss_on: Literal["all", "code"] = "all"
) -> TrainSequence:
    """Next-token prediction on a trajectory: `cross_entropy` is 1 on thoughts and code (`all`) or on code, else 0.

    The prompt, start token included, has no weight. The end token follows where the document ends and counts as code.
    `code_cross_entropy` is 1 on code whatever the loss is on: figures compare between texts with and without thoughts.
    """
    ids, kinds = trajectory.ids, trajectory.kinds()
    if trajectory.ends_document and eos_id is not None:
        ids = np.append(ids, np.int32(eos_id))
        kinds = np.append(kinds, np.uint8(Kind.CODE))
    code = (kinds == Kind.CODE).astype(np.float32)
    counted = (kinds != Kind.PROMPT).astype(np.float32) if loss_on == "all" else code
    return TrainSequence(ids, {"cross_entropy": counted, "code_cross_entropy": code}, kinds=kinds)


class PackedWindows:
    """Windows over a store of trajectories, made when asked for.

    `fingerprint` names content and packing, for the sampler's state.
    """

    def __init__(
        self,
        store: TrajectoryStore,
        seq_length: int,
        eos_id: int | None,
        pad_multiple: int = 1,
        seed: int = 0,
        make: Callable[[Trajectory, int | None], TrainSequence] = train_sequence,
    ):
        self._store, self._eos_id, self._make = store, eos_id, make
        lengths = store.lengths + (store.ends_document if eos_id is not None else 0)
        self.packing = pack(lengths, seq_length, pad_multiple, seed)
        if not len(self.packing):
            raise UserError(f"{store.folder} holds no tokens; prepare a larger corpus or a larger validation fraction")
        digest = hashlib.sha256(f"{store.fingerprint} {seq_length} {pad_multiple} {eos_id}".encode())
        digest.update(self.packing.order.tobytes())
        digest.update(self.packing.ends.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.packing)

    def __getitem__(self, number: int) -> list[TrainSequence]:
        return [self._make(self._store[int(i)], self._eos_id) for i in self.packing.window(number)]
