"""Likelihood of the expert's lines after a batch of rollouts' thoughts: what rewards are made of."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ra3_megatron.data.trajectory import Segment, Trajectory
from ra3_megatron.rollout.experience import Member, ScoredRollout
from ra3_megatron.rollout.interleaved import Rollout
from ra3_megatron.rollout.scoring import LineScorer, LineScores

_Text = tuple[bytes, tuple[Segment, ...]]


def _text(trajectory: Trajectory) -> _Text:
    return trajectory.ids.tobytes(), trajectory.segments


def score_members(
    scorer: LineScorer, members: Sequence[Member], frozen: bool, without_thought: bool
) -> list[ScoredRollout]:
    """Score every member's lines, and those of its snippet without any thought; equal texts are run once.

    `frozen`: the scorer is not the policy that drew. `without_thought`: also score each line with a thought as if it
    had none (reward `gain`); a frozen scorer runs all the text before once more for each. All processes of a model
    replica make the same calls.
    """
    texts: dict[_Text, Trajectory] = {}
    for trajectory in (t for m in members for t in (m.expert, _infused(m))):
        texts.setdefault(_text(trajectory), trajectory)
    scores = dict(zip(texts, scorer.score(list(texts.values())), strict=True))
    found = []
    for m, alone in zip(members, _without(scorer, members, scores, frozen, without_thought), strict=True):
        own, bare = scores[_text(m.rollout.trajectory)], scores[_text(m.expert)]
        found.append(
            ScoredRollout(
                slot=m.slot,
                rollout=_known(m.rollout, own, alone),
                line_log_probs=own.given_latent,
                without_thought=alone,
                bare_log_probs=bare.given_latent,
                log_joint=own.total,
                drawn=m.drawn,
            )
        )
    return found


def _without(
    scorer: LineScorer, members: Sequence[Member], scores: dict[_Text, LineScores], frozen: bool, wanted: bool
) -> list[np.ndarray]:
    """float64 [lines] of each member: lines with a thought as if they had none, NaN elsewhere and where unknown."""
    unknown = any(np.isnan(m.rollout.line_log_probs).any() for m in members)
    # A rollout knows whether its policy would have thought at its own temperature alone.
    warm = not frozen and any(m.rollout.temperature != 1 for m in members)
    if (wanted and frozen) or unknown or warm:
        return scorer.without_thought([m.rollout.trajectory for m in members])
    if frozen:
        return [np.full(m.expert.num_lines, np.nan) for m in members]
    # The policy that drew is the scorer: what a thought gained there is known from the rollout.
    return [scores[_text(m.rollout.trajectory)].given_latent - m.rollout.gains for m in members]


def _infused(member: Member) -> Trajectory:
    """Its text; a line where there was no room for a thought is scored like the same line of the others."""
    return replace(member.rollout.trajectory, decisions=member.expert.decisions)


def _known(rollout: Rollout, own: LineScores, without: np.ndarray) -> Rollout:
    """The rollout with the scorer's figures where it has none of its own, as after hindsight."""
    if not np.isnan(rollout.line_log_probs).any():
        return rollout
    return replace(rollout, line_log_probs=own.lines, log_act=own.log_act, without_thought=without)
