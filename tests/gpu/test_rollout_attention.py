"""Packed attention on a GPU against its definition, forward and backward."""

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.model.attention import (
    SDPACoreAttention,
    packed_attention,
    packed_attention_here,
    packed_params,
    set_prefixes,
)
from ra3_megatron.model.factory import build_transformer_config
from tests.gpu.rollouts import ARCH
from tests.unit.model.packed import slow_packed


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the rounding of bf16 numbers of the order of the largest."""
    assert (found.float() - expected.float()).abs().max() <= 0.02 * expected.float().abs().max()


def starts(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int().cuda()


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("heads", [(8, 8), (8, 2)], ids=["own keys", "grouped"])
@pytest.mark.parametrize("lengths", [((7, 1, 60), (7, 1, 60)), ((1, 5, 33), (9, 5, 100))], ids=["whole", "with a past"])
def test_packed_attention(width, heads, lengths):
    """Grouped queries taken for as many key heads, or the causal triangle at the wrong end of the keys."""
    torch.manual_seed(0)
    queries, keys = lengths
    q = random(sum(queries), heads[0], width)
    k, v = random(sum(keys), heads[1], width), random(sum(keys), heads[1], width)
    assert packed_attention_here(q.device, q.dtype, width)
    given = (starts(queries), starts(keys), max(queries), max(keys), None)
    out = packed_attention(q, k, v, *given)
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    expected = slow_packed(*wide, *given)
    close(out, expected)
    weights = torch.randn_like(expected)
    found = torch.autograd.grad((out.float() * weights).sum(), (q, k, v))
    for ours, theirs in zip(found, torch.autograd.grad((expected * weights).sum(), wide), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("prefixes", [None, (-1, 0, 0, -1, 3)], ids=["alone", "with beginnings"])
def test_training_windows(parallel, prefixes):
    """The one call of a GPU against the loop over sequences of a CPU."""
    torch.manual_seed(0)
    lengths = (70, 40, 1, 120, 25)
    model = ModelConfig(precision="bf16", layers="local")
    config = build_transformer_config(ARCH, model, parallel.sizes, False, True)
    attention = SDPACoreAttention(config, 1, AttnMaskType.causal, "self", pg_collection=parallel.pg_collection)
    q = random(sum(lengths), ARCH.num_heads, ARCH.head_dim)
    k, v = (random(sum(lengths), ARCH.num_kv_heads, ARCH.head_dim) for _ in range(2))
    outs = []
    for device in ("cuda", "cpu"):
        params = packed_params(lengths, torch.device(device))
        if prefixes is not None:
            del params._ra3_layout
            set_prefixes(params, prefixes)
        outs.append(attention(*(t.to(device) for t in (q, k, v)), None, packed_seq_params=params).flatten(1))
    close(outs[0].cpu(), outs[1])
    weights = torch.randn_like(outs[1])
    found = torch.autograd.grad((outs[0] * weights.cuda()).sum(), (q, k, v))
    for ours, theirs in zip(found, torch.autograd.grad((outs[1] * weights).sum(), (q, k, v)), strict=True):
        close(ours, theirs)
