"""Scores of lines against plain full forward passes; what a rollout says of the same lines."""

import numpy as np
import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.data.trajectory import Kind
from ra3_megatron.rollout.interleaved import RolloutSettings, rollout
from ra3_megatron.rollout.megatron import MegatronEngine
from ra3_megatron.rollout.scoring import LineScorer
from tests.unit.rollout.conftest import full_log_probs
from tests.unit.rollout.naive import OftenThinks, texts_and_tokens


def scorer_of(model, parallel, think_tokens, seq_length=256, micro_batch_size=2):
    train = {"steps": 1, "seq_length": seq_length, "micro_batch_size": micro_batch_size, "global_batch_size": 2}
    return LineScorer(model[1], model[0], parallel, config_from_dict({"train": train}), think_tokens)


DRAWN = {"start": ("qwen2", True), "no start": ("qwen2", False), "experts": ("qwen3_moe", True)}


@pytest.fixture(scope="module", params=DRAWN)
def drawn(request, make_model, parallel):
    family, start = DRAWN[request.param]
    trajectories, think_tokens = texts_and_tokens(start)
    model = make_model(family, think_tokens.tokenizer.vocab_size + 3)
    engine = MegatronEngine(model[1], model[0], parallel, max_batch=8, max_tokens=256)
    return model, rollout(engine, trajectories, 2, OftenThinks(2), RolloutSettings(1.0, 6), think_tokens), think_tokens


def test_lines_and_thoughts_are_the_full_forward_pass(drawn, parallel):
    """A row too early or late, one text seen by the next in its window, thoughts counted as code, the first token."""
    model, rollouts, think_tokens = drawn
    infused = [r.trajectory for r in rollouts]
    assert sum(len(t.thoughts()) for t in infused) > 5
    scores = scorer_of(model, parallel, think_tokens).score(infused)
    for one, trajectory, found in zip(rollouts, infused, scores, strict=True):
        table = full_log_probs(model[1][0], model[0].vocab_size, trajectory.ids.tolist()).numpy()
        tokens = np.r_[0.0, table[np.arange(len(trajectory.ids) - 1), trajectory.ids[1:]]]
        lines, thoughts = np.zeros(trajectory.num_lines), np.zeros(trajectory.num_lines)
        for s in trajectory.segments:
            if s.kind != Kind.PROMPT:
                (lines if s.kind == Kind.CODE else thoughts)[s.line] = tokens[s.start : s.end].sum()
        np.testing.assert_allclose(found.lines, lines, rtol=0, atol=2e-5)
        np.testing.assert_allclose(found.thoughts, thoughts, rtol=0, atol=2e-5)
        np.testing.assert_allclose(found.lines, one.line_log_probs, rtol=0, atol=2e-5)
        offered = [d.line for d in trajectory.decisions]
        np.testing.assert_allclose(found.log_act[offered], one.log_act[offered], rtol=0, atol=2e-5)
        np.testing.assert_allclose(found.given_latent, found.lines - found.log_act)
        assert found.total == pytest.approx(tokens[trajectory.kinds() != Kind.PROMPT].sum(), abs=1e-4)


def test_a_line_is_given_that_no_thought_begins(drawn, parallel):
    """The chance of not thinking counted as code: thoughts that say nothing earned it back, and spread."""
    model, rollouts, think_tokens = drawn
    scores = scorer_of(model, parallel, think_tokens).score([r.trajectory for r in rollouts])
    for trajectory, found in zip((r.trajectory for r in rollouts), scores, strict=True):
        table = full_log_probs(model[1][0], model[0].vocab_size, trajectory.ids.tolist()).numpy()
        for decision in trajectory.decisions:
            segment = trajectory.segment(decision.line)
            at = segment.start + len(decision.forced)
            # The same model with the tokens that begin a thought taken out of its vocabulary here.
            table[at - 1, think_tokens[decision.think_set].ids] = -np.inf
            table[at - 1] -= np.logaddexp.reduce(table[at - 1])
            own = range(segment.start, segment.end)
            expected = sum(table[i - 1, trajectory.ids[i]] for i in own)
            assert found.given_latent[decision.line] == pytest.approx(expected, abs=2e-5)


def test_lines_without_their_thought(drawn, parallel):
    """The thought left in, the earlier ones left out, the line's own start cut off: a gain of another line."""
    model, rollouts, think_tokens = drawn
    infused = [r.trajectory for r in rollouts]
    for one, found in zip(rollouts, scorer_of(model, parallel, think_tokens).without_thought(infused), strict=True):
        np.testing.assert_allclose(found, one.without_thought, rtol=0, atol=2e-5)


def test_chosen_lines_alone(drawn, parallel):
    """A choice of lines must save work and change nothing about the lines that are left."""
    model, rollouts, think_tokens = drawn
    infused = [r.trajectory for r in rollouts]
    whole = scorer_of(model, parallel, think_tokens)
    part = scorer_of(model, parallel, think_tokens, seq_length=160, micro_batch_size=1)
    chosen = [np.arange(t.num_lines) == t.num_lines // 2 for t in infused]
    everything, work = whole.score(infused), whole.counters.tokens
    gains = whole.without_thought(infused)
    for number, found in enumerate(part.score(infused, chosen)):
        np.testing.assert_array_equal(np.isnan(found.lines), ~chosen[number])
        at = chosen[number]
        np.testing.assert_allclose(found.lines[at], everything[number].lines[at], rtol=0, atol=2e-5)
        np.testing.assert_allclose(found.thoughts[at], everything[number].thoughts[at], rtol=0, atol=2e-5)
    for number, found in enumerate(whole.without_thought(infused, chosen)):
        np.testing.assert_allclose(found, np.where(chosen[number], gains[number], np.nan), rtol=0, atol=2e-5)
    assert part.counters.tokens < work
    assert not part.score([])
    with pytest.raises(UserError, match="windows hold 20"):
        scorer_of(model, parallel, think_tokens, seq_length=20).score(infused)
