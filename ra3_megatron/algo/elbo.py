"""The temporal variational bound, its prior over latents, and its multi-sample form.

log pi(a | s) >= E_q sum_t [ l_t - KL_t ] with l_t the log-likelihood of line t summed over its tokens (it is a bound
only as a sum, in nats; rewards may use the mean per token instead). The prior keeps the intent with probability alpha
and else draws a new one uniformly from |Z| (paper, section 2), which gives (Prop. 5.1)

    KL = KL(Bern(beta) || Bern(alpha)) + (1 - beta) (log|Z| - H(q~)),    beta = q(act) = 1 - p_think.

The first term is exact here. The second is estimated from the drawn latent by 1[think] (log|Z| + log q~(z)), whose mean
over q is that term and whose gradient, apart from the score function's, has mean zero.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ra3_megatron.algo.decision import Decision
from ra3_megatron.algo.returns import line_mask


@dataclass(frozen=True)
class PriorConfig:
    """What a new thought costs."""

    kl: Literal["constant", "bernoulli"] = "constant"
    """`constant`: `price` for each thought; `bernoulli`: the KL divergence from the temporal-consistency prior."""
    price: float = 0.05
    """c, in the reward's unit: taken off the reward of each line that has a thought; for `constant`."""
    stay: float = 0.9
    """alpha: prior probability of going on without a thought, between 0 and 1; for `bernoulli`. Towards 1 every thought
    costs more, and the limit is next-token prediction."""
    log_latents: float | None = None
    """log|Z|, nats: logarithm of the number of thoughts the prior spreads over; `bernoulli` needs it."""

    def __post_init__(self):
        if self.kl not in ("constant", "bernoulli"):
            raise ValueError(f"unknown kl '{self.kl}'; known are constant, bernoulli")
        if not 0.0 < self.stay < 1.0:
            raise ValueError(f"stay is {self.stay}; give a probability between 0 and 1, both excluded")
        if self.kl == "bernoulli" and self.log_latents is None:
            raise ValueError(
                "kl 'bernoulli' has no log_latents; give log|Z|, e.g. thought length times log(vocabulary)"
            )


def bernoulli_kl(decision: Decision, stay: float) -> Tensor:
    """KL(Bern(q(act)) || Bern(stay)), nats, exact and differentiable, of the shape of the decision. 0 < stay < 1."""
    act = decision.log_act.exp() * (decision.log_act - math.log(stay))
    return act + decision.p_think * (decision.log_think - math.log1p(-stay))


def thought_kl(decision: Decision, thinks: Tensor, latent: Tensor, log_latents: float) -> Tensor:
    """One-sample estimate of (1 - beta)(log|Z| - H(q~)), nats: log|Z| + log q~(z) at thoughts, zero at acts.

    `thinks` bool, `latent` log q(z_t), both of the decision's shape. May be negative where a thought is less likely
    than 1/|Z|; its mean is not, unless the thoughts are spread over more than |Z|.
    """
    return torch.where(thinks, log_latents + latent - decision.log_think, 0.0)


def latent_cost(config: PriorConfig, decision: Decision, thinks: Tensor, latent: Tensor) -> Tensor:
    """KL_t of each line, or the price in its place, of the shape of `thinks`; to be taken off the line's likelihood.

    `constant`: price * 1[think]. `bernoulli`: `bernoulli_kl` + `thought_kl`. As a reward the result weights the score
    of latents; the exact term also depends on the decision's own parameters, so for an unbiased gradient the loss adds
    `bernoulli_kl` of each decision itself (the other two parts need nothing more).
    """
    if config.kl == "constant":
        return config.price * thinks.to(decision.log_act)
    assert config.log_latents is not None
    return bernoulli_kl(decision, config.stay) + thought_kl(decision, thinks, latent, config.log_latents)


def prior_log_probs(thinks: Tensor, stay: float, log_latents: float) -> Tensor:
    """log p(z_t | s_t, z_{t-1}), nats: log alpha for act, log(1 - alpha) - log|Z| for a new thought. Float32."""
    kept = torch.full(thinks.shape, math.log(stay), device=thinks.device)
    return kept.masked_fill(thinks, math.log1p(-stay) - log_latents)


@dataclass(frozen=True)
class Elbo:
    """Temporal bound of each rollout; total = likelihood - cost."""

    total: Tensor
    """[rollouts] one-sample estimate of the bound on log pi(snippet), nats."""
    likelihood: Tensor
    """[rollouts] sum of l_t, nats."""
    cost: Tensor
    """[rollouts] sum of KL_t, or of prices."""


def temporal_elbo(log_probs: Tensor, cost: Tensor, lengths: Tensor) -> Elbo:
    """Sum over lines of l_t - KL_t (paper, the bound of section 2; Prop. 5.1 for KL_t).

    `log_probs` [rollouts, lines] of the lines' tokens summed, given the latents so far, nats; `cost` from
    `latent_cost`; `lengths` [rollouts]. With a constant price the total is the training objective, no longer a bound.
    """
    mask = line_mask(lengths, log_probs.size(-1))
    likelihood = torch.where(mask, log_probs, 0.0).sum(-1)
    paid = torch.where(mask, cost, 0.0).sum(-1)
    return Elbo(likelihood - paid, likelihood, paid)


def multi_sample_bound(log_joint: Tensor, log_proposal: Tensor) -> Tensor:
    """log 1/K sum_k p(x, z_k) / q(z_k | x), nats: a bound on log p(x) that rises with K (IWAE; BoLT).

    `log_joint` log p(x, z_k) and `log_proposal` log q(z_k | x), both [..., samples], summed over the whole rollout.
    Where p is the language model itself, log p(x, z) is the log-probability of the infused text and no decision is
    added to it; with the temporal prior it is sum_t l_t + prior_log_probs. Returns [...].
    """
    return torch.logsumexp(log_joint - log_proposal, -1) - math.log(log_joint.size(-1))
