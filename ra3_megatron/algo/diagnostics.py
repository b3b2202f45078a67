"""Figures that every run reports about its latents: how often, how long, for how many lines, and what for.

Each function measures one batch and returns sums of a fixed shape, so batches are joined with `+` and processes with
`map(all_reduce)`; the figures are properties of the joined sums. A mean of nothing is NaN. Tensors are
`[rollouts, lines]`, padded on the right, with `lengths` [rollouts]; padding is never read.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from ra3_megatron.algo.decision import Decision
from ra3_megatron.algo.returns import line_mask


@dataclass(frozen=True)
class Sums:
    """Float64 tensors that add up over batches and processes."""

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same with `function` applied to each tensor, e.g. a sum over processes or a move to another device."""
        return type(self)(*(function(getattr(self, f.name)) for f in fields(self)))


def _ratio(a: Tensor, b: Tensor) -> float:
    return float(a) / float(b) if float(b) else math.nan


def _sum(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x.double(), 0.0).sum()


@dataclass(frozen=True)
class Thinking(Sums):
    """How often a line has a thought, and how long thoughts are."""

    lines: Tensor
    """Number of lines."""
    thoughts: Tensor
    """Number of lines with a thought."""
    tokens: Tensor
    """Number of thought tokens."""

    @property
    def rate(self) -> float:
        """Share of lines that have a thought."""
        return _ratio(self.thoughts, self.lines)

    @property
    def mean_tokens(self) -> float:
        """Tokens of a thought, the opening and the closing one included if `thought_tokens` counted them."""
        return _ratio(self.tokens, self.thoughts)


def thinking(thinks: Tensor, thought_tokens: Tensor, lengths: Tensor) -> Thinking:
    """Count thoughts: `thinks` bool and `thought_tokens`, both [rollouts, lines]."""
    mask = line_mask(lengths, thinks.size(-1))
    thoughts = mask & thinks
    return Thinking(mask.sum().double(), thoughts.sum().double(), _sum(thought_tokens, thoughts))


@dataclass(frozen=True)
class Durations(Sums):
    """Durations tau of latents, in lines from one thought to the next; lines before the first thought belong to none.

    The last thought of a snippet is cut off: with n lines from it to the end all that is known is tau >= n. Leaving it
    out would favour short durations and taking n for its duration would too, so the figures use the Kaplan-Meier
    estimate, in which it counts among those that lasted until then. That supposes that a snippet's end says nothing
    about the duration of its last latent.
    """

    ended: Tensor
    """[longest + 1] number of latents with tau = index."""
    outlived: Tensor
    """[longest + 1] number of latents of which only tau > index is known."""

    def survival(self) -> Tensor:
        """P(tau > k) for k = 0 .. the longest duration that was observed in full or in part, float64."""
        seen = self.ended + self.outlived
        at_risk = seen.flip(0).cumsum(0).flip(0)
        known = max(int((at_risk > 0).sum()), 1)
        return torch.cumprod(1.0 - self.ended[:known] / at_risk[:known].clamp(min=1.0), 0)

    @property
    def cut_off(self) -> float:
        """Share of latents whose end was not seen."""
        return _ratio(self.outlived.sum(), self.outlived.sum() + self.ended.sum())

    @property
    def mean(self) -> float:
        """Mean duration, lines; those that outlast all observations are taken to end one line later (a lower bound)."""
        if not float((self.ended + self.outlived).sum()):
            return math.nan
        return float(self.survival().sum())

    def mean_discount(self, discount: float) -> float:
        """E[discount^tau], the paper's gamma-bar with a mean for its supremum; an upper bound as `mean` is a lower."""
        if not float((self.ended + self.outlived).sum()):
            return math.nan
        survival = self.survival()
        powers = discount ** torch.arange(len(survival) + 1, dtype=survival.dtype, device=survival.device)
        ends = torch.cat((survival[:-1] - survival[1:], survival[-1:]))
        return float((ends * powers[1:]).sum())


def durations(thinks: Tensor, lengths: Tensor, longest: int = 256) -> Durations:
    """Count durations: `thinks` [rollouts, lines] bool. One of more than `longest` lines counts as cut off there."""
    lines = thinks.size(-1)
    mask = line_mask(lengths, lines)
    thoughts = mask & thinks
    position = torch.arange(lines, device=thinks.device).expand_as(thoughts)
    # Position of the next thought after each line, `lines` where there is none.
    here = position.masked_fill(~thoughts, lines)
    following = torch.cat((here[:, 1:], here.new_full((len(here), 1), lines)), -1)
    following = following.flip(-1).cummin(-1).values.flip(-1)
    seen = following < lines
    last = torch.where(seen, following, lengths.unsqueeze(-1) - 1) - position
    seen = seen & (last <= longest)
    last = last.clamp(0, longest)

    def count(which: Tensor) -> Tensor:
        return torch.bincount(last[thoughts & which], minlength=longest + 1).double()

    return Durations(count(seen), count(~seen))


@dataclass(frozen=True)
class Gain(Sums):
    """What a thought adds to the log-likelihood of its line, nats per token of the line."""

    count: Tensor
    """Number of lines with a thought."""
    total: Tensor
    """Sum of l(a|z) - l(a|act)."""
    squares: Tensor
    """Sum of its squares."""
    helped: Tensor
    """Number of lines that a thought made more likely."""

    @property
    def mean(self) -> float:
        """Mean gain, nats per token."""
        return _ratio(self.total, self.count)

    @property
    def standard_error(self) -> float:
        """Of `mean`, with lines taken as independent; NaN for fewer than two lines."""
        n = float(self.count)
        if n < 2:
            return math.nan
        variance = max(float(self.squares) - float(self.total) ** 2 / n, 0.0) / (n - 1)
        return math.sqrt(variance / n)

    @property
    def share_helped(self) -> float:
        """Share of thoughts that made their line more likely."""
        return _ratio(self.helped, self.count)


def gain(with_thought: Tensor, without_thought: Tensor, tokens: Tensor, thinks: Tensor, lengths: Tensor) -> Gain:
    """l(a_t|z_t) - l(a_t|act) at lines with a thought.

    `with_thought`, `without_thought` [rollouts, lines] log-probabilities of the line summed over its `tokens`, nats,
    after the same earlier latents. `without_thought` is read at lines with a thought only.
    """
    thoughts = line_mask(lengths, thinks.size(-1)) & thinks
    difference = torch.where(thoughts, (with_thought.double() - without_thought.double()) / tokens, 0.0)
    return Gain(thoughts.sum().double(), difference.sum(), difference.square().sum(), (difference > 0).sum().double())


@dataclass(frozen=True)
class EffectiveActions(Sums):
    """Effective number of actions: exponential of the mean entropy, in nats, of a choice."""

    decisions: Tensor
    """Number of decision points."""
    decision_entropy: Tensor
    """Sum of their entropies of think or act."""
    lines: Tensor
    """Number of lines."""
    line_nats: Tensor
    """Sum of -l_t over lines, l_t summed over the line's tokens."""

    @property
    def of_decision(self) -> float:
        """Perplexity of think or act, from 1 (settled) to 2 (a coin)."""
        return math.exp(_ratio(self.decision_entropy, self.decisions))

    @property
    def nats_of_line(self) -> float:
        """Mean -l_t, nats per line."""
        return _ratio(self.line_nats, self.lines)

    @property
    def of_line(self) -> float:
        """Perplexity of the expert's line given state and latent; infinite above exp(709)."""
        nats = self.nats_of_line
        return math.inf if nats > 709 else math.exp(nats)


def effective_actions(decision: Decision, log_probs: Tensor, lengths: Tensor) -> EffectiveActions:
    """Perplexity of all `decision` points and of all lines: `log_probs` [rollouts, lines], nats per line."""
    mask = line_mask(lengths, log_probs.size(-1))
    entropy = decision.entropy().detach().double()
    n = torch.tensor(float(entropy.numel()), dtype=torch.float64, device=entropy.device)
    return EffectiveActions(n, entropy.sum(), mask.sum().double(), -_sum(log_probs.detach(), mask))


@dataclass(frozen=True)
class Calibration(Sums):
    """Reliability of p_think in bins of equal width from 0 to 1."""

    count: Tensor
    """[bins] decision points."""
    predicted: Tensor
    """[bins] sum of p_think."""
    happened: Tensor
    """[bins] number of outcomes that were true."""
    squared_error: Tensor
    """Sum of (p_think - outcome)^2."""

    @property
    def reliability(self) -> tuple[tuple[int, float, float], ...]:
        """(decision points, mean p_think, share of true outcomes) of each bin that is not empty, in order."""
        rows = zip(self.count.tolist(), self.predicted.tolist(), self.happened.tolist(), strict=True)
        return tuple((int(n), p / n, h / n) for n, p, h in rows if n)

    @property
    def expected_error(self) -> float:
        """ECE: mean over decision points of |mean p_think - share of true outcomes| of their bin."""
        return _ratio((self.predicted - self.happened).abs().sum(), self.count.sum())

    @property
    def brier(self) -> float:
        """Mean squared error of p_think as a forecast of the outcome."""
        return _ratio(self.squared_error, self.count.sum())


def calibration(p_think: Tensor, outcome: Tensor, bins: int = 10) -> Calibration:
    """Compare p_think with what it stands for: both [decisions], `outcome` bool.

    With outcome = "a thought was drawn" it checks the sampler against the scores and must be near zero; with outcome =
    "the gain of a thought here is above its price" it says whether the policy thinks where thinking pays.
    """
    p = p_think.detach().double()
    happened = outcome.to(p)
    which = (p * bins).long().clamp(0, bins - 1)

    def into_bins(x: Tensor) -> Tensor:
        return x.new_zeros(bins).index_add(0, which, x)

    return Calibration(into_bins(torch.ones_like(p)), into_bins(p), into_bins(happened), (p - happened).square().sum())
