"""A key/value cache for rows of different lengths, plugged into an unchanged model for one forward pass.

Megatron-Core's own contexts do not fit: the static one has one length for all rows, the dynamic one insists on
flash-attn. Both seams used here exist in every layer specification: the core attention and the rotary embedding are
submodules without parameters. `plugged_in` puts ours in their place and takes them out again, so the model that trains
is not touched, and Transformer Engine's layers work like torch's. The new tokens of all rows are one plain sequence
[tokens, 1, hidden] for the model; only attention and positions know that they belong to different rows.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ra3_megatron.model.factory import unwrap

BATCHED_QUERIES = 16
"""Rows with at most this many new tokens share one attention call; longer ones waste too much as padding."""


SPARSE = 1.5
"""Rows whose slots have gaps are attended to gaps and all while that is at most so many times as many rows: a copy of
their keys and values costs more."""


@dataclass(frozen=True)
class Run:
    """New tokens of one row: `count` of them from position `start` of slot `slot`."""

    slot: int
    start: int
    count: int


@dataclass(frozen=True)
class _Group:
    """Rows that share an attention call."""

    slots: Tensor | slice
    """Their slots, [rows]."""
    take: Tensor
    """[rows, queries] index of every query among the new tokens; short rows repeat their last."""
    kept: Tensor | None
    """Which of the rows x queries results are no repetition; none = all."""
    target: Tensor
    """Index of each of these among the new tokens."""
    keys: int
    """Longest row, tokens."""
    mask: Tensor
    """[rows, 1, queries, keys], added to the scores: 0 = seen, -inf = hidden."""


@dataclass(frozen=True)
class _Single:
    """One row with many new tokens: `start:stop` of the new tokens, `past` tokens cached before."""

    slot: int
    start: int
    stop: int
    past: int
    mask: Tensor | None


class Layout:
    """Where the new tokens of one forward pass belong; made once, used by every layer.

    `padding` tokens at the end belong to no row; they are written to `scratch`, a position no row has. `dtype` is the
    queries'.
    """

    def __init__(
        self, runs: Sequence[Run], padding: int, scratch: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        counts = np.array([r.count for r in runs])
        ends = counts.cumsum()
        starts = ends - counts
        self.tokens, self.padding = int(ends[-1]), padding
        first = np.array([r.start for r in runs])
        positions = np.arange(self.tokens) + (first - starts).repeat(counts)
        slots = np.array([r.slot for r in runs]).repeat(counts)
        self.slots = _tensor(np.pad(slots, (0, padding)), device)
        self.write = _tensor(np.pad(positions, (0, padding), constant_values=scratch), device)
        self.positions = _tensor(np.pad(positions, (0, padding)), device)
        self.rotation: tuple[Tensor, Tensor] | None = None
        """Cosine and signed sine of every new token, [tokens, 1, width], where the attention rotates."""
        self.groups: list[_Group] = []
        self.singles: list[_Single] = []
        buckets: dict[int, list[int]] = {}
        for i, run in enumerate(runs):
            if run.count <= BATCHED_QUERIES:
                buckets.setdefault((run.count - 1).bit_length(), []).append(i)
            else:
                self.singles.append(_single(run, int(starts[i]), device))
        for members in buckets.values():
            # In order of slots: their keys are then a slice of the cache, which need not be copied.
            members.sort(key=lambda i: runs[i].slot)
            self.groups.append(_group([runs[i] for i in members], starts[members], device, dtype))


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device)


def _single(run: Run, start: int, device: torch.device) -> _Single:
    mask = None
    if run.start:
        seen = torch.ones(run.count, run.start + run.count, dtype=torch.bool, device=device)
        mask = seen.tril(run.start)
    return _Single(run.slot, start, start + run.count, run.start, mask)


def _group(runs: Sequence[Run], starts: np.ndarray, device: torch.device, dtype: torch.dtype) -> _Group:
    """`runs` by rising slot, `starts` [runs] their first tokens."""
    slots = np.array([r.slot for r in runs])
    counts = np.array([r.count for r in runs])
    first = np.array([r.start for r in runs])
    span = int(slots[-1] - slots[0]) + 1
    sliced = span <= SPARSE * len(runs)
    if sliced and span > len(runs):
        # Slots in between take part, with a query of somebody else that sees one key: their results are left out.
        every = np.zeros((3, span), dtype=np.int64)
        every[:, slots - slots[0]] = counts, first, starts
        counts, first, starts = every
    index = np.arange(counts.max())
    clipped = np.minimum(index, np.maximum(counts - 1, 0)[:, None])
    real = index < counts[:, None]
    take = starts[:, None] + clipped
    keys = int((first + counts).max())
    hidden = np.arange(keys) > (first[:, None] + clipped)[:, :, None]
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf)
    return _Group(
        slice(int(slots[0]), int(slots[0]) + span) if sliced else _tensor(slots, device),
        _tensor(take, device),
        None if real.all() else _tensor(real.ravel().nonzero()[0], device),
        _tensor(take[real], device),
        keys,
        mask.unsqueeze(1).to(device),
    )


class CachedAttention(torch.nn.Module):
    """Core attention of one layer: writes the new keys and values into the cache and attends to the row's.

    `keys`, `values` [slots, kv_heads, max_tokens + 1, width]. They start as zeros: a hidden key has weight 0, and 0
    times the NaN of uninitialised memory would be NaN.
    """

    def __init__(self, slots: int, length: int, config: Any, kv_heads: int, device: torch.device) -> None:
        super().__init__()
        self.keys = torch.zeros(slots, kv_heads, length, config.kv_channels, dtype=config.params_dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.scale: float | None = config.softmax_scale
        self.layout: Layout | None = None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_mask: Any, **_options: Any) -> Tensor:
        """`query` [tokens, 1, heads, d], `key`, `value` [tokens, 1, kv_heads, d]; returns [tokens, 1, heads * d]."""
        layout = self.layout
        assert layout is not None
        q, key = query[:, 0], key[:, 0]
        if layout.rotation is not None:
            q, key = _rotated(torch.cat((q, key), 1), *layout.rotation).split((q.size(1), key.size(1)), 1)
        self.keys[layout.slots, :, layout.write] = key.to(self.keys.dtype)
        self.values[layout.slots, :, layout.write] = value[:, 0].to(self.values.dtype)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for single in layout.singles:
            seen = single.past + single.stop - single.start
            k, v = (t[single.slot : single.slot + 1, :, :seen] for t in (self.keys, self.values))
            part = self._attend(q[single.start : single.stop].unsqueeze(0), k, v, single.mask)
            out[single.start : single.stop] = part[0]
        for group in layout.groups:
            # Cut to the longest row before the rows are gathered: gathering copies.
            k, v = (t[:, :, : group.keys][group.slots] for t in (self.keys, self.values))
            part = self._attend(q[group.take], k, v, group.mask)
            part = part.flatten(0, 1)
            out[group.target] = part if group.kept is None else part[group.kept]
        out[layout.tokens :] = 0
        return out.flatten(1).unsqueeze(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """`q` [rows, n, heads, width], `k`, `v` [rows, kv_heads, keys, width]; causal when no mask; shape of `q`."""
        rows, n, heads, width = q.shape
        kv_heads, keys = k.shape[1:3]
        groups = heads // kv_heads
        if n == 1:
            # The query heads of a key head stand in a row as if they were positions; nothing is repeated.
            q = q.view(rows, kv_heads, groups, width)
            return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale).reshape(
                rows, 1, heads, width
            )
        q = q.view(rows, n, kv_heads, groups, width).permute(0, 2, 3, 1, 4).reshape(rows * kv_heads, groups, n, width)
        k = k.reshape(rows * kv_heads, 1, keys, width).expand(-1, groups, -1, -1)
        v = v.reshape(rows * kv_heads, 1, keys, width).expand(-1, groups, -1, -1)
        if mask is not None and mask.dim() == 4:
            mask = mask.expand(rows, kv_heads, n, keys).reshape(rows * kv_heads, 1, n, keys)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale)
        return out.view(rows, heads, n, width).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries and keys `x` [tokens, heads, width] turned as Megatron does, number for number; `sin` has the sign."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((second, first), -1) * sin


class CachedRotary(torch.nn.Module):
    """Rotary angles of the layout's positions, from the table of the embedding it stands in for.

    Megatron's torch code takes sines and cosines of them anew in every layer, for queries and for keys. Where it is
    that code (`fused` is Transformer Engine's kernel), the layers get no angles and the attention rotates.
    """

    def __init__(self, original: Any, length: int, fused: bool, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        table: Tensor = original.get_emb(length).to(device)
        angles = table[:, 0]
        sin, half = angles.sin(), angles.size(-1) // 2
        self.table = table if fused else None
        self.cos, self.sin = angles.cos().to(dtype), torch.cat((-sin[..., :half], sin[..., half:]), -1).to(dtype)
        self.layout: Layout | None = None

    def get_rotary_seq_len(self, *_args: Any, **_kwargs: Any) -> int:
        """Number of angles; Megatron passes it on to `forward`."""
        assert self.layout is not None
        return len(self.layout.positions)

    def forward(self, _max_seq_len: int, **_options: Any) -> Tensor | None:
        """Angles `[tokens, 1, 1, head_dim]`, or none."""
        assert self.layout is not None
        if self.table is None:
            self.layout.rotation = self.cos[self.layout.positions], self.sin[self.layout.positions]
            return None
        return self.table[self.layout.positions].view(len(self.layout.positions), 1, 1, -1)


class ChunkCache:
    """The plug-ins of one model chunk."""

    def __init__(self, chunk: torch.nn.Module, slots: int, length: int, device: torch.device) -> None:
        self._model = unwrap(chunk)
        config = self._model.config
        kv_heads = config.num_query_groups // config.tensor_model_parallel_size
        self._attentions = [
            (layer.self_attention, CachedAttention(slots, length, config, kv_heads, device))
            for layer in self._model.decoder.layers
        ]
        self._rotary = CachedRotary(
            self._model.rotary_pos_emb, length, config.apply_rope_fusion, config.params_dtype, device
        )

    @property
    def bytes(self) -> int:
        """Memory of keys and values."""
        return sum(2 * a.keys.numel() * a.keys.element_size() for _, a in self._attentions)

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Keys and values of the first `tokens` positions of a slot to another."""
        for _, attention in self._attentions:
            attention.keys[target, :, :tokens] = attention.keys[source, :, :tokens]
            attention.values[target, :, :tokens] = attention.values[source, :, :tokens]

    @contextmanager
    def plugged_in(self, layout: Layout) -> Iterator[None]:
        """The model attends through this cache inside the block, without gradients and in evaluation mode.

        It stays in evaluation mode: going back and forth at every token costs a tenth of a small model's pass.
        """
        owners = [owner for owner, _ in self._attentions]
        originals = [owner.core_attention for owner in owners]
        rotary = self._model.rotary_pos_emb
        if self._model.training:
            self._model.eval()
        try:
            for owner, cached in self._attentions:
                cached.layout = layout
                owner.core_attention = cached
            self._rotary.layout = layout
            self._model.rotary_pos_emb = self._rotary
            with torch.no_grad():
                yield
        finally:
            for owner, original in zip(owners, originals, strict=True):
                owner.core_attention = original
            self._model.rotary_pos_emb = rotary
