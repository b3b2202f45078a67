"""Attention over sequences one by one, in the layouts of the real module."""

from itertools import pairwise

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformer_engine.pytorch.attention import rope
from transformer_engine.pytorch.modules import Module

__all__ = ["DotProductAttention", "rope"]


class DotProductAttention(Module):
    """Keeps the keyword arguments of its last call in `seen`."""

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        sequence_parallel=False,
        tp_size=1,
        get_rng_state_tracker=None,
        tp_group=None,
        layer_number=None,
        attention_type="self",
        cp_group=None,
        cp_global_ranks=None,
        cp_stream=None,
        cp_comm_type="p2p",
        softmax_scale=None,
    ):
        super().__init__()
        self.softmax_scale = softmax_scale
        self.seen = {}

    def forward(self, query_layer, key_layer, value_layer, attention_mask=None, **given):
        self.init_fp8_metadata()
        self.seen = given
        if given.get("qkv_format", "sbhd") == "sbhd":
            q, k, v = (x.permute(1, 2, 0, 3) for x in (query_layer, key_layer, value_layer))
            out = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=True)
            return out.permute(2, 0, 1, 3).reshape(query_layer.shape[0], query_layer.shape[1], -1)
        assert given["cu_seqlens_q"].dtype == torch.int32
        assert given["attn_mask_type"] == "padding_causal"
        assert isinstance(given["max_seqlen_q"], int)
        done = []
        for a, b in pairwise(given["cu_seqlens_q"].tolist()):
            q, k, v = (x[a:b].transpose(0, 1) for x in (query_layer, key_layer, value_layer))
            done.append(
                scaled_dot_product_attention(
                    q[None], k[None], v[None], is_causal=True, scale=self.softmax_scale, enable_gqa=True
                )[0].transpose(0, 1)
            )
        return torch.cat(done).reshape(query_layer.shape[0], -1)
