"""Weights of samples that came from another distribution: resampling (BoLT) and stale rollouts."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SampleWeights:
    """Self-normalised importance weights of the samples of one snippet."""

    log_weights: Tensor
    """[..., samples] nats; their exponentials sum to one."""
    effective_samples: Tensor
    """[...] 1 / sum of squared weights: from 1 (one sample has all the weight) to the number of samples."""

    def draw(self, uniform: Tensor) -> Tensor:
        """Index of one sample for each snippet, drawn with its weight: `uniform` [...] in [0, 1), to [...] int64."""
        ends = self.log_weights.double().exp().cumsum(-1)
        chosen = torch.searchsorted(ends, uniform.to(ends).unsqueeze(-1) * ends[..., -1:], right=True).squeeze(-1)
        # Rounding may put the product on the last end: the last sample with any weight is meant.
        last = (ends < ends[..., -1:]).sum(-1)
        return torch.minimum(chosen, last)


def resampling_weights(log_joint: Tensor, log_proposal: Tensor) -> SampleWeights:
    """BoLT's weights p(x, z_k) / q(z_k | x), normalised over the samples in log space.

    `log_joint` log p(x, z_k) = log-probability of the whole infused text, `log_proposal` log q(z_k | x) = sum of the
    log q(z_t), acts included; both [..., samples], nats, summed over the rollout. Raises ValueError where no sample of
    a snippet has a finite weight.
    """
    raw = log_joint - log_proposal
    if not bool(torch.isfinite(raw.amax(-1)).all()):
        raise ValueError("a snippet's importance weights are all zero, or infinite or NaN; check its log-probabilities")
    log_weights = raw.log_softmax(-1)
    return SampleWeights(log_weights, torch.exp(-torch.logsumexp(2 * log_weights, -1)))


@dataclass(frozen=True)
class Staleness:
    """Correction of rollouts that an older policy sampled; detached."""

    weights: Tensor
    """[latents] min(current / behaviour, bound) of the whole latent, zero where the lag is too large."""
    truncated: Tensor
    """[latents] bool: the bound was active on a latent that is kept."""
    kept: Tensor
    """[latents] bool: lag not above the maximum."""


def staleness(
    current: Tensor, behaviour: Tensor, lag: Tensor, max_lag: int, max_importance_weight: float = 2.0
) -> Staleness:
    """Truncated importance weight of each latent z_t, and which are too old to be used.

    `current`, `behaviour` [latents] log q(z_t) at the same temperature, summed over the latent's tokens (the decision
    included), under the present and the sampling policy; `lag` [latents] int64, weights versions between the two.
    A weight for each token, as an addition to clipping, is in `losses.policy_loss`; do not apply both.
    Raises ValueError for a negative lag: a rollout of a policy that does not exist yet.
    """
    if lag.numel() and int(lag.min()) < 0:
        raise ValueError(f"a rollout is {-int(lag.min())} versions ahead of the policy; check the version counters")
    kept = lag <= max_lag
    # Dropped before the exponential: what a very old policy did may be far beyond the range of exp().
    ratio = (current - behaviour).detach().masked_fill(~kept, -torch.inf).exp()
    return Staleness(ratio.clamp(max=max_importance_weight), ratio > max_importance_weight, kept)
