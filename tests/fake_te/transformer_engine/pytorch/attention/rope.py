"""Rotary embedding as the real fused kernel computes it: positions from 0 in every packed sequence."""

from itertools import pairwise

import torch


def apply_rotary_pos_emb(
    t,
    freqs,
    tensor_format="sbhd",
    start_positions=None,
    interleaved=False,
    fused=False,
    cu_seqlens=None,
    cp_size=1,
    cp_rank=0,
):
    assert fused
    assert cp_size == 1
    if tensor_format == "sbhd":
        return _rotate(t, freqs[: t.shape[0]])
    lengths = [b - a for a, b in pairwise(cu_seqlens.tolist())]
    assert max(lengths) <= freqs.shape[0], "the table is shorter than a sequence"
    parts = t.split(lengths)
    return torch.cat([_rotate(x[:, None], freqs[: x.shape[0]])[:, 0] for x in parts])


def _rotate(t, freqs):
    first, second = t.chunk(2, dim=-1)
    cos, sin = freqs.cos().to(t.dtype), freqs.sin().to(t.dtype)
    return t * cos + torch.cat((-second, first), dim=-1) * sin
