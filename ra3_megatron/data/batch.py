"""A micro-batch: what the data side hands to the training engine."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ra3_megatron.data.packing import TrainSequence
from ra3_megatron.data.trajectory import PADDING_KIND


@dataclass(frozen=True)
class TrainBatch:
    """Packed windows of one micro-batch, one after the other. tokens = micro_batch_size x seq_length, always.

    The constant length keeps the pipeline's messages of one shape. Padding at the end of a window is a sequence of its
    own whose tokens have weight 0.
    """

    input_ids: Tensor
    """[tokens] int64."""
    labels: Tensor
    """[tokens] int64: the next token of the same sequence; any id where no component has weight."""
    position_ids: Tensor
    """[tokens] int64, from 0 in every sequence, or from the end of its beginning (`prefixes`)."""
    cu_seqlens: Tensor
    """[sequences + 1] int32: boundaries of the sequences; the last entry is the number of tokens of the whole batch."""
    max_seqlen: int
    """Length of the longest sequence, its beginning included, tokens."""
    weights: dict[str, Tensor]
    """[tokens] fp32 per loss component: how much predicting `labels[i]` counts."""
    extras: dict[str, Tensor] = field(default_factory=dict)
    """[tokens] per name: advantages, log-probs of other policies; aligned with `labels`."""
    kinds: Tensor | None = None
    """[tokens] uint8: kind of `labels[i]` (`trajectory.Kind`), 255 where there is none; to report figures apart."""
    prefixes: tuple[int, ...] | None = None
    """Per sequence of `cu_seqlens`, which one before it, of the same window, is its beginning: attended to as well, and
    positions go on after it. -1 = none; None = no sequence has one."""

    def to(self, device: torch.device) -> "TrainBatch":
        """The same batch on `device`; copies are not waited for."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=move(self.input_ids),
            labels=move(self.labels),
            position_ids=move(self.position_ids),
            cu_seqlens=move(self.cu_seqlens),
            weights={k: move(v) for k, v in self.weights.items()},
            extras={k: move(v) for k, v in self.extras.items()},
            kinds=None if self.kinds is None else move(self.kinds),
        )


def context_parallel_indices(cu_seqlens: Tensor, rank: int, size: int) -> Tensor:
    """Positions of the tokens that context-parallel rank `rank` of `size` holds: [tokens / size] int64.

    Every sequence, a multiple of 2 x size tokens long, is cut into 2 x size chunks; the rank holds chunks `rank` and
    `2 x size - 1 - rank`, which gives all ranks the same causal work (Transformer Engine's THD partition).
    """
    starts = cu_seqlens[:-1].long()
    chunks = (cu_seqlens[1:].long() - starts) // (2 * size)
    if bool(((cu_seqlens[1:] - cu_seqlens[:-1]) % (2 * size)).any()):
        raise ValueError(f"context parallelism over {size} ranks needs sequences padded to a multiple of {2 * size}")
    pieces = [
        torch.arange(start + number * chunk, start + (number + 1) * chunk)
        for start, chunk in zip(starts.tolist(), chunks.tolist(), strict=True)
        for number in (rank, 2 * size - 1 - rank)
    ]
    return torch.cat(pieces).to(cu_seqlens.device)


def context_parallel_slice(batch: TrainBatch, rank: int, size: int) -> TrainBatch:
    """The shard of `batch` that context-parallel rank `rank` of `size` computes.

    Per-token tensors are cut; `cu_seqlens` and `max_seqlen` go on describing the whole batch, as attention needs them.
    """
    if size == 1:
        return batch
    if batch.prefixes is not None:
        raise ValueError(f"context parallelism over {size} ranks of sequences that share a beginning; share none")
    index = context_parallel_indices(batch.cu_seqlens, rank, size)
    return replace(
        batch,
        input_ids=batch.input_ids[index],
        labels=batch.labels[index],
        position_ids=batch.position_ids[index],
        weights={k: v[index] for k, v in batch.weights.items()},
        extras={k: v[index] for k, v in batch.extras.items()},
        kinds=None if batch.kinds is None else batch.kinds[index],
    )


def _shifted(
    windows: Sequence[Sequence[TrainSequence]],
    group: Literal["weights", "extras"],
    names: Sequence[str],
    layout: "_Layout",
) -> dict[str, Tensor]:
    """Per-token arrays of the sequences, moved one place to stand beside the labels."""
    out = {name: np.zeros(layout.tokens, dtype=np.float32) for name in names}
    for start, sequence in zip(layout.starts, (s for w in windows for s in w), strict=True):
        for name, values in getattr(sequence, group).items():
            out[name][start : start + len(sequence.ids) - 1] = values[1:]
    return {name: torch.from_numpy(values) for name, values in out.items()}


@dataclass(frozen=True)
class _Layout:
    """Where sequences start in the batch, the boundaries with padding, and which of them continue another."""

    starts: list[int]
    boundaries: list[int]
    prefixes: list[int]
    tokens: int


def _lay_out(windows: Sequence[Sequence[TrainSequence]], seq_length: int, pad_multiple: int) -> _Layout:
    starts: list[int] = []
    boundaries: list[int] = [0]
    prefixes: list[int] = []
    for number, window in enumerate(windows):
        position = number * seq_length
        for sequence in window:
            starts.append(position)
            boundaries += [position + branch for branch in sequence.branches]
            prefixes += [-1, *[len(prefixes)] * len(sequence.branches)]
            if sequence.branches and pad_multiple > 1:
                raise ValueError(f"sequences padded to a multiple of {pad_multiple} cannot share a beginning")
            position += -(-len(sequence.ids) // pad_multiple) * pad_multiple
            boundaries.append(position)
        end = (number + 1) * seq_length
        if position > end:
            raise ValueError(f"window {number} needs {position - end + seq_length} positions; it has {seq_length}")
        if position < end:
            boundaries.append(end)
            prefixes.append(-1)
    return _Layout(starts, boundaries, prefixes, len(windows) * seq_length)


def collate(
    windows: Sequence[Sequence[TrainSequence]],
    seq_length: int,
    pad_id: int,
    pad_multiple: int = 1,
    components: Sequence[str] = (),
    extras: Sequence[str] = (),
) -> TrainBatch:
    """One micro-batch of `len(windows) * seq_length` tokens.

    `seq_length` must be a multiple of `pad_multiple`. Padding after a sequence belongs to it, the rest of a window is a
    sequence of its own; both have weight 0. `components` are weights that the batch has even if no sequence names them,
    `extras` likewise; what a sequence does not name is 0.
    Raises ValueError when a window's sequences do not fit.
    """
    if seq_length % pad_multiple:
        raise ValueError(f"seq_length {seq_length} is no multiple of pad_multiple {pad_multiple}")
    layout = _lay_out(windows, seq_length, pad_multiple)
    flat = [s for w in windows for s in w]
    ids = np.full(layout.tokens, pad_id, dtype=np.int64)
    labels = np.full(layout.tokens, pad_id, dtype=np.int64)
    kinds = np.full(layout.tokens, PADDING_KIND, dtype=np.uint8) if any(s.kinds is not None for s in flat) else None
    for start, sequence in zip(layout.starts, flat, strict=True):
        end = start + len(sequence.ids)
        ids[start:end] = sequence.ids
        labels[start : end - 1] = sequence.ids[1:]
        if kinds is not None and sequence.kinds is not None:
            kinds[start : end - 1] = sequence.kinds[1:]
    boundaries = np.array(layout.boundaries, dtype=np.int64)
    lengths = np.diff(boundaries)
    prefixes = np.array(layout.prefixes, dtype=np.int64)
    before = np.where(prefixes >= 0, lengths[prefixes], 0)
    positions = np.arange(layout.tokens, dtype=np.int64) - np.repeat(boundaries[:-1] - before, lengths)
    names = dict.fromkeys([*components, *(n for s in flat for n in s.weights)])
    extra_names = dict.fromkeys([*extras, *(n for s in flat for n in s.extras)])
    return TrainBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(boundaries.astype(np.int32)),
        max_seqlen=int((lengths + before).max()),
        weights=_shifted(windows, "weights", list(names), layout),
        extras=_shifted(windows, "extras", list(extra_names), layout),
        kinds=None if kinds is None else torch.from_numpy(kinds),
        prefixes=tuple(layout.prefixes) if (prefixes >= 0).any() else None,
    )
