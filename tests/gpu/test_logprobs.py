"""The kernels for log-probabilities against torch's operations, and the memory they need."""

import pytest
import torch

from ra3_megatron.algo import logprobs
from ra3_megatron.algo.logprobs import VocabShard, token_log_probs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("width", "vocab"), [(152064, 151936), (1024, 1024), (49280, 49152)])
def test_kernels_are_the_torch_operations(parallel, dtype, temperature, width, vocab):
    """Values and gradients on real sizes, padding of the vocabulary included."""
    g = torch.Generator(parallel.device).manual_seed(0)
    logits = (torch.randn(300, width, generator=g, device=parallel.device) * 4).to(dtype)
    labels = torch.randint(vocab, (300,), generator=g, device=parallel.device)
    weight = torch.rand(300, generator=g, device=parallel.device)
    shard = VocabShard(0, vocab)
    found = []
    for function, x in (
        (logprobs._VocabParallelLogProbs, logits.float().clone().requires_grad_()),
        (logprobs._FusedLogProbs, logits.clone().requires_grad_()),
    ):
        values = function.apply(x * 1.0, labels, shard, temperature, True)
        (values * weight).sum().backward()
        found.append((values.detach(), x.grad.float()))
    (a, ga), (b, gb) = found
    torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(gb, ga, rtol=0 if dtype == torch.float32 else 8e-3, atol=1e-6)
    assert not gb[:, vocab:].any()


def test_memory_is_that_of_the_logits(parallel):
    """A copy of the logits in fp32: 2.5 GB of a 4096-token window."""
    logits = torch.randn(2048, 152064, dtype=torch.bfloat16, device=parallel.device, requires_grad=True)
    labels = torch.randint(151936, (2048,), device=parallel.device)
    y = logits * 1.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    values = token_log_probs(y, labels, VocabShard(0, 151936), consume=True)
    torch.autograd.grad(values.sum(), y)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < 0.1 * y.numel() * y.element_size()
