"""The GPU's kernels for log-probabilities, run by Triton's interpreter on a CPU against the torch operations."""

import os

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch

from ra3_megatron.algo import logprobs, logprobs_triton
from ra3_megatron.algo.logprobs import VocabShard


def both(logits, labels, shard, temperature, consume=False):
    """(log-probs, gradient) of torch's operations in fp32, then of the kernels in the logits' own type."""
    weight = torch.rand(len(labels), generator=torch.Generator().manual_seed(1)) - 0.3
    found = []
    for function, x in (
        (logprobs._VocabParallelLogProbs, logits.float().clone().requires_grad_()),
        (logprobs._FusedLogProbs, logits.clone().requires_grad_()),
    ):
        # A view of a leaf that may be written to, as the output layer's is.
        values = function.apply(x * 1.0, labels, shard, temperature, consume)
        (values * weight).sum().backward()
        found.append((values.detach(), x.grad.float()))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("temperature", "consume"), [(1.0, True), (0.6, False)])
@pytest.mark.parametrize(("width", "vocab", "block"), [(40, 37, 16), (40, 40, 64), (130, 101, 32)])
def test_kernels_are_the_definition(dtype, temperature, consume, width, vocab, block, monkeypatch):
    """Columns of padding in the normaliser, a maximum of one block used for another, a gradient past the vocabulary."""
    monkeypatch.setattr(logprobs_triton, "BLOCK", block)
    g = torch.Generator().manual_seed(width)
    logits = (torch.randn(9, width, generator=g) * 6).to(dtype)
    labels = torch.randint(vocab, (9,), generator=g)
    (a, ga), (b, gb) = both(logits, labels, VocabShard(0, vocab), temperature, consume)
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gb, ga, rtol=0, atol=1e-6 if dtype == torch.float32 else 4e-3)
    assert not gb[:, vocab:].any()


def test_columns_that_may_not_be_drawn(monkeypatch):
    """A whole block of -inf: its maximum less itself is NaN."""
    monkeypatch.setattr(logprobs_triton, "BLOCK", 16)
    logits = torch.randn(4, 48)
    logits[:, 0:16] = -torch.inf
    logits[:, 32:] = -torch.inf
    (a, ga), (b, gb) = both(logits, torch.tensor([16, 20, 31, 17]), VocabShard(0, 48), 1.0)
    torch.testing.assert_close(b, a)
    torch.testing.assert_close(gb, ga)


def test_nan_stays_nan():
    """A NaN that the maximum skipped would give a number, and the step would go on."""
    logits = torch.randn(3, 20)
    logits[1, 7] = torch.nan
    values = logprobs._FusedLogProbs.apply(logits, torch.tensor([0, 1, 2]), VocabShard(0, 20), 1.0, False)
    assert values.isnan().tolist() == [False, True, False]


def test_gradient_takes_the_memory_of_consumed_logits_alone():
    """A gradient written over logits that another component had yet to read."""
    logits = torch.randn(5, 30)
    labels = torch.arange(5)
    x = logits.clone().requires_grad_()
    y = x * 1.0
    first = logprobs._FusedLogProbs.apply(y, labels, VocabShard(0, 30), 0.5, False)
    last = logprobs._FusedLogProbs.apply(y, labels, VocabShard(0, 30), 1.0, True)
    (first.sum() + last.sum()).backward()
    plain = logits.clone().requires_grad_()
    rows = torch.arange(5)
    ((plain / 0.5).log_softmax(-1)[rows, labels].sum() + plain.log_softmax(-1)[rows, labels].sum()).backward()
    torch.testing.assert_close(x.grad, plain.grad, rtol=1e-5, atol=1e-6)


def test_shards_of_a_vocabulary():
    """A label of another process's columns, and a shard of padding alone: its maximum is -inf and its sum 0."""
    logits, labels = torch.randn(6, 32), torch.tensor([0, 9, 10, 19, 5, 15])
    whole = logits[:, :20].log_softmax(-1)[torch.arange(6), labels]
    parts = [
        logprobs_triton.row_statistics(logits[:, s : s + 10], labels, s, VocabShard(s, 20).valid_columns(10), 1.0)
        for s in (0, 10, 20)
    ]
    highest = torch.stack([m for m, _, _ in parts]).amax(0)
    total = sum(s * (m - highest).exp() for m, s, _ in parts)
    torch.testing.assert_close(sum(c for _, _, c in parts) - highest - total.log(), whole)
    assert parts[2][0].eq(-torch.inf).all()
