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

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ra3_megatron.model.factory import unwrap

BATCHED_QUERIES = 16
"""Rows with at most this many new tokens share one attention call; longer ones waste too much as padding."""


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
    """[rows, 1, queries, keys], True = seen."""


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

    `padding` tokens at the end belong to no row; they are written to `scratch`, a position no row has.
    """

    def __init__(self, runs: Sequence[Run], padding: int, scratch: int, device: torch.device) -> None:
        counts = torch.tensor([r.count for r in runs])
        slots = torch.tensor([r.slot for r in runs]).repeat_interleave(counts)
        positions = torch.cat([torch.arange(r.start, r.start + r.count) for r in runs])
        self.tokens = int(counts.sum())
        self.padding = padding
        self.slots = torch.cat((slots, slots.new_zeros(padding))).to(device)
        self.write = torch.cat((positions, positions.new_full((padding,), scratch))).to(device)
        self.positions = torch.cat((positions, positions.new_zeros(padding))).to(device)
        self.groups: list[_Group] = []
        self.singles: list[_Single] = []
        starts = [0, *counts.cumsum(0).tolist()]
        buckets: dict[int, list[int]] = {}
        for i, run in enumerate(runs):
            if run.count <= BATCHED_QUERIES:
                buckets.setdefault((run.count - 1).bit_length(), []).append(i)
            else:
                self.singles.append(_single(run, starts[i], device))
        for members in buckets.values():
            self.groups.append(_group([runs[i] for i in members], [starts[i] for i in members], device))


def _single(run: Run, start: int, device: torch.device) -> _Single:
    mask = None
    if run.start:
        seen = torch.ones(run.count, run.start + run.count, dtype=torch.bool, device=device)
        mask = seen.tril(run.start)
    return _Single(run.slot, start, start + run.count, run.start, mask)


def _group(runs: Sequence[Run], starts: Sequence[int], device: torch.device) -> _Group:
    slots = [r.slot for r in runs]
    count = max(r.count for r in runs)
    keys = max(r.start + r.count for r in runs)
    index = torch.arange(count).expand(len(runs), count)
    counts = torch.tensor([r.count for r in runs]).unsqueeze(1)
    clipped = torch.minimum(index, counts - 1)
    real = index < counts
    take = torch.tensor(starts).unsqueeze(1) + clipped
    positions = torch.tensor([r.start for r in runs]).unsqueeze(1) + clipped
    mask = torch.arange(keys) <= positions.unsqueeze(-1)
    consecutive = slots == list(range(slots[0], slots[0] + len(slots)))
    return _Group(
        slice(slots[0], slots[0] + len(slots)) if consecutive else torch.tensor(slots, device=device),
        take.to(device),
        None if bool(real.all()) else real.flatten().nonzero().squeeze(1).to(device),
        take[real].to(device),
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
        self.keys[layout.slots, :, layout.write] = key[:, 0].to(self.keys.dtype)
        self.values[layout.slots, :, layout.write] = value[:, 0].to(self.values.dtype)
        q = query[:, 0]
        out = torch.empty_like(q)
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


class CachedRotary(torch.nn.Module):
    """Rotary angles of the layout's positions, from the table of the embedding it stands in for."""

    def __init__(self, original: Any, length: int) -> None:
        super().__init__()
        self.table: Tensor = original.get_emb(length)
        self.layout: Layout | None = None

    def get_rotary_seq_len(self, *_args: Any, **_kwargs: Any) -> int:
        """Number of angles; Megatron passes it on to `forward`."""
        assert self.layout is not None
        return len(self.layout.positions)

    def forward(self, _max_seq_len: int, **_options: Any) -> Tensor:
        """Angles `[tokens, 1, 1, head_dim]`."""
        assert self.layout is not None
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
        self._rotary = CachedRotary(self._model.rotary_pos_emb, length)
        self._rotary.table = self._rotary.table.to(device)

    @property
    def bytes(self) -> int:
        """Memory of keys and values."""
        return sum(2 * a.keys.numel() * a.keys.element_size() for _, a in self._attentions)

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
