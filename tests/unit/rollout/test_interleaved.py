"""Chunked rollouts must be the line-by-line rollouts, exactly."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ra3_megatron.algo.logprobs import VocabShard, token_log_probs
from ra3_megatron.config.errors import UserError
from ra3_megatron.data.trajectory import Kind, keeps_program
from ra3_megatron.model.attention import packed_params
from ra3_megatron.rollout.interleaved import RolloutSettings, SeededUniforms, rollout
from ra3_megatron.rollout.megatron import MegatronEngine
from tests.unit.rollout.naive import OftenThinks, naive_rollout, plain_texts_and_tokens, texts_and_tokens

MAX_LATENT = 6
ARRAYS = "line_log_probs", "without_thought", "log_act", "p_think", "thought", "positions", "log_probs", "log_allowed"


@pytest.fixture(scope="module")
def texts():
    trajectories, think_tokens = texts_and_tokens()
    sets = [think_tokens[i] for i in range(len(think_tokens))]
    assert any(s.opener is not None for s in sets)
    assert any(len(s.ids) > 1 for s in sets)
    return trajectories, think_tokens


@pytest.fixture(scope="module")
def model(make_model, texts):
    # More embedding rows than the tokenizer has ids.
    arch, chunks = make_model("qwen3", texts[1].tokenizer.vocab_size + 3)
    with torch.no_grad():
        # Ends of lines with larger logits: some thoughts shall end by themselves.
        chunks[0].output_layer.weight[texts[1].closing_ids] *= 3
    return arch, chunks


def engine_of(model, parallel, max_batch=5, max_tokens=500, **options):
    return MegatronEngine(model[1], model[0], parallel, max_batch, max_tokens, **options)


def same(one, other):
    for a, b in zip(one, other, strict=True):
        assert (a.number, a.member, a.truncated, a.not_offered) == (b.number, b.member, b.truncated, b.not_offered)
        assert a.trajectory.ids.tolist() == b.trajectory.ids.tolist()
        assert a.trajectory.segments == b.trajectory.segments
        assert a.trajectory.decisions == b.trajectory.decisions
        for name in ARRAYS:
            np.testing.assert_allclose(getattr(a, name), getattr(b, name), rtol=0, atol=1e-4, err_msg=name)


@given(seed=st.integers(0, 10_000), chunk=st.sampled_from([1, 5, 16, 200]), temperature=st.sampled_from([1.0, 0.7]))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_chunked_equals_line_by_line(model, texts, parallel, seed, chunk, temperature):
    """A decision read after a thought that changed its context, a line scored without its thought, a lost prefix."""
    trajectories, think_tokens = texts
    options = RolloutSettings(temperature, MAX_LATENT, chunk)
    check_against_naive(model, parallel, trajectories[1:], think_tokens, OftenThinks(seed), options)


def test_tags_equal_line_by_line(make_model, parallel):
    """A closing tag that is lost, sampled or scored as an action."""
    trajectories, think_tokens = plain_texts_and_tokens()
    arch, chunks = make_model("qwen3", think_tokens.tokenizer.vocab_size)
    with torch.no_grad():
        chunks[0].output_layer.weight[think_tokens.closing_ids] *= 3
    ended = 0
    for seed in range(4):
        uniforms, options = OftenThinks(seed, 0.004), RolloutSettings(1.0, MAX_LATENT, 5)
        found = check_against_naive((arch, chunks), parallel, trajectories, think_tokens, uniforms, options)
        for expert, one in zip(trajectories, found, strict=True):
            ended += int(one.thought.sum()) - len(one.truncated)
            for ids in one.trajectory.thoughts().values():
                assert think_tokens.tokenizer.decode(ids).endswith("\n</think>\n")
            assert keeps_program(expert, one.trajectory, think_tokens.tokenizer, think_tokens.format)
    assert ended, "no thought ended by itself"


def check_against_naive(model, parallel, trajectories, think_tokens, uniforms, options):
    """Compare one rollout of each with the line-by-line loop; returns the rollouts."""
    temperature = options.temperature
    found = rollout(engine_of(model, parallel), trajectories, 1, uniforms, options, think_tokens)
    for i, (expert, one) in enumerate(zip(trajectories, found, strict=True)):
        numbers = uniforms(i, 0, (expert.num_lines, 1 + MAX_LATENT))
        naive = naive_rollout(model[1][0], model[0].vocab_size, expert, numbers, temperature, MAX_LATENT, think_tokens)
        assert one.trajectory.ids.tolist() == naive.ids
        assert {k: v.tolist() for k, v in one.trajectory.thoughts().items()} == naive.thoughts
        assert one.positions.tolist() == [p for p, _ in naive.actions]
        assert list(one.truncated) == naive.truncated
        np.testing.assert_allclose(one.p_think, naive.p_think, rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(one.line_log_probs, naive.line_log_probs, rtol=0, atol=1e-4)
        np.testing.assert_allclose(one.without_thought, naive.without_thought, rtol=0, atol=1e-4)
        np.testing.assert_allclose(one.log_act, naive.log_act, rtol=0, atol=1e-5)
        np.testing.assert_allclose(one.log_probs, [x for _, x in naive.actions], rtol=0, atol=1e-5)
        np.testing.assert_allclose(one.log_allowed, naive.log_allowed, rtol=0, atol=1e-5)
    return found


@pytest.fixture(scope="module")
def group(model, texts, parallel):
    """Groups of 6 rollouts, all in one batch."""
    engine = engine_of(model, parallel, max_batch=24)
    return rollout(engine, texts[0], 6, OftenThinks(3), RolloutSettings(1.0, MAX_LATENT, 64), texts[1])


def test_independent_of_batch_and_chunks(model, texts, parallel, group):
    """Random numbers drawn in batch order, a slot's former tenant, a chunk's end inside a forced prefix."""
    assert len({r.trajectory.ids.tobytes() for r in group}) > 12
    for max_batch, chunk, budget in ((1, 7, 8192), (5, 200, 8192), (3, 13, 20)):
        engine = engine_of(model, parallel, max_batch, tokens_per_forward=budget)
        same(group, rollout(engine, texts[0], 6, OftenThinks(3), RolloutSettings(1.0, MAX_LATENT, chunk), texts[1]))
        assert not engine._rows


def test_a_group_reads_its_text_once(model, texts, parallel):
    """What the rollouts of a group have in common was computed for each: all of it where nobody thinks."""
    trajectories, think_tokens = texts

    def never(_number, _member, shape):
        return np.full(shape, np.nextafter(1.0, 0.0))

    fed, options = [], RolloutSettings(1.0, MAX_LATENT, 64)
    for size, rows in ((1, 3), (6, 24), (6, 4), (6, 1)):
        engine = engine_of(model, parallel, max_batch=rows)
        found = rollout(engine, trajectories[:1], size, never, options, think_tokens)
        assert len(found) == size
        assert not any(r.thought.any() for r in found)
        assert not engine._rows
        fed.append(engine.counters.tokens)
    assert fed[1] == fed[0]
    assert fed[2] == 2 * fed[0], "four of them together, and then two"
    assert fed[3] == 6 * fed[0]


def test_rollouts_are_sound(group, texts, model):
    """Actions must point at what they are about; behaviour log-probs at other tokens poison the policy gradient."""
    trajectories, think_tokens = texts
    tokenizer, closed = think_tokens.tokenizer, 0
    for one in group:
        infused, expert = one.trajectory, trajectories[one.number]
        code = np.concatenate([infused.ids[s.start : s.end] for s in infused.segments if s.kind != Kind.THOUGHT])
        assert code.tolist() == expert.ids.tolist()
        assert keeps_program(expert, infused, tokenizer, think_tokens.format)
        positions = set(one.positions.tolist())
        for decision, thought in zip(infused.decisions, one.thought, strict=True):
            assert decision.position in positions
            is_think = infused.ids[decision.position] in think_tokens[decision.think_set].ids
            assert is_think == thought
        assert np.flatnonzero(~np.isnan(one.without_thought)).tolist() == sorted(infused.thoughts())
        sampled = 0
        for decision, thought in zip(infused.decisions, one.thought, strict=True):
            if thought:
                token = int(infused.ids[decision.position])
                forced = len(decision.forced) + len(think_tokens[decision.think_set].forced_after(token))
                forced += len(tokenizer.encode("\n")) * (decision.line in one.truncated)
                sampled += len(infused.thoughts()[decision.line]) - forced
        assert (infused.kinds()[one.positions] == Kind.THOUGHT).sum() == sampled
        assert (np.diff(one.positions) > 0).all()
        assert (one.log_allowed <= 1e-12).all()
        assert (one.weights_version, one.temperature) == (0, 1.0)
        closed += int(one.thought.sum()) - len(one.truncated)
    assert closed, "no thought ended by itself: the test would not see a wrong end"
    assert any(one.truncated for one in group)
    assert 0.05 < np.concatenate([one.thought for one in group]).mean() < 0.9


def test_log_probs_are_the_trainers(group, texts, model):
    """Train and rollout log-probs that diverge (NeMo-RL#2100): the trainer's packed pass over the infused text."""
    arch, (chunk,) = model
    shard = VocabShard(0, arch.vocab_size)
    for one in group[:6]:
        ids = torch.from_numpy(one.trajectory.ids.astype(np.int64))
        with torch.no_grad():
            logits = chunk(
                input_ids=ids.unsqueeze(0),
                position_ids=torch.arange(len(ids)).unsqueeze(0),
                attention_mask=None,
                packed_seq_params=packed_params((len(ids),), ids.device),
            )[0]
            log_probs = token_log_probs(logits[:-1], ids[1:], shard).numpy()
        sampled = one.trajectory.kinds()[one.positions] == Kind.THOUGHT
        np.testing.assert_allclose(one.log_probs[sampled], log_probs[one.positions[sampled] - 1], rtol=0, atol=1e-5)
        code = (one.trajectory.kinds() == Kind.CODE) & (np.arange(len(ids)) > 0)
        lines = np.bincount(one.trajectory.lines()[code], log_probs[np.flatnonzero(code) - 1])
        np.testing.assert_allclose(one.line_log_probs, lines, rtol=0, atol=1e-4)


def test_no_start_token_and_little_room(make_model, parallel):
    """A text whose first token has no prediction; thoughts that would not fit must not be offered, nor cut the code."""
    trajectories, think_tokens = texts_and_tokens(start=False)
    model = make_model("qwen2", think_tokens.tokenizer.vocab_size)
    room = max(len(t.ids) for t in trajectories) + 2 * MAX_LATENT
    options = RolloutSettings(1.0, MAX_LATENT, 16)
    found = rollout(engine_of(model, parallel, 4, room), trajectories, 3, OftenThinks(1), options, think_tokens)
    assert sum(r.not_offered for r in found) > 0
    assert any(r.thought.any() for r in found if r.number == 0)
    for one in found:
        assert len(one.trajectory.ids) <= room
        assert len(one.trajectory.decisions) + one.not_offered == len(trajectories[one.number].decisions)
    whole = rollout(engine_of(model, parallel, 7, room), trajectories, 3, OftenThinks(1), options, think_tokens)
    same(found, whole)
    with pytest.raises(UserError, match="cut the snippets"):
        rollout(engine_of(model, parallel, 1, room - 20), trajectories, 1, OftenThinks(1), options, think_tokens)


def test_seeded_uniforms():
    """Members or rounds that share random numbers would make a group of copies."""
    draw = SeededUniforms(5, [10, 11])
    arrays = [draw(0, 0, (4, 3)), draw(1, 0, (4, 3)), draw(0, 1, (4, 3)), SeededUniforms(6, [10])(0, 0, (4, 3))]
    assert len({a.tobytes() for a in arrays}) == 4
    assert np.array_equal(SeededUniforms(5, [99, 10])(1, 0, (4, 3)), arrays[0])
