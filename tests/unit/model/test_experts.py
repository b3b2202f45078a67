"""Mixtures of experts: routing as in Hugging Face, and what tells experts from other parameters."""

import dataclasses

import pytest
import torch

from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.model.attention import packed_params
from ra3_megatron.model.experts import moe_layers
from ra3_megatron.model.factory import build_model, unwrap
from tests.unit.model.hf_pairs import ARCHITECTURES, load, megatron_weights, random_hf

ARCH = ARCHITECTURES["qwen3_moe"]
MODEL = ModelConfig(vocab_multiple=1)


def _pair(parallel, **changes):
    arch = dataclasses.replace(ARCH, **changes)
    hf = random_hf(arch)
    [chunk] = build_model(arch, MODEL, parallel)
    load([unwrap(chunk)], megatron_weights(arch, hf, arch.vocab_size), parallel)
    return hf, chunk


@pytest.mark.parametrize(("norm", "chosen"), [(True, 2), (False, 3), (False, 1), (True, 8)])
def test_weights_of_the_chosen_are_hugging_faces(parallel, norm, chosen):
    """Weights that sum to 1 or do not, one expert or all of them: logits and the router's gradient tell them apart."""
    hf, chunk = _pair(parallel, norm_topk_prob=norm, experts_per_token=chosen)
    ids = torch.randint(ARCH.vocab_size, (1, 60), generator=torch.Generator().manual_seed(1))
    theirs, ours = hf(ids).logits, chunk(ids, torch.arange(60)[None], None)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for logits in (theirs, ours):
        logits.float().logsumexp(-1).sum().backward()
    for layer, moe in zip(hf.model.layers, moe_layers(chunk), strict=True):
        expected = layer.mlp.gate.weight.grad
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(moe.router.weight.grad, expected, rtol=1e-4, atol=1e-5)


def test_no_token_is_dropped(parallel):
    """A capacity per expert would make a log-probability depend on the other sequences of a window: here all tokens are
    the same one, and so go to the same experts."""
    _, chunk = _pair(parallel)
    chunk.eval()
    ids = torch.full((1, 200), 7)
    positions = torch.cat((torch.arange(199), torch.zeros(1, dtype=torch.int64)))[None]
    with torch.no_grad():
        packed = chunk(ids, positions, None, packed_seq_params=packed_params((199, 1), parallel.device))
        alone = chunk(ids[:, :1], positions[:, :1], None)
    torch.testing.assert_close(packed[:, [0, 199]], alone.expand(-1, 2, -1), rtol=0, atol=1e-5)


def test_the_router_computes_in_fp32(parallel):
    """A logit rounded to bf16 sends a token to another expert than Hugging Face's softmax in fp32."""
    [chunk] = build_model(ARCH, ModelConfig(vocab_multiple=1, precision="bf16"), parallel)
    moe = next(moe_layers(unwrap(chunk)))
    hidden = torch.randn(5, 1, ARCH.hidden_size, generator=torch.Generator().manual_seed(2)).bfloat16()
    logits = moe.router.gating(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ moe.router.weight.float().T, rtol=1e-6, atol=1e-6)


def test_experts_belong_to_their_own_groups_in_every_layout(parallel):
    """With one process per expert group Megatron counts experts as any parameter: one optimizer instead of two, whose
    checkpoint no expert-parallel layout loads."""
    [chunk] = build_model(ARCH, MODEL, parallel)
    own = {n for n, p in chunk.named_parameters() if not getattr(p, "allreduce", True)}
    assert own == {n for n, _ in chunk.named_parameters() if ".mlp.experts." in n}
    assert len(own) == ARCH.num_layers * ARCH.num_experts * 2
    # Resharding cuts gate and up apart by this mark.
    assert next(moe_layers(chunk)).experts.local_experts[0].linear_fc1.weight.partition_stride == 2
