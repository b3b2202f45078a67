"""The gradient estimator, all parts together, against the exact gradient of a model whose every rollout is enumerated.

Three lines; at each z_t is act or one of three thoughts of at most two tokens. The policy is a table: a row of logits
for every history. Line likelihoods are a random table over the latents so far.
"""

import math
from collections.abc import Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from ra3_megatron.algo.decision import Decision, TokenSets, decide, latent_log_probs, mask_columns
from ra3_megatron.algo.elbo import PriorConfig, bernoulli_kl, latent_cost
from ra3_megatron.algo.logprobs import VocabShard, token_log_probs
from ra3_megatron.algo.losses import PolicyLossConfig, policy_loss
from ra3_megatron.algo.returns import ReturnConfig, leave_one_out_advantages, line_rewards, returns

# 0 "\n", 1 "#", 2 "#\n", 3 "a", 4 "x". A second token "a" is the last by the limit of two: the end follows by force.
SHARD, THINK, BANNED = VocabShard(0, 5), TokenSets.make([[1, 2]]), torch.tensor([1, 2, 4])
LATENTS = ((), (2,), (1, 0), (1, 3))
LINES, KINDS = 3, len(LATENTS)
ROLLOUTS = list(product(range(KINDS), repeat=LINES))
CONTEXTS = [(), *product(range(KINDS), repeat=1), *product(range(KINDS), repeat=2)]
NUMBER = {context: i for i, context in enumerate(CONTEXTS)}
AT = torch.tensor([[NUMBER[z[:t]] for t in range(LINES)] for z in ROLLOUTS])
Z = torch.tensor(ROLLOUTS)
THINKS = Z > 0
LENGTHS = torch.full((len(ROLLOUTS),), LINES)
TOKENS = torch.tensor([[3, 1, 5]]).expand(len(ROLLOUTS), -1)
WINDOWS = [ReturnConfig(None), ReturnConfig(2, 0.7), ReturnConfig(1), ReturnConfig(None, whole_block=True)]


def parameters() -> Tensor:
    """[contexts, decision or second token, vocabulary] logits."""
    g = torch.Generator().manual_seed(1)
    return torch.randn(len(CONTEXTS), 2, 5, generator=g)


def line_log_probs() -> Tensor:
    """[rollouts, lines]: depends on the latents up to the line; some lines are hard for every latent."""
    g = torch.Generator().manual_seed(2)
    table = {z[: t + 1]: 0.0 for z in ROLLOUTS for t in range(LINES)}
    effect = torch.randn(len(table), generator=g)
    for z, x in zip(sorted(table), effect.tolist(), strict=True):
        table[z] = x - (9.0, 4.0, 20.0)[len(z) - 1]
    return torch.tensor([[table[z[: t + 1]] for t in range(LINES)] for z in ROLLOUTS])


def log_q(theta: Tensor) -> tuple[Tensor, Decision]:
    """log q(z | context) [contexts, latents] and the decisions [contexts], with the package's functions."""
    which = torch.zeros(len(CONTEXTS), dtype=torch.int64)
    columns = []
    for tokens in LATENTS:
        decision = decide(theta[:, 0], THINK, which, SHARD)
        rows = torch.arange(len(CONTEXTS))
        scores, owner = [], []
        for place, token in enumerate(tokens):
            logits = theta[:, 0] if place == 0 else mask_columns(theta[:, 1], BANNED, SHARD)
            scores.append(token_log_probs(logits, torch.full_like(rows, token), SHARD))
            owner.append(rows)
        none = torch.zeros(0)
        columns.append(
            latent_log_probs(
                decision,
                torch.full((len(CONTEXTS),), bool(tokens)),
                torch.cat([none, *scores]),
                torch.cat([none.long(), *owner]),
            )
        )
    return torch.stack(columns, 1), decision


def reference_log_q(theta: Tensor) -> Tensor:
    """The same from log_softmax, for autograd, in double precision: [contexts, latents]."""
    first, second = theta[:, 0].log_softmax(-1), theta[:, 1, [0, 3]].log_softmax(-1)
    act = first[:, [0, 3, 4]].logsumexp(-1)
    return torch.stack((act, first[:, 2], first[:, 1] + second[:, 0], first[:, 1] + second[:, 1]), 1)


def score_table(theta: Tensor) -> Tensor:
    """Gradient of log q(z_t | s_t) for each rollout and line: [rollouts, lines, parameters]."""
    by_latent = []
    for z in range(KINDS):
        leaf = theta.clone().requires_grad_()
        log_q(leaf)[0][:, z].sum().backward()
        by_latent.append(leaf.grad.flatten(1))
    rows = torch.stack(by_latent, 1)
    out = torch.zeros(len(ROLLOUTS), LINES, len(CONTEXTS), 10)
    for n, t in product(range(len(ROLLOUTS)), range(LINES)):
        out[n, t, AT[n, t]] = rows[AT[n, t], Z[n, t]]
    return out.flatten(2)


def rollout_log_q(table: Tensor) -> Tensor:
    """log q of each whole rollout from the table [contexts, latents]."""
    return table[AT, Z].sum(-1)


def rewards(config: PriorConfig, table: Tensor, decision: Decision) -> Tensor:
    """[rollouts, lines]"""
    here = Decision(decision.log_think[AT], decision.log_act[AT])
    cost = latent_cost(config, here, THINKS, table[AT, Z])
    return line_rewards(line_log_probs(), TOKENS, cost, LENGTHS)


def slow_returns(r: Tensor, config: ReturnConfig) -> Tensor:
    """By the definition, one line at a time."""
    out = torch.zeros_like(r)
    for t, k in product(range(LINES), range(LINES)):
        if config.whole_block or t <= k < t + (config.horizon or LINES):
            out[:, t] += (1.0 if config.whole_block else config.discount ** (k - t)) * r[:, k]
    return out


def exact_gradient(scores: Tensor, q: Tensor, r: Tensor, config: ReturnConfig) -> Tensor:
    """E[sum_t R_t grad log q(z_t)] over all rollouts: [parameters]."""
    return torch.einsum("n,nt,ntp->p", q, slow_returns(r, config), scores)


def test_latents_of_every_context_sum_to_one():
    """The table of the package's functions is the reference's table, and a distribution."""
    table, _ = log_q(parameters())
    torch.testing.assert_close(table, reference_log_q(parameters()), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(table.exp().sum(1), torch.ones(len(CONTEXTS)))


@pytest.mark.parametrize("config", [ReturnConfig(None), ReturnConfig(None, whole_block=True)])
def test_full_returns_give_the_gradient_of_the_objective(config):
    """E[R_t grad log q] with all lines is the gradient of E[sum of rewards], taken by autograd through enumeration."""
    theta = parameters()
    r = rewards(PriorConfig(price=0.3), *log_q(theta))
    got = exact_gradient(score_table(theta), rollout_log_q(log_q(theta)[0]).exp(), r, config)
    leaf = theta.double().requires_grad_()
    (rollout_log_q(reference_log_q(leaf)).exp() * r.sum(-1)).sum().backward()
    torch.testing.assert_close(got, leaf.grad.flatten().float(), atol=1e-5, rtol=1e-4)


def test_bernoulli_cost_needs_the_direct_gradient_of_the_decision():
    """The exact KL term depends on the policy itself; as a reward alone it gives another gradient than the bound's."""
    theta, prior = parameters(), PriorConfig("bernoulli", stay=0.8, log_latents=math.log(3))
    table, decision = log_q(theta)
    q = rollout_log_q(table).exp()
    by_score = exact_gradient(score_table(theta), q, rewards(prior, table, decision), ReturnConfig(None))
    leaf = theta.clone().requires_grad_()
    divergence = bernoulli_kl(log_q(leaf)[1], prior.stay)
    (q.unsqueeze(-1) * divergence[AT]).sum().backward()
    got = by_score - leaf.grad.flatten()

    leaf = theta.double().requires_grad_()
    ref = reference_log_q(leaf)
    uniform = math.log(1 - prior.stay) - math.log(3)
    log_prior = torch.tensor([math.log(prior.stay), uniform, uniform, uniform], dtype=torch.float64)
    kl = (ref.exp() * (ref - log_prior)).sum(-1)
    per_line = line_log_probs() / TOKENS - kl[AT]
    (rollout_log_q(ref).exp() * per_line.sum(-1)).sum().backward()
    torch.testing.assert_close(got, leaf.grad.flatten().float(), atol=1e-5, rtol=1e-4)
    assert (by_score - leaf.grad.flatten()).abs().max() > 1e-2


GROUPS, MEMBERS = 6000, 4


def sampled_gradients(config: ReturnConfig, baseline: bool) -> tuple[Tensor, Tensor]:
    """(gradient estimate of each group [groups, parameters], exact gradient [parameters])."""
    theta = parameters()
    table, decision = log_q(theta)
    q, scores, r = rollout_log_q(table).exp(), score_table(theta), rewards(PriorConfig(), table, decision)
    drawn = torch.multinomial(q, GROUPS * MEMBERS, replacement=True, generator=torch.Generator().manual_seed(3))
    credit = returns(r[drawn], LENGTHS[drawn], config)
    groups = torch.arange(GROUPS).repeat_interleave(MEMBERS)
    if baseline:
        credit = leave_one_out_advantages(credit, groups, LENGTHS[drawn])
    # Rollouts fall on few different latents: weights of each (rollout, line) first, then one product with the scores.
    estimates = torch.cat(list(chunks(credit, scores, drawn)))
    return estimates, exact_gradient(scores, q, r, config)


def chunks(credit: Tensor, scores: Tensor, drawn: Tensor, size: int = 2000) -> Iterator[Tensor]:
    """Mean over each group's members of sum_t A_t grad log q(z_t), some groups at a time."""
    for part in range(0, GROUPS, size):
        rows = slice(part * MEMBERS, (part + size) * MEMBERS)
        weights = torch.zeros(len(drawn[rows]) // MEMBERS, len(ROLLOUTS), LINES)
        owner = torch.arange(len(drawn[rows])) // MEMBERS
        weights.index_put_((owner, drawn[rows]), credit[rows], accumulate=True)
        yield torch.einsum("gnt,ntp->gp", weights, scores) / MEMBERS


def z_scores(estimates: Tensor, exact: Tensor) -> Tensor:
    """Distance from the exact value in standard errors, for the parameters that some rollout moves."""
    error = estimates.std(0) / math.sqrt(len(estimates))
    moves = error > 1e-6
    return ((estimates.mean(0) - exact) / error)[moves]


@pytest.mark.parametrize("config", WINDOWS)
def test_estimator_is_unbiased_and_the_baseline_lowers_its_variance(config, record_property):
    """Off-by-one horizons, a baseline of the rollout itself or of another line: each moves the mean of the gradient."""
    with_baseline, exact = sampled_gradients(config, baseline=True)
    without, _ = sampled_gradients(config, baseline=False)
    variance = [float(x.var(0).sum()) for x in (with_baseline, without)]
    record_property("variance_with_baseline", variance[0])
    record_property("variance_without_baseline", variance[1])
    print(f"{config}: variance {variance[0]:.4g} with baseline, {variance[1]:.4g} without")
    z = z_scores(with_baseline, exact)
    print(f"  z: largest {float(z.abs().max()):.2f}, mean square {float(z.square().mean()):.2f}, {len(z)} parameters")
    assert len(z) > 100
    assert z.abs().max() < 4.5
    assert 0.4 < z.square().mean() < 2.0
    assert z_scores(without, exact).abs().max() < 4.5
    assert variance[0] < 0.5 * variance[1]
    # The same test sees a baseline that has the rollout itself in it (A is then too small by 1 - 1/members).
    assert z_scores(with_baseline * (1 - 1 / MEMBERS), exact).square().mean() > 3.0


def test_policy_loss_has_that_gradient_on_policy():
    """The loss the engine minimises, token by token, is minus the estimator; acts are one token, the decision."""
    theta = parameters()
    r, scores = rewards(PriorConfig(), *log_q(theta)), score_table(theta)
    drawn = torch.tensor([5, 40, 63, 0, 17, 22])
    advantages = leave_one_out_advantages(r[drawn], torch.tensor([0, 1, 0, 1, 1, 0]), LENGTHS[drawn])
    expected = -torch.einsum("nt,ntp->p", advantages, scores[drawn])

    leaf = theta.clone().requires_grad_()
    log_probs, weights = [], []
    for row, n in enumerate(drawn.tolist()):
        for t in range(LINES):
            at, tokens = AT[n, t], LATENTS[Z[n, t]]
            first = leaf[at, :1]
            if tokens:
                log_probs.append(token_log_probs(first, torch.tensor(tokens[:1]), SHARD))
            else:
                log_probs.append(decide(first, THINK, torch.tensor([0]), SHARD).log_act)
            for token in tokens[1:]:
                logits = mask_columns(leaf[at, 1:], BANNED, SHARD)
                log_probs.append(token_log_probs(logits, torch.tensor([token]), SHARD))
            weights += [advantages[row, t]] * max(len(tokens), 1)
    flat = torch.cat(log_probs)
    policy_loss(flat, flat.detach(), torch.stack(weights), PolicyLossConfig()).loss.sum().backward()
    torch.testing.assert_close(leaf.grad.flatten(), expected, atol=1e-5, rtol=1e-4)
