"""Rationales for a corpus: what is drawn, what is kept, what is left out."""

import dataclasses

import numpy as np
import pytest
import torch

from ra3_megatron.config.errors import UserError
from ra3_megatron.data.latent import CommentFormat, ThinkTokens
from ra3_megatron.data.trajectory import Kind, TrajectoryBuilder, keeps_program
from ra3_megatron.rollout.generation import (
    TRIES,
    DrawSettings,
    choose,
    draw_rationales,
    line_sums,
    log_proposal,
    round_seed,
    text_log_probs,
)
from ra3_megatron.rollout.interleaved import RolloutSettings, rollout
from ra3_megatron.rollout.megatron import MegatronEngine
from tests.unit.rollout.conftest import full_log_probs
from tests.unit.rollout.naive import TEXTS, texts_and_tokens

SETTINGS = RolloutSettings(max_latent_tokens=4, chunk_tokens=16)


class Dollars(CommentFormat):
    """Thoughts that no Python program survives."""

    def opening(self, indent: str) -> str:
        return indent + "$"


def scaled(often: float):
    """`rollout` with decisions scaled down, so that a model that knows nothing thinks more often."""

    def propose(engine, experts, group, uniforms, settings, think_tokens):
        def more(number, member, shape):
            found = uniforms(number, member, shape)
            found[:, 0] *= often
            return found

        return rollout(engine, experts, group, more, settings, think_tokens)

    return propose


@pytest.fixture(scope="module")
def material(parallel, make_model):
    """Engine, chunk and vocabulary of a model, snippets and think tokens."""
    trajectories, think_tokens = texts_and_tokens()
    vocab = think_tokens.tokenizer.vocab_size
    architecture, chunks = make_model("qwen2", vocab)
    engine = MegatronEngine(chunks, architecture, parallel, max_batch=3, max_tokens=200, tokens_per_forward=64)
    return engine, chunks[0], vocab, trajectories, think_tokens


def test_sample_is_kept_with_its_weight():
    """BoLT kept the most likely sample, or the first: hand-made weights 1 : 3 : 0 : 4."""
    joint = torch.tensor([0.0, np.log(3.0), -np.inf, np.log(2.0)], dtype=torch.float64) - 700.0
    proposal = torch.tensor([0.0, 0.0, 0.0, -np.log(2.0)], dtype=torch.float64) - 30.0
    ids = list(range(8000))
    kept = choose(joint.expand(len(ids), -1), proposal.expand(len(ids), -1), ids, seed=5)
    shares = np.bincount(kept, minlength=4) / len(ids)
    np.testing.assert_allclose(shares, [0.125, 0.375, 0.0, 0.5], atol=0.02)
    assert choose(joint.expand(1, -1), proposal.expand(1, -1), [4711], seed=5) == [kept[4711]]


def test_text_is_scored_as_by_a_plain_forward_pass(material):
    """The joint probability of BoLT left out forced tokens; more texts than rows."""
    engine, chunk, vocab, trajectories, _ = material
    found = text_log_probs(engine, [t.ids for t in trajectories])
    assert not engine._rows
    for trajectory, scores in zip(trajectories, found, strict=True):
        full = full_log_probs(chunk, vocab, trajectory.ids.tolist()).numpy()
        wanted = [full[i - 1, token] for i, token in enumerate(trajectory.ids) if i]
        np.testing.assert_allclose(scores, [0.0, *wanted], atol=1e-5)
        sums = line_sums(trajectory, scores)
        assert sums.sum() == pytest.approx(scores[trajectory.kinds() == Kind.CODE].sum())


def test_resampling_from_end_to_end(material):
    """Weights were mixed up between snippets or members: everything again from full forward passes."""
    engine, chunk, vocab, trajectories, think_tokens = material
    settings = DrawSettings(SETTINGS, seed=3, samples=3, resample=True)
    ids = [10, 20, 30, 40]
    propose = scaled(0.02)
    drawn = draw_rationales(engine, trajectories, ids, settings, think_tokens, propose)
    assert any(d.kept.member for d in drawn), "first members only: nothing is tested"
    groups: list[list] = []

    def keep(*args):
        groups.append(propose(*args))
        return groups[-1]

    again = draw_rationales(engine, trajectories, ids, settings, think_tokens, keep)
    assert [d.bound for d in again] == [d.bound for d in drawn]
    for i, (expert, d) in enumerate(zip(trajectories, drawn, strict=True)):
        members = groups[0][3 * i : 3 * i + 3]
        joint = []
        for r in members:
            ids_of, kinds = r.trajectory.ids.tolist(), r.trajectory.kinds()
            full = full_log_probs(chunk, vocab, ids_of).numpy()
            joint.append(sum(full[k - 1, t] for k, t in enumerate(ids_of) if kinds[k] != Kind.PROMPT))
        raw = np.array(joint) - [log_proposal(r) for r in members]
        assert d.bound == pytest.approx(np.logaddexp.reduce(raw) - np.log(3), abs=1e-4)
        weights = np.exp(raw - np.logaddexp.reduce(raw))
        assert d.effective_samples == pytest.approx(1 / (weights**2).sum(), rel=1e-3)
        (number,) = choose(torch.tensor([joint]), torch.tensor([[log_proposal(r) for r in members]]), [ids[i]], 3)
        np.testing.assert_array_equal(d.kept.trajectory.ids, members[number].trajectory.ids)
        assert keeps_program(expert, d.kept.trajectory, think_tokens.tokenizer, think_tokens.format)


def test_thoughts_that_break_the_program_are_drawn_again_then_left_out(material):
    """A broken program was trained on, or dropped, so that arms saw different code."""
    engine, _, _, _, plain = material
    think_tokens = ThinkTokens(plain.tokenizer, Dollars())
    builder = TrajectoryBuilder(plain.tokenizer, think_tokens, plain.tokenizer.start_id("auto"))
    experts = [builder.build(text) for text in TEXTS]
    settings = DrawSettings(SETTINGS, seed=1)
    always = draw_rationales(engine, experts, range(4), settings, think_tokens, scaled(0.0))
    assert [(d.kept, d.broken, d.tries) for d in always] == [(None, TRIES, TRIES)] * 4
    some = draw_rationales(engine, experts, range(4), settings, think_tokens, scaled(0.02))
    redrawn = [d for d in some if d.kept is not None and d.tries > 1]
    assert redrawn, "no snippet was drawn twice: choose another seed"
    for expert, d in zip(experts, some, strict=True):
        assert d.broken == d.tries - (d.kept is not None)
        if d.kept is not None:
            np.testing.assert_array_equal(d.kept.trajectory.ids, expert.ids)


def test_broken_samples_have_no_weight_but_count_in_the_bound(material):
    """With K samples a broken one was chosen, or K shrank and the bound rose above what was drawn."""
    engine, _, _, _, plain = material
    think_tokens = ThinkTokens(plain.tokenizer, Dollars())
    builder = TrajectoryBuilder(plain.tokenizer, think_tokens, plain.tokenizer.start_id("auto"))
    experts = [builder.build(text) for text in TEXTS]
    settings = DrawSettings(SETTINGS, seed=1, samples=4, resample=True)
    drawn = draw_rationales(engine, experts, range(4), settings, think_tokens, scaled(0.02))
    mixed = [d for d in drawn if d.kept is not None and 0 < d.broken < 4]
    assert mixed
    for d in mixed:
        assert not d.kept.thought.any()
        # The good ones are all the bare text: equal joint, weights that differ by their proposal alone.
        assert d.effective_samples <= 4 - d.broken + 1e-9


def test_draws_do_not_depend_on_the_company(material):
    """The same snippet alone and among others, with other members of its batch: the same thoughts."""
    engine, _, _, trajectories, think_tokens = material
    settings = DrawSettings(SETTINGS, seed=round_seed(7, 2))
    together = draw_rationales(engine, trajectories, range(4), settings, think_tokens, scaled(0.02))
    alone = draw_rationales(engine, trajectories[2:3], [2], settings, think_tokens, scaled(0.02))
    other = dataclasses.replace(settings, seed=round_seed(7, 3))
    next_round = draw_rationales(engine, trajectories, range(4), other, think_tokens, scaled(0.02))
    assert alone[0].kept.trajectory.ids.tolist() == together[2].kept.trajectory.ids.tolist()
    assert [d.kept.p_think.tolist() for d in next_round] != [d.kept.p_think.tolist() for d in together]


def test_several_samples_without_resampling_are_refused():
    """Three of four rollouts were paid for and thrown away."""
    with pytest.raises(UserError, match="resample"):
        DrawSettings(SETTINGS, seed=0, samples=4)
