"""Per-token losses: what one token adds to a component before weighting and normalising.

Every function returns [tokens] fp32. The training engine multiplies by the component's token weights, sums, and divides
by the component's own global weight.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def cross_entropy(log_probs: Tensor) -> Tensor:
    """Negative log-likelihood, nats. `log_probs` [tokens]."""
    return -log_probs


@dataclass(frozen=True)
class PolicyLossConfig:
    """Clipping of the policy-gradient loss."""

    clip_low: float = 0.2
    """The ratio current/behaviour is clipped below 1 - clip_low where that lowers the objective."""
    clip_high: float = 0.2
    """The ratio is clipped above 1 + clip_high (DeepCoder and DAPO raise it: clip-higher)."""
    dual_clip: float | None = None
    """Upper bound of the loss at negative advantages, in multiples of |advantage|; none = unbounded."""
    max_importance_weight: float = 2.0
    """Truncation of the correction proximal/behaviour for rollouts of an older policy."""


@dataclass(frozen=True)
class PolicyLoss:
    """Result of `policy_loss`."""

    loss: Tensor
    """[tokens], to be minimised."""
    ratio: Tensor
    """[tokens] current over proximal probability, detached."""
    clipped: Tensor
    """[tokens] bool: the clip was active."""
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
    (Paper Eq. 4.1; clipping as in PPO, Eq. 7.)
    """
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
