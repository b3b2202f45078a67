"""Posterior with hindsight: q reads the whole expert text before it thinks; the model learns the thoughts without it.

A row of q is `[start][prompt][code][separator][prompt][code with thoughts]`; it is drawn and trained in this form, as a
trajectory whose prompt ends before the second code. `from_hindsight` takes the first copy away, for scoring, and for
fine-tuning from the prefix alone. Ids are those of the segments, never encoded again.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ra3_megatron.config.errors import UserError
from ra3_megatron.data.latent import ThinkTokens
from ra3_megatron.data.trajectory import Kind, Segment, Trajectory, splice
from ra3_megatron.rollout.interleaved import Rollout

SEPARATOR = "\n\n\n"
"""Between both copies: blank lines, which are valid in any text and begin no document anew, as an end token would."""


def separator_ids(think_tokens: ThinkTokens) -> tuple[int, ...]:
    """The tokenised separator."""
    return tuple(think_tokens.tokenizer.encode(SEPARATOR))


def _prompt_length(trajectory: Trajectory) -> int:
    """Tokens before the first line, the start token included."""
    first = trajectory.segments[0]
    return first.end if first.kind == Kind.PROMPT else 0


def hindsight_view(trajectory: Trajectory, separator: Sequence[int]) -> Trajectory:
    """What q sees of a trajectory without thoughts: its whole text is the prompt, and then comes once more.

    `separator`: ids between both. Lines and decisions are those of the trajectory, moved behind the first copy.
    """
    assert not trajectory.thoughts(), "the first copy must not hold thoughts"
    length = _prompt_length(trajectory)
    again = trajectory.ids[int(trajectory.has_start) : length]
    prompt = np.concatenate((trajectory.ids, np.asarray(separator, dtype=np.int32), again))
    shift = len(prompt) - length
    code = [replace(s, start=s.start + shift, end=s.end + shift) for s in trajectory.segments if s.kind == Kind.CODE]
    return replace(
        trajectory,
        ids=np.concatenate((prompt, trajectory.ids[length:])).astype(np.int32),
        segments=(Segment(Kind.PROMPT, -1, 0, len(prompt)), *code),
        decisions=tuple(replace(d, position=d.position + shift) for d in trajectory.decisions),
    )


def hindsight_views(
    trajectories: Sequence[Trajectory], think_tokens: ThinkTokens, max_tokens: int, max_latent_tokens: int
) -> list[Trajectory]:
    """Views of all trajectories, each with room for one thought at least in rows of `max_tokens`.

    Raises UserError with the snippet length that fits when one does not.
    """
    separator = separator_ids(think_tokens)
    views = [hindsight_view(t, separator) for t in trajectories]
    for trajectory, view in zip(trajectories, views, strict=True):
        needed = len(view.ids) + max_latent_tokens + len(think_tokens.ending_ids)
        if needed > max_tokens:
            fitting = (max_tokens - (needed - len(view.ids)) - len(separator)) // 2
            raise UserError(
                f"latent.posterior is hindsight; {trajectory.name or 'a snippet'} has {len(trajectory.ids)} tokens, "
                f"which twice and with one thought need {needed}; a row has room for {max_tokens}; set "
                f"data.snippet_tokens to {max(fitting, 1)} or less, leave room for more thoughts, or raise "
                "train.seq_length"
            )
    return views


def from_hindsight(rollout: Rollout, expert: Trajectory) -> Rollout:
    """The rollout of a view as one of the `expert` trajectory that the view was made of: the first copy is gone.

    Actions keep the log-probabilities that q gave them with the text in view. The lines' own are of another context
    now: `line_log_probs` are NaN until a scorer fills them in, and so are `without_thought` and `log_act`, for every
    line.
    """
    view = rollout.trajectory
    shift = _prompt_length(view) - _prompt_length(expert)
    assert shift >= len(expert.ids), "the rollout is not one of a view of this trajectory"
    offered = {d.line for d in view.decisions}
    bare = replace(expert, decisions=tuple(d for d in expert.decisions if d.line in offered))
    infused = splice(bare, view.thoughts())
    assert np.array_equal(infused.ids[_prompt_length(expert) :], view.ids[_prompt_length(view) :]), "another text"
    unknown = np.full(expert.num_lines, np.nan)
    return replace(
        rollout,
        trajectory=infused,
        line_log_probs=unknown,
        without_thought=unknown.copy(),
        log_act=unknown.copy(),
        positions=rollout.positions - shift,
    )
