"""Rewards, returns and advantages of snippets with different numbers of lines.

Tensors are `[rollouts, lines]`, padded on the right, with `lengths` [rollouts] int64 the real number of lines. What is
past the end of a snippet is never read, whatever it holds, and is zero in every result.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

RewardKind = Literal["mean", "sum", "gain"]


@dataclass(frozen=True)
class ReturnConfig:
    """From line rewards to the return that weights a line's latent."""

    horizon: int | None = 5
    """H: number of lines, the latent's own included, whose rewards count towards its return; none = all lines."""
    discount: float = 1.0
    """gamma: weight of each further line relative to the one before."""
    whole_block: bool = False
    """Give every latent the sum over the whole snippet, earlier lines included (BRiTE); needs horizon none and
    discount 1."""

    def __post_init__(self):
        if self.horizon is not None and self.horizon < 1:
            raise ValueError(f"horizon is {self.horizon}; give at least 1 line, or none for all")
        if not 0.0 <= self.discount <= 1.0:
            raise ValueError(f"discount is {self.discount}; give a value from 0 to 1")
        if self.whole_block and (self.horizon is not None or self.discount != 1.0):
            raise ValueError(
                "whole_block gives one undiscounted reward to all lines; set horizon to none, discount to 1"
            )


def line_mask(lengths: Tensor, lines: int) -> Tensor:
    """Which entries are real lines: `lengths` [rollouts] to [rollouts, lines] bool.

    Raises ValueError when a length is negative or larger than `lines`.
    """
    if lengths.numel() and (int(lengths.min()) < 0 or int(lengths.max()) > lines):
        raise ValueError(f"lengths from {int(lengths.min())} to {int(lengths.max())} do not fit {lines} padded lines")
    return torch.arange(lines, device=lengths.device) < lengths.unsqueeze(-1)


def line_rewards(
    log_probs: Tensor,
    tokens: Tensor,
    cost: Tensor,
    lengths: Tensor,
    kind: RewardKind = "mean",
    without_thought: Tensor | None = None,
) -> Tensor:
    """Reward of each line, r_t = l_t - cost_t (paper Eq. 4.1); with cost = c 1[z_t != act] the price of a thought.

    `log_probs` [rollouts, lines] summed over the line's tokens, nats; `tokens` their number; `cost` from
    `elbo.latent_cost`. `mean`: l_t is nats per token; `sum`: nats per line; `gain`: nats per token minus the same for
    `without_thought`, the line's log-probability where no thought precedes it. Returns [rollouts, lines].
    Raises ValueError for a line without tokens, an unknown kind, or `without_thought` missing or not used.
    """
    mask = line_mask(lengths, log_probs.size(-1))
    if bool(((tokens < 1) & mask).any()):
        raise ValueError("a line has no tokens; a log-likelihood per token needs at least one in every line")
    if (kind == "gain") != (without_thought is not None):
        raise ValueError(f"reward '{kind}' and the log-probabilities without thought go together only for 'gain'")
    if kind == "sum":
        likelihood = log_probs
    elif kind == "mean":
        likelihood = log_probs / tokens
    elif without_thought is not None:
        likelihood = (log_probs - without_thought) / tokens
    else:
        raise ValueError(f"unknown reward '{kind}'; known are mean, sum, gain")
    return torch.where(mask, likelihood - cost, 0.0)


def _earlier(x: Tensor, lines: int) -> Tensor:
    """x moved `lines` (no more than there are) to the front, zeros behind."""
    return F.pad(x[..., lines:], (0, lines))


def discounted_returns(rewards: Tensor, lengths: Tensor, horizon: int | None = None, discount: float = 1.0) -> Tensor:
    """R_t = sum of discount^(k-t) r_k over k = t .. min(t + horizon, length) - 1 (paper Eq. 4.1).

    `rewards` [rollouts, lines]; `horizon` None for all lines. Returns [rollouts, lines].
    """
    steps = rewards.size(-1)
    left = steps if horizon is None else min(horizon, steps)
    # Sums over windows of 1, 2, 4, ... lines; the horizon is the sum of some of these sizes.
    window = torch.where(line_mask(lengths, steps), rewards, 0.0)
    total = torch.zeros_like(window)
    covered, size = 0, 1
    while left:
        if left & 1:
            total = total + discount**covered * _earlier(window, covered)
            covered += size
        left >>= 1
        if left:
            window = window + discount**size * _earlier(window, size)
            size *= 2
    return total


def returns(rewards: Tensor, lengths: Tensor, config: ReturnConfig) -> Tensor:
    """What each line's latent is credited with, [rollouts, lines]: returns-to-go, or one sum for the whole snippet."""
    if not config.whole_block:
        return discounted_returns(rewards, lengths, config.horizon, config.discount)
    mask = line_mask(lengths, rewards.size(-1))
    total = torch.where(mask, rewards, 0.0).sum(-1, keepdim=True)
    return torch.where(mask, total, 0.0)


def leave_one_out_advantages(returns: Tensor, groups: Tensor, lengths: Tensor) -> Tensor:
    """A_t = R_t minus the mean R_t of the group's other rollouts at the same line (paper Eq. 4.1; RLOO).

    `returns` [rollouts, lines]; `groups` [rollouts] int64, the number from 0 on of the snippet a rollout belongs to, in
    any order; the rollouts of a snippet share its lines. Returns [rollouts, lines]. Raises ValueError for a group of
    one, and for a group whose members differ in length.
    """
    mask = line_mask(lengths, returns.size(-1))
    number = int(groups.max()) + 1 if groups.numel() else 0
    size = torch.bincount(groups, minlength=number)
    if bool((size == 1).any()):
        alone = int((size == 1).nonzero()[0])
        raise ValueError(f"group {alone} has one rollout; a baseline from the others needs two or more per snippet")
    low = lengths.new_zeros(number).scatter_reduce(0, groups, lengths, "amin", include_self=False)
    if not torch.equal(low[groups], lengths):
        raise ValueError("rollouts of one group differ in their number of lines; group the rollouts of one snippet")
    masked = torch.where(mask, returns, 0.0)
    mean = masked.new_zeros(number, masked.size(-1)).index_add(0, groups, masked) / size.unsqueeze(-1).clamp(min=1)
    n = size[groups].unsqueeze(-1).to(returns.dtype)
    # R - mean of the others = n / (n - 1) (R - mean of all)
    return (masked - mean[groups]) * (n / (n - 1))
