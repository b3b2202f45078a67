"""Core attention on torch's scaled_dot_product_attention: packed sequences, context parallelism, KV caches.

No path materialises the scores, and no path repeats keys and values for grouped queries: a group of query heads is
laid next to its one key head and the kernel reads that head again through a stride of zero.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention

_LAYOUT = "_ra3_layout"
_PREFIXES = "_ra3_prefixes"
_BOUNDARIES = "_ra3_boundaries"

_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
"""Later releases of torch want grouped queries announced."""


def packed_attention_here(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether `packed_attention` runs: torch's flash attention, on a GPU from Ampere on, in half precision."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and width % 8 == 0
        and width <= 256
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    most_queries: int,
    most_keys: int,
    scale: float | None,
) -> torch.Tensor:
    """Causal attention of many runs of tokens in one call; the last query of a run sees all of its keys.

    `q` [tq, heads, d], `k`, `v` [tk, kv_heads, d], runs one after the other; `queries`, `keys` int32 [runs + 1]: where
    each run begins, and the end; `most_queries`, `most_keys`: longest run. Returns [tq, heads, d]. Differentiable.
    """
    found = varlen_attn(q, k, v, queries, keys, most_queries, most_keys, scale=scale, window_size=(-1, 0), **_GROUPED)
    assert isinstance(found, torch.Tensor)
    return found


@dataclass(frozen=True)
class SeenKeys:
    """Keys of all sequences of a window one after the other, each with its beginning before its own."""

    index: torch.Tensor
    """int64 [keys]: which token of the window."""
    starts: torch.Tensor
    """int32 [sequences + 1]: where those of each sequence begin, and the end."""
    longest: int
    """Most keys of a sequence."""


def all_sequences(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: "PackedLayout",
    scale: float | None,
    attend: Callable[..., torch.Tensor] = packed_attention,
) -> torch.Tensor:
    """Attention of a whole window in one call of `attend`; `[t, heads, d]`."""
    starts, longest = layout.starts, max(layout.lengths)
    if layout.seen is None:
        return attend(query, key, value, starts, starts, longest, longest, scale)
    key, value = key.index_select(0, layout.seen.index), value.index_select(0, layout.seen.index)
    return attend(query, key, value, starts, layout.seen.starts, longest, layout.seen.longest, scale)


def _seen(boundaries: Sequence[int], prefixes: tuple[int, ...] | None, device: torch.device) -> SeenKeys | None:
    if prefixes is None:
        return None
    ranges = [torch.arange(a, b) for a, b in pairwise(boundaries)]
    parts = [torch.cat((ranges[p], own)) if p >= 0 else own for p, own in zip(prefixes, ranges, strict=True)]
    lengths = torch.tensor([0, *(len(p) for p in parts)], dtype=torch.int32)
    return SeenKeys(torch.cat(parts).to(device), lengths.cumsum(0).int().to(device), int(lengths.max()))


@dataclass(frozen=True)
class PackedLayout:
    """Boundaries of a packed window as Python numbers, read from the tensor once per window instead of per layer."""

    lengths: tuple[int, ...]
    """Padded length of every sequence over all context-parallel ranks, tokens."""
    starts: torch.Tensor
    """int32 [sequences + 1] on the device: where each of them begins, and the end."""
    order: torch.Tensor | None
    """Under context parallelism, where each token of the window lies in the keys gathered rank by rank."""
    prefixes: tuple[int, ...] | None = None
    """Per sequence, which one before it is its beginning, -1 where none; None = all stand alone."""
    seen: "SeenKeys | None" = None
    """What each sequence sees, where some have beginnings and all are computed in one call."""
    masks: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict, compare=False, repr=False)
    """Masks of sequences with a beginning by number of queries and keys, made in the first layer."""

    def tail_mask(self, queries: int, keys: int, device: torch.device) -> torch.Tensor | None:
        """Mask of queries that are the last positions of the keys; none where one query sees them all."""
        if queries == 1:
            return None
        if (queries, keys) not in self.masks:
            self.masks[queries, keys] = _causal_tail(queries, keys, device)
        return self.masks[queries, keys]


class SDPACoreAttention(MegatronModule):
    """Causal self-attention without dropout for `[sq, b, heads, d]` or packed `[t, heads, d]` queries.

    Packed windows follow Transformer Engine's THD partition: every sequence is padded to a multiple of 2 x CP and
    rank r holds its chunks r and 2 x CP - 1 - r. With a KV cache the queries are the last `sq` of the keys. An
    `attention_mask` (`[b or 1, 1, sq, sk]`, True = hidden, Megatron's convention) replaces the causal rule.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout or attention_type != "self" or config.window_size is not None:
            raise ValueError(
                f"SDPACoreAttention has no dropout, cross attention or sliding window; found dropout {dropout}, "
                f"type {attention_type}, window {config.window_size}"
            )
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.cp_group = pg_collection.cp
        self.layer_number = layer_number
        self.attn_mask_type = attn_mask_type
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend; returns `[sq, b, heads * d]`, or `[t, heads, d]` for a packed window."""
        assert attention_bias is None, "attention bias is not supported"
        cp_size = self.cp_group.size()
        if packed_seq_params is not None:
            if packed_seq_params.qkv_format != "thd":
                raise ValueError(f"packed windows must have qkv_format 'thd'; found {packed_seq_params.qkv_format!r}")
            layout = packed_layout(packed_seq_params, cp_size)
            if cp_size > 1:
                return self._packed_context_parallel(query, key, value, layout)
            return self._packed(query, key, value, layout)
        if cp_size > 1:
            raise ValueError("context parallelism needs packed windows (PackedSeqParams); found a plain batch")
        return self._batch(query, key, value, attention_mask)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """One run of tokens: `q` [tq, heads, d], `k`, `v` [tk, kv_heads, d]; causal when no mask; [tq, heads, d]."""
        tq, heads, width = q.shape
        tk, kv_heads, _ = k.shape
        groups = heads // kv_heads
        q = q.view(tq, kv_heads, groups, width).permute(1, 2, 0, 3)
        k = k.transpose(0, 1).unsqueeze(1).expand(kv_heads, groups, tk, width)
        v = v.transpose(0, 1).unsqueeze(1).expand(kv_heads, groups, tk, width)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and tq == tk > 1, scale=self.softmax_scale
        )
        return out.permute(2, 0, 1, 3).reshape(tq, heads, width)

    def _packed(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout
    ) -> torch.Tensor:
        _check_length(query.shape[0], sum(layout.lengths))
        if packed_attention_here(query.device, query.dtype, query.shape[-1]):
            return all_sequences(query, key, value, layout, self.softmax_scale)
        lengths = list(layout.lengths)
        runs = list(zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True))
        if layout.prefixes is None:
            done = [self._attend(q, k, v, None) for q, k, v in runs if q.shape[0]]
        else:
            done = [self._attend_after(runs, number, layout) for number, run in enumerate(runs) if run[0].shape[0]]
        return torch.cat(done) if len(done) > 1 else done[0]

    def _attend_after(
        self, runs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], number: int, layout: PackedLayout
    ) -> torch.Tensor:
        """A sequence that sees its beginning, if it has one, and itself; [tq, heads, d]."""
        q, k, v = runs[number]
        assert layout.prefixes is not None
        prefix = layout.prefixes[number]
        if prefix < 0:
            return self._attend(q, k, v, None)
        k, v = torch.cat((runs[prefix][1], k)), torch.cat((runs[prefix][2], v))
        return self._attend(q, k, v, layout.tail_mask(len(q), len(k), q.device))

    def _packed_context_parallel(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PackedLayout
    ) -> torch.Tensor:
        cp_size, cp_rank, width = self.cp_group.size(), self.cp_group.rank(), key.shape[-1]
        _check_length(query.shape[0] * cp_size, sum(layout.lengths))
        # One collective for keys and values; its backward is a reduce-scatter that adds every rank's share.
        both = gather_from_sequence_parallel_region(torch.cat((key, value), dim=-1).contiguous(), group=self.cp_group)
        assert layout.order is not None
        keys, values = both.index_select(0, layout.order).split((width, width), dim=-1)
        done, local, start = [], 0, 0
        for length in layout.lengths:
            chunk = length // (2 * cp_size)
            for number in (cp_rank, 2 * cp_size - 1 - cp_rank):
                seen = (number + 1) * chunk
                q = query[local : local + chunk]
                mask = _causal_tail(chunk, seen, query.device)
                done.append(self._attend(q, keys[start : start + seen], values[start : start + seen], mask))
                local += chunk
            start += length
        return torch.cat(done)

    def _batch(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor:
        sq, batch, heads, width = query.shape
        sk, kv_heads = key.shape[0], key.shape[2]
        groups = heads // kv_heads
        mask = None if attention_mask is None else ~attention_mask
        k, v = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)
        if sq == 1:
            # Decoding: the query heads of a group stand in a row as if they were positions; nothing is repeated.
            q = query.view(batch, kv_heads, groups, width)
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.softmax_scale)
            return out.reshape(1, batch, heads * width)
        if mask is None and sq < sk:
            mask = _causal_tail(sq, sk, query.device)
        q = query.permute(1, 2, 0, 3).reshape(batch * kv_heads, groups, sq, width)
        k = k.reshape(batch * kv_heads, 1, sk, width).expand(-1, groups, -1, -1)
        v = v.reshape(batch * kv_heads, 1, sk, width).expand(-1, groups, -1, -1)
        if mask is not None and mask.dim() == 4:
            mask = mask.expand(batch, kv_heads, sq, sk).reshape(batch * kv_heads, 1, sq, sk)
        out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale)
        return out.view(batch, heads, sq, width).permute(2, 0, 1, 3).reshape(sq, batch, heads * width)


def _check_length(found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(
            f"the packed window has {found} tokens but cu_seqlens ends at {expected}; "
            "padding at the end must be a sequence of its own"
        )


def _causal_tail(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """Mask `[queries, keys]`, True = seen, for queries that are the last positions of the keys."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def set_prefixes(params: PackedSeqParams, prefixes: tuple[int, ...]) -> None:
    """Say per sequence of the window which one before it is its beginning, -1 where none (`TrainBatch.prefixes`)."""
    setattr(params, _PREFIXES, prefixes)


def set_boundaries(params: PackedSeqParams, boundaries: Sequence[int]) -> None:
    """Give the boundaries of the window as numbers of this process, for who would else wait for the device to say them.

    They must be those of `cu_seqlens_q_padded`, or of `cu_seqlens_q` where that is None.
    """
    setattr(params, _BOUNDARIES, tuple(boundaries))


def boundaries_of(params: PackedSeqParams) -> tuple[int, ...]:
    """What `set_boundaries` gave, else read from the device."""
    known = getattr(params, _BOUNDARIES, None)
    if known is None:
        cu = params.cu_seqlens_q if params.cu_seqlens_q_padded is None else params.cu_seqlens_q_padded
        set_boundaries(params, known := tuple(cu.tolist()))
    return known


def prefixes_of(params: PackedSeqParams) -> tuple[int, ...] | None:
    """What `set_prefixes` said; None when it said nothing."""
    return getattr(params, _PREFIXES, None)


def packed_layout(params: PackedSeqParams, cp_size: int) -> PackedLayout:
    """Lengths of a packed window and, under context parallelism, the way back to token order.

    Computed once per window and kept on `params`. Raises ValueError when a sequence is not a multiple of 2 x CP.
    """
    found: Any = getattr(params, _LAYOUT, None)
    if found is not None:
        return found
    cu = params.cu_seqlens_q if params.cu_seqlens_q_padded is None else params.cu_seqlens_q_padded
    boundaries = boundaries_of(params)
    lengths = tuple(b - a for a, b in pairwise(boundaries))
    order = None
    if cp_size > 1:
        odd = [n for n in lengths if n % (2 * cp_size)]
        if odd:
            raise ValueError(
                f"context parallelism {cp_size} needs every packed sequence padded to a multiple of {2 * cp_size}; "
                f"found lengths {odd[:5]}"
            )
        order = _token_order(lengths, cp_size).to(cu.device)
    prefixes = prefixes_of(params)
    layout = PackedLayout(lengths, cu.int(), order, prefixes, _seen(boundaries, prefixes, cu.device))
    setattr(params, _LAYOUT, layout)
    return layout


def _token_order(lengths: tuple[int, ...], cp_size: int) -> torch.Tensor:
    """Where token i of the window lies when the ranks' shares (chunks r and 2 x CP - 1 - r) stand one after another."""
    per_rank, offset, pieces = sum(lengths) // cp_size, 0, []
    for length in lengths:
        chunk = length // (2 * cp_size)
        for number in range(2 * cp_size):
            rank = min(number, 2 * cp_size - 1 - number)
            begin = rank * per_rank + offset + (chunk if number >= cp_size else 0)
            pieces.append(torch.arange(begin, begin + chunk))
        offset += 2 * chunk
    return torch.cat(pieces)


def context_parallel_share(lengths: tuple[int, ...], cp_size: int, cp_rank: int) -> torch.Tensor:
    """Positions of a packed window that context-parallel rank `cp_rank` holds, in its order, `[tokens / cp_size]`.

    `lengths` are the padded lengths of the sequences, each a multiple of 2 x CP.
    """
    if cp_size == 1:
        return torch.arange(sum(lengths))
    pieces, start = [], 0
    for length in lengths:
        chunk = length // (2 * cp_size)
        mine = (cp_rank, 2 * cp_size - 1 - cp_rank)
        pieces += [torch.arange(start + n * chunk, start + (n + 1) * chunk) for n in mine]
        start += length
    return torch.cat(pieces)


def packed_params(lengths: tuple[int, ...], device: torch.device, cp_size: int = 1) -> PackedSeqParams:
    """Megatron's description of a packed window whose sequences have these padded `lengths` (over all CP ranks)."""
    cu = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    cu[1:] = torch.tensor(lengths).cumsum(0)
    boundaries, cu = cu.tolist(), cu.to(device)
    params = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=max(lengths), max_seqlen_kv=max(lengths)
    )
    if cp_size > 1:
        params.cu_seqlens_q_padded = params.cu_seqlens_kv_padded = cu
    set_boundaries(params, boundaries)
    packed_layout(params, cp_size)
    return params
