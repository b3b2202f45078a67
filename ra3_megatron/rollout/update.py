"""From rollouts to what the training engine learns from: the policy gradient's actions, aligned with tokens."""

from collections.abc import Sequence

import numpy as np

from ra3_megatron.config.sections import TrainConfig
from ra3_megatron.data.batch import TrainBatch
from ra3_megatron.data.latent import ThinkTokens
from ra3_megatron.data.packing import TrainSequence
from ra3_megatron.data.trajectory import Kind
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.rollout.interleaved import Rollout
from ra3_megatron.training.actions import ACTION, THINK_SET, THOUGHT
from ra3_megatron.training.schedule import pack_micro_batches

EXTRAS = (THINK_SET, THOUGHT, "behaviour_log_probs", "advantages")
"""What every update batch has in `TrainBatch.extras`."""


def update_sequences(
    rollouts: Sequence[Rollout], advantages: Sequence[np.ndarray], think_tokens: ThinkTokens
) -> list[TrainSequence]:
    """One training sequence per rollout, in order, with the extras and weights of `training/actions.py`.

    `advantages` [lines] of every rollout: all actions at a line get the line's. `think_tokens` are those of the
    trajectories. The text after the last action is left out: it is in no loss and no action sees it.
    Raises ValueError when an advantage is missing or not finite, or when a rollout's decisions do not fit the think
    sets (other think tokens, or sets numbered in another order).
    """
    return [_sequence(r, a, think_tokens) for r, a in zip(rollouts, advantages, strict=True)]


def update_batches(sequences: Sequence[TrainSequence], train: TrainConfig, parallel: Parallel) -> list[TrainBatch]:
    """Micro-batches of this replica's `update_sequences`: of `train.seq_length` and `micro_batch_size`, at least one.

    Raises UserError for a rollout longer than a window.
    """
    return pack_micro_batches(sequences, train, parallel, (ACTION,), EXTRAS)[0]


def _sequence(one: Rollout, advantages: np.ndarray, think_tokens: ThinkTokens) -> TrainSequence:
    infused = one.trajectory
    end = int(one.positions[-1]) + 1 if len(one.positions) else min(1, len(infused.ids))
    ids, kinds, lines = infused.ids[:end], infused.kinds()[:end], infused.lines()[:end]
    if advantages.shape != (infused.num_lines,) or not np.isfinite(advantages[lines[one.positions]]).all():
        raise ValueError(
            f"advantages of shape {advantages.shape} for {infused.name or 'a rollout'} with {infused.num_lines} lines; "
            "give a finite number for every line that has an action"
        )
    _check_sets(one, think_tokens)
    extras = {name: np.zeros(end, np.float32) for name in EXTRAS}
    weight = np.zeros(end, np.float32)
    weight[one.positions] = 1.0
    for decision in infused.decisions:
        extras[THINK_SET][decision.position] = 1 + decision.think_set
    extras[THOUGHT][one.positions] = kinds[one.positions] == Kind.THOUGHT
    extras["behaviour_log_probs"][one.positions] = one.log_probs - one.log_allowed
    extras["advantages"][one.positions] = advantages[lines[one.positions]]
    return TrainSequence(ids, {ACTION: weight}, extras, kinds)


def _check_sets(one: Rollout, think_tokens: ThinkTokens) -> None:
    """Raise ValueError where a decision's token contradicts its set."""
    for decision, thought in zip(one.trajectory.decisions, one.thought, strict=True):
        token = int(one.trajectory.ids[decision.position])
        known = decision.think_set < len(think_tokens)
        if not known or bool(np.isin(token, think_tokens[decision.think_set].ids)) != thought:
            raise ValueError(
                f"{one.trajectory.name or 'a rollout'}, line {decision.line}: token {token} does not fit think set "
                f"{decision.think_set} of {len(think_tokens)}; pass the think tokens the trajectories were made with"
            )
