import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.algo.logprobs import VocabShard, token_entropy, token_log_probs


def slow_log_prob(logits: torch.Tensor, label: int, vocab: int, temperature: float) -> float:
    """Definition, one token at a time, in double precision."""
    row = [float(v) / temperature for v in logits[:vocab].double()]
    top = max(row)
    return row[label] - top - math.log(sum(math.exp(v - top) for v in row))


def test_hand_computed():
    """Two of three logits are equal and the third is padding: each of the two has probability one half."""
    logits = torch.tensor([[0.0, 0.0, 50.0]])
    shard = VocabShard(0, 2)
    assert token_log_probs(logits, torch.tensor([1]), shard).item() == pytest.approx(-math.log(2))
    assert token_entropy(logits, shard).item() == pytest.approx(math.log(2))


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 5),
    st.integers(2, 9),
    st.integers(0, 4),
    st.sampled_from([1.0, 0.6, 2.5]),
    st.integers(0, 10_000),
)
def test_matches_the_definition_with_padding_and_temperature(tokens, vocab, padding, temperature, seed):
    """Padded vocabulary rows must not leak into the normaliser; log-probs are after the temperature (trl#4159)."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, vocab + padding, generator=g) * 5
    labels = torch.randint(vocab, (tokens,), generator=g)
    got = token_log_probs(logits, labels, VocabShard(0, vocab), temperature)
    for i in range(tokens):
        assert got[i].item() == pytest.approx(slow_log_prob(logits[i], int(labels[i]), vocab, temperature), abs=1e-5)
    reference = torch.distributions.Categorical(logits=logits[:, :vocab] / temperature).entropy()
    torch.testing.assert_close(
        token_entropy(logits, VocabShard(0, vocab), temperature), reference, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_match_autograd_of_log_softmax(temperature):
    """The hand-written backward passes against autograd, with zero gradient on padding columns."""
    torch.manual_seed(0)
    logits = (torch.randn(7, 13) * 3).requires_grad_()
    plain = logits.detach().clone().requires_grad_()
    labels = torch.randint(11, (7,))
    weight, entropy_weight = torch.rand(7), torch.rand(7)
    shard = VocabShard(0, 11)
    ours = token_log_probs(logits, labels, shard, temperature) * weight
    ours = ours + token_entropy(logits, shard, temperature) * entropy_weight
    ours.sum().backward()
    log_p = (plain[:, :11] / temperature).log_softmax(-1)
    theirs = log_p.gather(1, labels[:, None])[:, 0] * weight - (log_p.exp() * log_p).sum(-1) * entropy_weight
    theirs.sum().backward()
    torch.testing.assert_close(logits.grad, plain.grad, atol=1e-6, rtol=1e-5)
    assert (logits.grad[:, 11:] == 0).all()


def test_bf16_logits_keep_their_gradient_type():
    """Logits arrive in bf16; the arithmetic is fp32 and the gradient goes back in bf16."""
    logits = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True)
    out = token_log_probs(logits, torch.tensor([1, 2, 3]), VocabShard(0, 8))
    assert out.dtype == torch.float32
    out.sum().backward()
    assert logits.grad.dtype == torch.bfloat16


def test_consuming_the_logits_changes_nothing_but_their_memory():
    """The engine gives the logits' memory away; the numbers must be the same, and a second backward must not lie."""
    torch.manual_seed(1)
    hidden, labels, shard = torch.randn(5, 4), torch.randint(9, (5,)), VocabShard(0, 9)
    grads = []
    for consume in (False, True):
        weight = torch.linspace(-1, 1, 44).view(11, 4).requires_grad_()
        out = token_log_probs(hidden @ weight.T, labels, shard, consume=consume)
        out.sum().backward(retain_graph=True)
        grads.append(weight.grad.clone())
        with pytest.raises(RuntimeError, match="second backward"):
            out.sum().backward()
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_plain_call_leaves_the_logits_alone():
    """Entropy and log-probs are often taken from the same logits."""
    logits = torch.randn(3, 7)
    before = logits.clone()
    token_log_probs(logits, torch.tensor([0, 1, 2]), VocabShard(0, 7))
    token_entropy(logits, VocabShard(0, 7))
    assert torch.equal(logits, before)
