"""Rewards of whole answers to advantages, and advantages to token weights: GRPO and its relatives.

A group is the answers to one task. Everything is [answers] float64 unless said; `groups` [answers] int64 is the number
of the group an answer belongs to, from 0 on, in any order.
"""

from typing import Literal

import torch
from torch import Tensor

from ra3_megatron.algo.returns import leave_one_out_advantages

AdvantageKind = Literal["normalised", "centred", "leave_one_out"]
Aggregation = Literal["sequence_mean", "token_mean", "constant"]

EPSILON = 1e-4
"""Added to a group's standard deviation, as TRL does; verl adds 1e-6."""


def group_advantages(rewards: Tensor, groups: Tensor, kind: AdvantageKind, epsilon: float = EPSILON) -> Tensor:
    """What an answer is worth next to the others of its group, [answers].

    `normalised`: (r - mean) / (standard deviation + epsilon), the deviation with n - 1 (GRPO, arXiv 2402.03300);
    `centred`: r - mean (Dr. GRPO, arXiv 2503.20783); `leave_one_out`: r - mean of the others (RLOO). Raises ValueError
    for a group of one.
    """
    lengths = torch.ones_like(groups)
    # R less the mean of the others is n / (n - 1) times R less the mean of all.
    alone = leave_one_out_advantages(rewards.unsqueeze(-1), groups, lengths).squeeze(-1)
    if kind == "leave_one_out":
        return alone
    size = torch.bincount(groups, minlength=1)[groups].to(rewards.dtype)
    centred = alone * (size - 1) / size
    if kind == "centred":
        return centred
    if kind != "normalised":
        raise ValueError(f"unknown advantage '{kind}'; known are normalised, centred, leave_one_out")
    squares = rewards.new_zeros(int(groups.max()) + 1 if groups.numel() else 0)
    squares = squares.index_add(0, groups, centred.square())
    return centred / ((squares[groups] / (size - 1)).sqrt() + epsilon)


def flat_groups(rewards: Tensor, groups: Tensor, count: int) -> Tensor:
    """Which of `count` groups teach nothing: all answers earned the same, or there is one answer or none; bool [count].

    Compared exactly: rewards that differ by rounding alone differ.
    """
    low = rewards.new_full((count,), torch.inf).scatter_reduce(0, groups, rewards, "amin")
    high = rewards.new_full((count,), -torch.inf).scatter_reduce(0, groups, rewards, "amax")
    return low >= high


def answer_weight(tokens: int, aggregation: Aggregation) -> float:
    """Weight of each of an answer's `tokens` >= 1 tokens that count in the loss."""
    return 1.0 / tokens if aggregation == "sequence_mean" else 1.0


def overlong_penalty(lengths: Tensor, limit: int, buffer: int) -> Tensor:
    """What is taken off the reward of an answer of `lengths` tokens: 0 up to limit - buffer, then rising to 1 at the
    limit (soft punishment of DAPO, arXiv 2503.14476, eq. 13; its sign is turned round)."""
    return ((lengths - (limit - buffer)) / buffer).clamp(0.0, 1.0)
