"""What every batch of rollouts reports (section 7 of the algorithm's notes), joined over batches and replicas."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from ra3_megatron.algo.decision import Decision
from ra3_megatron.algo.diagnostics import (
    Calibration,
    Durations,
    EffectiveActions,
    Gain,
    Sums,
    Thinking,
    calibration,
    durations,
    effective_actions,
    gain,
    thinking,
)
from ra3_megatron.algo.elbo import multi_sample_bound, temporal_elbo
from ra3_megatron.rollout.experience import Experience


@dataclass(frozen=True)
class ClusteredMean(Sums):
    """Mean of a quantity over lines, with snippets as the independent unit: lines of one snippet hang together."""

    clusters: Tensor
    """Number of snippets."""
    count: Tensor
    """Sum of n_i, the snippets' numbers of lines."""
    total: Tensor
    """Sum of y_i, the snippets' totals."""
    count_squares: Tensor
    total_squares: Tensor
    products: Tensor
    """Sum of n_i y_i."""

    @property
    def mean(self) -> float:
        """sum y_i / sum n_i; NaN without lines."""
        return float(self.total / self.count) if float(self.count) else math.nan

    @property
    def standard_error(self) -> float:
        """Of `mean`, linearised for a ratio (Cochran, Sampling Techniques, 6.4); NaN for fewer than two snippets."""
        m = float(self.clusters)
        if m < 2:
            return math.nan
        r = self.mean
        squares = float(self.total_squares - 2 * r * self.products + r * r * self.count_squares)
        return math.sqrt(max(squares, 0.0) * m / (m - 1)) / float(self.count)


def clustered_mean(totals: Tensor, counts: Tensor, clusters: Tensor) -> ClusteredMean:
    """From `totals`, `counts` [parts] and the number [parts] int64 of the snippet each part belongs to."""
    _, which = torch.unique(clusters, return_inverse=True)
    number = int(which.max()) + 1 if which.numel() else 0
    y = torch.zeros(number, dtype=torch.float64).index_add(0, which, totals.double())
    n = torch.zeros(number, dtype=torch.float64).index_add(0, which, counts.double())
    m = torch.tensor(float(number), dtype=torch.float64)
    return ClusteredMean(m, n.sum(), y.sum(), n.square().sum(), y.square().sum(), (n * y).sum())


@dataclass(frozen=True)
class Totals(Sums):
    """Plain sums over rollouts."""

    rollouts: Tensor
    decisions: Tensor
    """Offered."""
    not_offered: Tensor
    truncated: Tensor
    """Thoughts ended by force."""
    code_tokens: Tensor
    elbo: Tensor
    """Sum of the temporal bound, nats."""
    bound_tokens: Tensor
    """Code tokens of the snippets with a multi-sample bound, each counted once."""
    bound: Tensor
    """Sum of the multi-sample bounds, nats."""
    broken: Tensor
    """Rollouts left out since their thoughts change the program."""


@dataclass(frozen=True)
class BatchFigures:
    """Sums from which every figure of a batch follows; batches add up."""

    reward: ClusteredMean
    over_bare: ClusteredMean
    """Reward less what the same line earns in the text without any thought."""
    thinking: Thinking
    durations: Durations
    gain: Gain
    actions: EffectiveActions
    calibration: Calibration
    totals: Totals

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def reduced(self, add_up: Callable[[Tensor], Tensor]) -> Self:
        """The same over all replicas: `add_up` is called once, with everything in one float64 vector."""
        groups = [getattr(self, f.name) for f in fields(self)]
        parts = [getattr(group, f.name) for group in groups for f in fields(group)]
        vector = add_up(torch.cat([p.reshape(-1) for p in parts]))
        whole = iter(vector.split([p.numel() for p in parts]))
        return type(self)(*(group.map(lambda x: next(whole).view_as(x)) for group in groups))

    def metrics(self, discount: float) -> dict[str, float]:
        """Figures by their names in the metrics' schema; `discount` is that of gamma-bar."""
        t = self.totals
        thoughts = float(self.thinking.thoughts)
        return {
            "reward": self.reward.mean,
            "reward_error": self.reward.standard_error,
            "reward_over_bare": self.over_bare.mean,
            "reward_over_bare_error": self.over_bare.standard_error,
            "think_rate": _ratio(thoughts, t.decisions),
            "thought_tokens": self.thinking.mean_tokens,
            "duration": self.durations.mean,
            "discount_of_duration": self.durations.mean_discount(discount),
            "gain": self.gain.mean,
            "gain_error": self.gain.standard_error,
            "elbo": _ratio(t.elbo, t.code_tokens),
            "elbo_multi_sample": _ratio(t.bound, t.bound_tokens),
            "decision_perplexity": self.actions.of_decision,
            "line_nats": self.actions.nats_of_line,
            "calibration_error": self.calibration.expected_error,
            "calibration_brier": self.calibration.brier,
            "truncated_thoughts": _ratio(t.truncated, thoughts),
            "not_offered": _ratio(t.not_offered, t.decisions + t.not_offered),
        }


def _ratio(a: Tensor | float, b: Tensor | float) -> float:
    return float(a) / float(b) if float(b) else math.nan


def batch_figures(experience: Experience, price: float) -> BatchFigures:
    """Sums of one replica's batch; `price` is what a thought has to gain, nats per token, to have been worth it.

    The gain is that of the model that sampled, and compares with the same line after the same earlier thoughts. What a
    thought would have gained is known only where there is one: the calibration is over these decisions.
    """
    table = experience.table
    own = [s.rollout for s in experience.scored]
    sampled = line_gains(experience)
    lines = table.lengths.double()
    decision = table.decision
    offered = Decision(decision.log_think[table.decides], decision.log_act[table.decides])
    elbo = temporal_elbo(table.log_probs, experience.cost, table.lengths)
    code = _line_sum(table.tokens, table.lengths)
    bound, bound_tokens = _bounds(experience, code)
    counts = (
        len(own),
        int(table.decides.sum()),
        sum(r.not_offered for r in own),
        sum(len(r.truncated) for r in own),
        float(code.sum()),
        float(elbo.total.sum()),
        bound_tokens,
        bound,
        experience.broken,
    )
    return BatchFigures(
        reward=clustered_mean(experience.rewards.sum(-1), lines, table.slots),
        over_bare=clustered_mean((experience.rewards - experience.bare_rewards).sum(-1), lines, table.slots),
        thinking=thinking(table.thinks, table.thought_tokens, table.lengths),
        durations=durations(table.thinks, table.lengths),
        gain=gain(sampled * table.tokens, torch.zeros_like(sampled), table.tokens, table.thinks, table.lengths),
        actions=effective_actions(offered, table.log_probs, table.lengths),
        calibration=calibration(table.p_think[table.thinks], sampled[table.thinks] > price),
        totals=Totals(*(torch.tensor(float(c), dtype=torch.float64) for c in counts)),
    )


def line_gains(experience: Experience) -> Tensor:
    """Gain of every thought under the model that sampled, nats per token [rollouts, lines]; 0 at other lines."""
    table = experience.table
    found = torch.zeros_like(table.log_probs)
    for i, scored in enumerate(experience.scored):
        gains = scored.rollout.gains
        found[i, : len(gains)] = torch.from_numpy(gains)
    return torch.where(table.thinks, found, 0.0) / table.tokens


def _line_sum(values: Tensor, lengths: Tensor) -> Tensor:
    inside = torch.arange(values.size(-1)) < lengths.unsqueeze(-1)
    return torch.where(inside, values, 0.0).sum(-1)


def _bounds(experience: Experience, code: Tensor) -> tuple[float, float]:
    """Sum of the groups' multi-sample bounds, and the code tokens they are about."""
    table = experience.table
    proposal = _line_sum(table.latent, table.lengths)
    total = tokens = 0.0
    for slot in torch.unique(table.slots).tolist():
        own = table.slots == slot
        if bool(torch.isfinite(table.log_joint[own]).all()):
            total += float(multi_sample_bound(table.log_joint[own], proposal[own]))
            tokens += float(code[own][0])
    return total, tokens


def is_flat(rewards: Sequence[float], errors: Sequence[float], window: int, tolerance: float) -> bool:
    """Whether a reward has stopped rising, from the history of all steps alone.

    True when the mean of the last `window` steps is not above that of as many before by `tolerance` standard errors of
    the difference. `errors`: standard error of each step's reward; where one is not known, the scatter of the steps
    stands for them. Never with a window of 0, before two windows are full, or with a reward that is NaN among them.
    """
    if window == 0 or len(rewards) < 2 * window:
        return False
    means, variance = [], 0.0
    for part in (slice(-2 * window, -window), slice(-window, None)):
        values, own = list(rewards[part]), list(errors[part])
        means.append(math.fsum(values) / window)
        if all(math.isfinite(e) for e in own):
            variance += math.fsum(e * e for e in own) / window**2
        elif window > 1:
            variance += math.fsum((v - means[-1]) ** 2 for v in values) / (window - 1) / window
    return means[1] - means[0] <= tolerance * math.sqrt(variance)
