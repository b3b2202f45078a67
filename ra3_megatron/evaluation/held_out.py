"""What held-out code costs a model, bare and with the model's own thoughts between the lines.

Both are sums over the same code tokens, those of the expert's text; comment tokens are never mixed in. `thinking` is
what the code costs on average given thoughts that the model draws from the text so far, and with Jensen

    E_z[-log p(a | s, z)]  >=  -log E_z[p(a | s, z)]  =  -log p(a | s),      z_t ~ q(. | s_t, z_<t),

an upper bound of the code's cost under the model that thinks: the thoughts have not seen the line they help with. The
mean of the probabilities over several samples, `multi_sample`, bounds it too and comes closer. Lines without a thought
carry the price of not thinking, -log(1 - p_think), in both forms, for it is part of the line's first token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ra3_megatron.algo.diagnostics import durations
from ra3_megatron.data.latent import ThinkTokens
from ra3_megatron.data.trajectory import Kind, Trajectory, keeps_program
from ra3_megatron.evaluation.statistics import Difference, Interval, by_group, paired_ratio, ratio_interval
from ra3_megatron.rollout.engine import RolloutEngine
from ra3_megatron.rollout.interleaved import Rollout, RolloutSettings, Uniforms, rollout
from ra3_megatron.rollout.scoring import LineScorer

FORMS = ("bare", "thinking", "multi_sample")
"""Costs of a snippet: the text without thoughts, the mean over samples with them, the cost of their mean."""


@dataclass(frozen=True)
class Sample:
    """One rollout of a snippet."""

    nats: float
    """-log p of all code lines given the thoughts."""
    declined: float | None
    """Of them, what decisions to go on cost; none at another temperature than 1, where they are not those of `nats`."""
    thoughts: tuple[int, ...]
    """Lines with a thought."""
    thought_tokens: int
    """Tokens of all thoughts, openings and ends included."""
    decisions: int
    """Decisions offered."""
    not_offered: int
    """Decisions without room for a thought."""
    truncated: int
    """Thoughts ended by force."""
    gains: tuple[float, ...]
    """log p(line | thought) - log p(line | act) at lines with a thought, nats per token of the line."""
    broken: bool
    """Whether the thoughts change the program."""


@dataclass(frozen=True)
class SnippetScore:
    """One snippet under one model."""

    snippet: int
    """Number in the data set."""
    document: str
    """Name of the document it is a piece of."""
    tokens: int
    """Code tokens that have a probability: the very first token of a text has none."""
    lines: int
    """Code lines."""
    bare: float
    """-log p of the code without thoughts, nats."""
    samples: tuple[Sample, ...]
    """Rollouts with the model's own thoughts."""

    def nats(self, form: str) -> float:
        """Cost of the code in one of `FORMS`."""
        if form == "bare":
            return self.bare
        costs = np.array([s.nats for s in self.samples])
        if form == "thinking":
            return float(costs.mean())
        assert form == "multi_sample", form
        return float(math.log(len(costs)) - np.logaddexp.reduce(-costs))

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> "SnippetScore":
        """Inverse of `dataclasses.asdict`, after a passage through JSON."""
        samples = [
            Sample(**{**s, "thoughts": tuple(s["thoughts"]), "gains": tuple(s["gains"])}) for s in plain["samples"]
        ]
        return cls(**{**plain, "samples": tuple(samples)})


def code_tokens(trajectory: Trajectory) -> int:
    """Code tokens with a probability."""
    first = trajectory.segments[0].kind == Kind.CODE
    return int((trajectory.kinds() == Kind.CODE).sum()) - int(first)


def score_snippets(
    scorer: LineScorer,
    engine: RolloutEngine,
    trajectories: Sequence[Trajectory],
    ids: Sequence[int],
    samples: int,
    uniforms: Uniforms,
    settings: RolloutSettings,
    think_tokens: ThinkTokens,
) -> tuple[list[SnippetScore], list[Rollout]]:
    """Score snippets without thoughts, numbered `ids`, under the model that `scorer` and `engine` hold.

    Returns scores in order, and the rollouts, `samples` of each. All processes of a replica call it alike.
    """
    every = scorer.score(trajectories)
    drawn = rollout(engine, trajectories, samples, uniforms, settings, think_tokens)
    scores = []
    for i, (number, trajectory, plain) in enumerate(zip(ids, trajectories, every, strict=True)):
        own = [_sample(trajectory, r, think_tokens) for r in drawn[i * samples : (i + 1) * samples]]
        size, lines = code_tokens(trajectory), trajectory.num_lines
        bare = -float(plain.lines.sum())
        scores.append(SnippetScore(int(number), trajectory.name, size, lines, bare, tuple(own)))
    return scores, drawn


def _sample(expert: Trajectory, drawn: Rollout, think_tokens: ThinkTokens) -> Sample:
    thoughts = drawn.trajectory.thoughts()
    lines = sorted(thoughts)
    sizes = {s.line: s.end - s.start for s in expert.segments if s.kind == Kind.CODE}
    gains = [float(drawn.gains[n] / sizes[n]) for n in lines]
    latent = think_tokens.format
    return Sample(
        nats=-float(drawn.line_log_probs.sum()),
        declined=-float(np.log1p(-drawn.p_think[~drawn.thought]).sum()) if drawn.temperature == 1 else None,
        thoughts=tuple(lines),
        thought_tokens=sum(map(len, thoughts.values())),
        decisions=len(drawn.thought),
        not_offered=drawn.not_offered,
        truncated=len(drawn.truncated),
        gains=tuple(gains),
        broken=bool(lines) and not keeps_program(expert, drawn.trajectory, think_tokens.tokenizer, latent),
    )


# -------------------------------------------------------------------------------------------------- figures


def cost(scores: Sequence[SnippetScore], form: str) -> Interval:
    """Nats per code token over all snippets, with an interval over their documents."""
    nats, tokens = _by_document(scores, [form])
    return ratio_interval(nats[0], tokens)


def difference(
    first: Sequence[SnippetScore], second: Sequence[SnippetScore], form: str, second_form: str | None = None
) -> Difference:
    """Nats per code token of the first model less those of the second, on the same snippets in the same order.

    `second_form` where it is not `form` for both. Raises ValueError for other snippets.
    """
    if [(s.snippet, s.tokens) for s in first] != [(s.snippet, s.tokens) for s in second]:
        raise ValueError("the two models were scored on different snippets; score both on the same")
    one, tokens = _by_document(first, [form])
    other, _ = _by_document(second, [second_form or form])
    return paired_ratio(one[0], other[0], tokens)


def _by_document(scores: Sequence[SnippetScore], forms: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Nats [forms, documents] and tokens [documents]; pieces of one document are no independent observations."""
    table = np.array([[s.tokens, *(s.nats(form) for form in forms)] for s in scores])
    # A snippet without a name is a document of its own.
    summed = by_group(table, [s.document or s.snippet for s in scores])
    summed = summed[summed[:, 0] > 0]
    return summed[:, 1:].T, summed[:, 0]


def thinking_figures(scores: Sequence[SnippetScore], discount: float) -> dict[str, float | None]:
    """How often, how long, for how many lines the model thinks, and what it gains; None for a mean of nothing.

    `discount` is the gamma of `discount_of_duration` = mean gamma^tau.
    """
    samples = [(score, sample) for score in scores for sample in score.samples]
    thoughts = sum(len(s.thoughts) for _, s in samples)
    gain = _mean_gain(scores)
    declined = [s.declined for _, s in samples if s.declined is not None]
    thinks = torch.zeros(len(samples), max((score.lines for score, _ in samples), default=0), dtype=torch.bool)
    for row, (_, sample) in enumerate(samples):
        thinks[row, list(sample.thoughts)] = True
    tau = durations(thinks, torch.tensor([score.lines for score, _ in samples], dtype=torch.int64))

    def share(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    return {
        "think_rate": share(thoughts, sum(s.decisions for _, s in samples)),
        "thought_tokens": share(sum(s.thought_tokens for _, s in samples), thoughts),
        "duration": known(tau.mean),
        "discount_of_duration": known(tau.mean_discount(discount)),
        "gain": known(gain.value),
        "gain_low": known(gain.low),
        "gain_high": known(gain.high),
        "declined": share(sum(declined), sum(score.tokens for score, s in samples if s.declined is not None)),
        "not_offered": share(
            sum(s.not_offered for _, s in samples), sum(s.decisions + s.not_offered for _, s in samples)
        ),
        "truncated_thoughts": share(sum(s.truncated for _, s in samples), thoughts),
        "broken_programs": sum(s.broken for _, s in samples),
    }


def _mean_gain(scores: Sequence[SnippetScore]) -> Interval:
    """Mean gain of a thought, nats per token of its line, with an interval over documents; NaN without thoughts."""
    table = np.array([[sum(s.gains), len(s.gains)] for score in scores for s in score.samples])
    summed = by_group(table, [score.document or score.snippet for score in scores for _ in score.samples])
    summed = summed[summed[:, 1] > 0]
    return ratio_interval(summed[:, 0], summed[:, 1]) if len(summed) else Interval(math.nan, math.nan, math.nan)


def known(value: float) -> float | None:
    """`value`, or None for what JSON cannot hold."""
    return float(value) if math.isfinite(value) else None
