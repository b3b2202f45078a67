import math
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.algo.decision import Decision
from ra3_megatron.algo.elbo import (
    PriorConfig,
    bernoulli_kl,
    latent_cost,
    multi_sample_bound,
    prior_log_probs,
    temporal_elbo,
    thought_kl,
)

F64 = torch.float64


def decision_of(p_think: list[float]) -> Decision:
    p = torch.tensor(p_think, dtype=F64)
    return Decision(p.log(), (1 - p).log())


def test_bernoulli_kl_by_hand():
    """KL(Bern(1/2) || Bern(3/4)) = 1/2 log(2/3) + 1/2 log 2; zero where q(act) is alpha."""
    got = bernoulli_kl(decision_of([0.5, 0.25]), 0.75)
    torch.testing.assert_close(got, torch.tensor([0.5 * math.log(2 / 3) + 0.5 * math.log(2), 0.0], dtype=F64))


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-4, 1 - 1e-4), st.floats(0.05, 0.95), st.integers(1, 6), st.integers(0, 9999))
def test_cost_is_the_kl_between_the_enumerated_distributions(p_think, stay, thoughts, seed):
    """Prop. 5.1 against the definition: sum over act and every thought of q log(q / p), and the estimate's mean."""
    g = torch.Generator().manual_seed(seed)
    given_thought = torch.rand(thoughts, generator=g, dtype=F64).clamp(min=1e-3)
    given_thought = given_thought / given_thought.sum()
    q = torch.cat((torch.tensor([1 - p_think], dtype=F64), p_think * given_thought))
    p = torch.cat((torch.tensor([stay], dtype=F64), torch.full((thoughts,), (1 - stay) / thoughts, dtype=F64)))
    exact = (q * (q / p).log()).sum().item()
    entropy = -(given_thought * given_thought.log()).sum().item()
    first = bernoulli_kl(decision_of([p_think]), stay).item()
    assert first + p_think * (math.log(thoughts) - entropy) == pytest.approx(exact, abs=1e-9)

    thinks = torch.arange(thoughts + 1) > 0
    everywhere = decision_of([p_think] * (thoughts + 1))
    config = PriorConfig("bernoulli", stay=stay, log_latents=math.log(thoughts))
    mean = (q * latent_cost(config, everywhere, thinks, q.log())).sum().item()
    assert mean == pytest.approx(exact, abs=1e-9)
    log_prior = prior_log_probs(thinks, stay, math.log(thoughts)).double()
    torch.testing.assert_close(log_prior.exp(), p, atol=1e-6, rtol=1e-5)


def test_direct_gradient_of_the_thought_term_has_mean_zero():
    """The estimate may go through the score function alone: its own gradient averages to nothing over q."""
    logits = torch.randn(5, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    log_q = logits.log_softmax(0)
    thinks = torch.arange(5) > 1
    log_think = log_q[2:].logsumexp(0).expand(5)
    decision = Decision(log_think, log_q[:2].logsumexp(0).expand(5))
    (log_q.exp().detach() * thought_kl(decision, thinks, log_q, 3.0)).sum().backward()
    torch.testing.assert_close(logits.grad, torch.zeros(5, dtype=F64), atol=1e-12, rtol=0)


def test_constant_price():
    """The price is paid for drawn thoughts, whatever their probability."""
    thinks = torch.tensor([True, False])
    got = latent_cost(PriorConfig(price=0.2), decision_of([0.1, 0.9]), thinks, torch.tensor([-5.0, -0.1]))
    torch.testing.assert_close(got, torch.tensor([0.2, 0.0], dtype=F64))


def test_never_thinking_costs_next_to_nothing_as_alpha_goes_to_one():
    """alpha -> 1 is next-token prediction: acting is free and a thought's price has no limit."""
    config = [PriorConfig("bernoulli", stay=s, log_latents=0.0) for s in (0.9, 1 - 1e-6)]
    act, think = torch.tensor([False]), torch.tensor([True])
    latent = torch.zeros(1, dtype=F64)
    cheap = [latent_cost(c, decision_of([1e-9]), act, latent).item() for c in config]
    dear = [latent_cost(c, decision_of([1 - 1e-9]), think, latent).item() for c in config]
    assert cheap[1] == pytest.approx(0.0, abs=2e-6)
    assert cheap[0] > 0.1
    assert dear[1] > 13 > dear[0]


@pytest.mark.parametrize(
    ("bad", "match"),
    [({"kl": "gaussian"}, "gaussian"), ({"stay": 1.0}, "stay"), ({"stay": 0.0}, "stay"), ({"kl": "bernoulli"}, "log")],
)
def test_impossible_priors_are_refused(bad, match):
    """An infinite KL, or |Z| = 1 by default, would train without a word."""
    with pytest.raises(ValueError, match=match):
        PriorConfig(**bad)


def test_elbo_by_hand():
    """Two snippets of two and one lines; what lies in the padding is never read."""
    nan = float("nan")
    got = temporal_elbo(
        torch.tensor([[-3.0, -4.0], [-5.0, nan]]), torch.tensor([[0.5, 0.25], [1.0, nan]]), torch.tensor([2, 1])
    )
    assert got.total.tolist() == [-7.75, -6.0]
    assert got.likelihood.tolist() == [-7.0, -5.0]
    assert got.cost.tolist() == [0.75, 1.0]


def tiny_model(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two lines, z_t in {act, thought 1, thought 2}: log p(z_t), log p(a_t | z_1..z_t), log q(z_t | z_<t)."""
    g = torch.Generator().manual_seed(seed)
    prior = prior_log_probs(torch.tensor([False, True, True]), 0.7, math.log(2)).double()
    likelihood = -torch.rand(3, 3, 2, generator=g, dtype=F64) * 3
    likelihood[:, :, 0] = likelihood[:, :1, 0]
    q = torch.randn(4, 3, generator=g, dtype=F64).log_softmax(-1)
    return prior, likelihood, q


@pytest.mark.parametrize("seed", range(3))
def test_bounds_stay_below_the_evidence_and_order(seed):
    """Mean over q, enumerated: elbo <= two-sample bound <= log p(x); and the first is sum_t E[l_t - KL_t]."""
    prior, likelihood, q = tiny_model(seed)
    latents = list(product(range(3), repeat=2))
    joint = torch.stack([prior[i] + prior[j] + likelihood[i, j].sum() for i, j in latents])
    proposal = torch.stack([q[0, i] + q[1 + i, j] for i, j in latents])
    evidence = joint.logsumexp(0).item()
    one = (proposal.exp() * multi_sample_bound(joint[:, None], proposal[:, None])).sum().item()
    pairs = torch.tensor(list(product(range(9), repeat=2)))
    two = multi_sample_bound(joint[pairs], proposal[pairs])
    two = (proposal[pairs].sum(-1).exp() * two).sum().item()
    assert one < two < evidence

    thinks = torch.tensor([[i > 0, j > 0] for i, j in latents])
    log_q = torch.stack([torch.stack((q[0, i], q[1 + i, j])) for i, j in latents])
    acts = torch.stack([torch.stack((q[0, 0], q[1 + i, 0])) for i, _ in latents])
    decision = Decision(torch.log1p(-acts.exp()), acts)
    cost = latent_cost(PriorConfig("bernoulli", stay=0.7, log_latents=math.log(2)), decision, thinks, log_q)
    lines = torch.stack([likelihood[i, j] for i, j in latents])
    elbo = temporal_elbo(lines, cost, torch.full((9,), 2)).total
    assert (proposal.exp() * elbo).sum().item() == pytest.approx(one, abs=1e-6)


def test_bound_of_the_exact_posterior_is_the_evidence():
    """With q = p(z | x) every weight is p(x), for any number of samples, also where exp() would underflow."""
    log_joint = torch.tensor([-2000.0, -2001.0, -2005.0], dtype=F64)
    posterior = log_joint.log_softmax(0)
    got = multi_sample_bound(log_joint, posterior)
    assert got.item() == pytest.approx(log_joint.logsumexp(0).item(), abs=1e-9)
