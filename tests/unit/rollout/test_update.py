"""Training sequences of rollouts: everything at the token it is about."""

import dataclasses

import numpy as np
import pytest

from ra3_megatron.data.batch import collate
from ra3_megatron.data.trajectory import Kind
from ra3_megatron.rollout.interleaved import RolloutSettings, rollout
from ra3_megatron.rollout.megatron import MegatronEngine
from ra3_megatron.rollout.update import update_sequences
from tests.unit.rollout.naive import OftenThinks, texts_and_tokens


@pytest.fixture(scope="module")
def drawn(make_model, parallel):
    trajectories, think_tokens = texts_and_tokens()
    model = make_model("qwen2", think_tokens.tokenizer.vocab_size)
    engine = MegatronEngine(model[1], model[0], parallel, max_batch=8, max_tokens=256)
    return rollout(engine, trajectories, 2, OftenThinks(2), RolloutSettings(0.8, 6), think_tokens), think_tokens


def test_everything_stands_at_its_token(drawn):
    """Advantages of another line, forced tokens learned as if they had been drawn, masses taken off twice."""
    rollouts, think_tokens = drawn
    advantages = [10.0 * r.number + np.arange(r.trajectory.num_lines) for r in rollouts]
    sequences = update_sequences(rollouts, advantages, think_tokens)
    for one, own, found in zip(rollouts, advantages, sequences, strict=True):
        end = one.positions[-1] + 1
        assert found.ids.tolist() == one.trajectory.ids[:end].tolist()
        weight = found.weights["policy_gradient"]
        assert np.flatnonzero(weight).tolist() == one.positions.tolist()
        lines = one.trajectory.lines()
        by_position = dict(zip(one.positions.tolist(), zip(one.log_probs, one.log_allowed, strict=True), strict=True))
        decisions = {d.position: d.think_set for d in one.trajectory.decisions}
        for position in range(end):
            at = {name: values[position] for name, values in found.extras.items()}
            assert at["think_set"] == decisions.get(position, -1) + 1
            if position not in by_position:
                assert at["thought"] == at["advantages"] == at["behaviour_log_probs"] == 0
                continue
            log_prob, log_allowed = by_position[position]
            assert at["behaviour_log_probs"] == pytest.approx(log_prob - log_allowed, abs=1e-6)
            assert at["advantages"] == own[lines[position]]
            assert at["thought"] == (one.trajectory.kinds()[position] == Kind.THOUGHT)
    batch = collate([sequences], 1024, 0)
    rows = np.flatnonzero(batch.weights["policy_gradient"].numpy())
    assert batch.labels[rows].tolist() == [int(t) for r in rollouts for t in r.trajectory.ids[r.positions]]


def test_refusals(drawn):
    """NaN advantages, arrays of another snippet, think sets numbered in another order: silent wrong gradients."""
    rollouts, think_tokens = drawn
    one = next(r for r in rollouts if r.trajectory.num_lines > 5)
    advantages = np.zeros(one.trajectory.num_lines)
    with pytest.raises(ValueError, match="finite number for every line"):
        update_sequences([one], [advantages[1:]], think_tokens)
    with pytest.raises(ValueError, match="finite number for every line"):
        update_sequences([one], [advantages * np.nan], think_tokens)
    shifted = tuple(
        dataclasses.replace(d, think_set=(d.think_set + 1) % len(think_tokens)) for d in one.trajectory.decisions
    )
    wrong = dataclasses.replace(one, trajectory=dataclasses.replace(one.trajectory, decisions=shifted))
    with pytest.raises(ValueError, match="does not fit think set"):
        update_sequences([wrong], [advantages], think_tokens)


def test_rollout_without_actions(drawn):
    """A snippet without a place for a thought has nothing to learn and must not break the batch."""
    rollouts, think_tokens = drawn
    one = rollouts[0]
    none = np.zeros(0)
    bare = dataclasses.replace(
        one,
        trajectory=dataclasses.replace(one.trajectory, decisions=()),
        p_think=none, thought=none.astype(bool), positions=none.astype(int), log_probs=none, log_allowed=none,
    )  # fmt: skip
    (found,) = update_sequences([bare], [np.full(one.trajectory.num_lines, np.nan)], think_tokens)
    assert found.weights["policy_gradient"].sum() == 0
    assert collate([[found]], 8, 0).weights["policy_gradient"].sum() == 0
