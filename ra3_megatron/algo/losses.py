"""Per-token losses: what one token adds to a component before weighting and normalising.

Every function returns [tokens] fp32. The training engine multiplies by the component's token weights, sums, and divides
by the component's own global weight.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


def cross_entropy(log_probs: Tensor) -> Tensor:
    """Negative log-likelihood, nats. `log_probs` [tokens]."""
    return -log_probs


@dataclass(frozen=True)
class PolicyLossConfig:
    """How the policy-gradient loss corrects for rollouts of an older policy."""

    correction: Literal["clip", "truncate"] = "clip"
    """`clip`: the ratio, clipped as PPO does; `truncate`: the score function weighted with min(current/behaviour,
    max_importance_weight), which never stops the gradient of an action that has become less likely."""
    clip_low: float = 0.2
    """The ratio current/behaviour is clipped below 1 - clip_low where that lowers the objective."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high (DeepCoder and DAPO raise it: clip-higher)."""
    dual_clip: float | None = None
    """Upper bound of the loss at negative advantages, in multiples of |advantage|; none = unbounded."""
    max_importance_weight: float = 2.0
    """Truncation of the weight: of current/behaviour for `truncate`, of proximal/behaviour for `clip`."""

    def __post_init__(self):
        if self.correction not in ("clip", "truncate"):
            raise ValueError(f"unknown correction '{self.correction}'; known are clip, truncate")


@dataclass(frozen=True)
class PolicyLoss:
    """Result of `policy_loss`."""

    loss: Tensor
    """[tokens], to be minimised."""
    ratio: Tensor
    """[tokens] current over proximal probability, detached."""
    clipped: Tensor
    """[tokens] bool: the clip was active, or the weight was truncated."""
    importance_weight: Tensor
    """[tokens] truncated proximal/behaviour weight, detached."""


def policy_loss(
    log_probs: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    config: PolicyLossConfig,
    proximal: Tensor | None = None,
) -> PolicyLoss:
    """Clipped policy-gradient loss with truncated importance weights for stale rollouts.

    `log_probs` of the policy in training, `behaviour` of the policy that sampled, `advantages`, and optionally
    `proximal` of the policy at the start of the update: all [tokens], the log-probs at the same temperature.
    With `proximal` the ratio is current/proximal and each token is weighted with min(proximal/behaviour,
    max_importance_weight) (decoupled objective); without it the ratio is current/behaviour and the weight is 1.
    `truncate` knows no `proximal` (ValueError). (Paper Eq. 4.1; clipping as in PPO, Eq. 7.)
    """
    if config.correction == "truncate":
        if proximal is not None:
            raise ValueError("correction 'truncate' weights with current/behaviour; leave proximal log-probs out")
        return _truncated(log_probs, behaviour, advantages, config.max_importance_weight)
    anchor = behaviour if proximal is None else proximal
    ratio = torch.exp(log_probs - anchor)
    clipped_ratio = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    unclipped_loss = -advantages * ratio
    clipped_loss = -advantages * clipped_ratio
    loss = torch.maximum(unclipped_loss, clipped_loss)
    active = clipped_loss > unclipped_loss
    if config.dual_clip is not None:
        bound = -advantages * config.dual_clip
        bounded = (advantages < 0) & (loss > bound)
        loss = torch.where(bounded, bound, loss)
        active = active | bounded
    if proximal is None:
        weight = torch.ones_like(ratio)
    else:
        weight = torch.exp(proximal - behaviour).clamp(max=config.max_importance_weight)
    weight = weight.detach()
    return PolicyLoss(loss=loss * weight, ratio=ratio.detach(), clipped=active.detach(), importance_weight=weight)


def _truncated(log_probs: Tensor, behaviour: Tensor, advantages: Tensor, bound: float) -> PolicyLoss:
    """Score-function gradient with weight min(current/behaviour, bound)."""
    ratio = torch.exp(log_probs - behaviour).detach()
    weight = ratio.clamp(max=bound)
    # The last factor is 1 and has the gradient of log_probs, so the value compares with that of the clipped loss.
    loss = -advantages * weight * torch.exp(log_probs - log_probs.detach())
    return PolicyLoss(loss=loss, ratio=ratio, clipped=ratio > bound, importance_weight=weight)


def reference_kl(log_probs: Tensor, reference: Tensor, estimator: str = "k3") -> Tensor:
    """Estimate of KL(policy || reference) at sampled tokens, nats.

    `log_probs`, `reference` [tokens] at the same temperature. `k1` = log ratio (unbiased, may be negative),
    `k2` = half its square, `k3` = exp(-log ratio) - 1 + log ratio (unbiased, never negative).
    See Schulman, "Approximating KL divergence".
    """
    log_ratio = log_probs - reference
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        return torch.expm1(-log_ratio) + log_ratio
    raise ValueError(f"unknown KL estimator '{estimator}'; known are k1, k2, k3")
