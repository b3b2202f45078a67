"""A key/value cache for rows of different lengths, plugged into an unchanged model for one forward pass.

Megatron-Core's own contexts do not fit: the static one has one length for all rows, the dynamic one insists on
flash-attn. Both seams used here exist in every layer specification: the core attention and the rotary embedding are
submodules without parameters. `plugged_in` puts ours in their place and takes them out again, so the model that trains
is not touched, and Transformer Engine's layers work like torch's. The new tokens of all rows are one plain sequence
[tokens, 1, hidden] for the model; only attention and positions know that they belong to different rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from ra3_megatron.model.factory import unwrap
from ra3_megatron.rollout.layout import Layout, PackedRuns

PackedAttention = Callable[..., Tensor]
"""`(q [tq, heads, d], k, v [tk, kv_heads, d], starts of queries, of keys, most queries, most keys, scale)` -> like `q`;
causal, the last query of a row sees all of its keys (`model.attention.packed_attention`)."""


class Current:
    """What the plug-ins of a chunk share: the layout of the pass that is running."""

    layout: Layout | None = None

    def __call__(self) -> Layout:
        assert self.layout is not None, "no pass is running"
        return self.layout


class CachedAttention(torch.nn.Module):
    """Core attention of one layer: writes the new keys and values into the cache and attends to the row's.

    `keys`, `values` [slots, kv_heads, length, width]. They start as zeros: a hidden key has weight 0, and 0 times the
    NaN of uninitialised memory would be NaN.
    """

    def __init__(
        self, keys: Tensor, values: Tensor, scale: float | None, current: Current, packed: PackedAttention | None
    ) -> None:
        super().__init__()
        self.keys, self.values, self.scale = keys, values, scale
        self._current, self._packed = current, packed

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_mask: Any, **_options: Any) -> Tensor:
        """`query` [tokens, 1, heads, d], `key`, `value` [tokens, 1, kv_heads, d]; returns [tokens, 1, heads * d]."""
        layout = self._current()
        q, key, value = query[:, 0], key[:, 0], value[:, 0]
        if layout.rotation is not None:
            q, key = _rotated(torch.cat((q, key), 1), *layout.rotation).split((q.size(1), key.size(1)), 1)
        self.keys[layout.slots, :, layout.write] = key.to(self.keys.dtype)
        self.values[layout.slots, :, layout.write] = value.to(self.values.dtype)
        first = layout.groups[0] if layout.groups else None
        if first is not None and first.take is None:
            k, v = (t[:, :, : first.keys][first.slots] for t in (self.keys, self.values))
            out = self._attend(q[: layout.tokens].unsqueeze(1), k, v, first.mask).flatten(1)
            return pad(out, (0, 0, 0, layout.padding)).unsqueeze(1)
        out = q.new_empty(q.shape)
        for single in layout.singles:
            seen = single.past + single.stop - single.start
            k, v = (t[single.slot : single.slot + 1, :, :seen] for t in (self.keys, self.values))
            part = self._attend(q[single.start : single.stop].unsqueeze(0), k, v, single.mask)
            out[single.start : single.stop] = part[0]
        for group in layout.groups:
            # Cut to the longest row before the rows are gathered: gathering copies.
            k, v = (t[:, :, : group.keys][group.slots] for t in (self.keys, self.values))
            part = self._attend(q[group.take], k, v, group.mask).flatten(0, 1)
            out[group.target] = part if group.kept is None else part[group.kept]
        if layout.packed is not None:
            out[layout.packed.take] = self._attend_packed(layout.packed, q, key, value)
        out[layout.tokens :] = 0
        return out.flatten(1).unsqueeze(1)

    def _attend_packed(self, runs: PackedRuns, q: Tensor, key: Tensor, value: Tensor) -> Tensor:
        assert self._packed is not None, "a packed layout on a device without packed attention"
        if runs.key_slots is None:
            k, v = key[runs.take], value[runs.take]
        else:
            k, v = (t[runs.key_slots, :, runs.key_positions] for t in (self.keys, self.values))
        return self._packed(q[runs.take], k, v, runs.queries, runs.keys, *runs.longest, self.scale)

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

    def __init__(
        self, original: Any, length: int, fused: bool, dtype: torch.dtype, device: torch.device, current: Current
    ) -> None:
        super().__init__()
        table: Tensor = original.get_emb(length).to(device)
        angles = table[:, 0]
        sin, half = angles.sin(), angles.size(-1) // 2
        self.table = table if fused else None
        self.cos, self.sin = angles.cos().to(dtype), torch.cat((-sin[..., :half], sin[..., half:]), -1).to(dtype)
        self._current = current

    def get_rotary_seq_len(self, *_args: Any, **_kwargs: Any) -> int:
        """Number of angles; Megatron passes it on to `forward`."""
        return len(self._current().positions)

    def forward(self, _max_seq_len: int, **_options: Any) -> Tensor | None:
        """Angles `[tokens, 1, 1, head_dim]`, or none."""
        layout = self._current()
        if self.table is None:
            layout.rotation = self.cos[layout.positions], self.sin[layout.positions]
            return None
        return self.table[layout.positions].view(len(layout.positions), 1, 1, -1)


class ChunkCache:
    """The plug-ins of one model chunk. `packed`: attention of rows without padding, where the device has it."""

    def __init__(
        self,
        chunk: torch.nn.Module,
        slots: int,
        length: int,
        device: torch.device,
        packed: PackedAttention | None = None,
    ) -> None:
        self._model = unwrap(chunk)
        self._current = current = Current()
        config = self._model.config
        kv_heads = config.num_query_groups // config.tensor_model_parallel_size
        # One block of memory for all layers, so that a row is copied at once.
        layers = list(self._model.decoder.layers)
        shape = (len(layers), slots, kv_heads, length, config.kv_channels)
        self._keys = torch.zeros(shape, dtype=config.params_dtype, device=device)
        self._values = torch.zeros_like(self._keys)
        self._attentions = [
            (layer.self_attention, CachedAttention(k, v, config.softmax_scale, current, packed))
            for layer, k, v in zip(layers, self._keys, self._values, strict=True)
        ]
        self._rotary = CachedRotary(
            self._model.rotary_pos_emb, length, config.apply_rope_fusion, config.params_dtype, device, current
        )

    @property
    def bytes(self) -> int:
        """Memory of keys and values."""
        return 2 * self._keys.numel() * self._keys.element_size()

    def copy(self, source: int, target: int, tokens: int) -> None:
        """Keys and values of the first `tokens` positions of a slot to another."""
        for memory in (self._keys, self._values):
            memory[:, target, :, :tokens] = memory[:, source, :, :tokens]

    @contextmanager
    def plugged_in(self, layout: Layout) -> Iterator[None]:
        """The model attends through this cache inside the block, without gradients and in evaluation mode.

        It stays in evaluation mode: going back and forth at every token costs a tenth of a small model's pass.
        """
        originals = [owner.core_attention for owner, _ in self._attentions]
        rotary = self._model.rotary_pos_emb
        if self._model.training:
            self._model.eval()
        try:
            # Into the modules' dictionary: `torch.nn.Module.__setattr__` costs as much as a small matrix product, and
            # there are as many of these as layers, at every token.
            for owner, cached in self._attentions:
                owner._modules["core_attention"] = cached
            self._current.layout = layout
            self._model.rotary_pos_emb = self._rotary
            with torch.no_grad():
                yield
        finally:
            for (owner, _), original in zip(self._attentions, originals, strict=True):
                owner._modules["core_attention"] = original
            self._current.layout = None
            self._model.rotary_pos_emb = rotary
