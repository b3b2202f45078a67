"""The cost of held-out code against plain forward passes and cases worked out by hand."""

import dataclasses
import json
import math

import numpy as np
import pytest

from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.data.trajectory import Kind
from ra3_megatron.evaluation.held_out import Sample, SnippetScore, cost, difference, score_snippets, thinking_figures
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.groups import seed_everything
from ra3_megatron.rollout.interleaved import RolloutSettings, SeededUniforms
from ra3_megatron.rollout.megatron import MegatronEngine
from ra3_megatron.rollout.scoring import LineScorer
from tests.unit.rollout.conftest import full_log_probs
from tests.unit.rollout.naive import OftenThinks, texts_and_tokens
from tests.unit.training import tiny

SEQ = 400
SAMPLES = 3


@pytest.fixture(scope="module", params=[True, False], ids=["start", "no-start"])
def texts(request):
    return texts_and_tokens(start=request.param)


@pytest.fixture(scope="module")
def model(parallel, texts):
    vocab = texts[1].tokenizer.vocab_size + 3
    arch = dataclasses.replace(tiny.architecture(tied=False), vocab_size=vocab, max_positions=SEQ)
    seed_everything(0, parallel)
    return arch, build_model(arch, ModelConfig(init_std=0.3, vocab_multiple=8), parallel)


def score(model, texts, parallel, uniforms, temperature=1.0):
    config = tiny.config(train={"seq_length": SEQ, "micro_batch_size": 1})
    scorer = LineScorer(model[1], model[0], parallel, config, texts[1])
    engine = MegatronEngine(model[1], model[0], parallel, 5, SEQ)
    settings = RolloutSettings(temperature, 5)
    ids = list(range(10, 10 + len(texts[0])))
    return score_snippets(scorer, engine, texts[0], ids, SAMPLES, uniforms, settings, texts[1])


@pytest.fixture(scope="module")
def scored(model, texts, parallel):
    return score(model, texts, parallel, OftenThinks(1, 0.05))


def code_nats(model, ids, kinds):
    """(-log p summed over code tokens, their number) by one ordinary forward pass."""
    log_probs = full_log_probs(model[1][0], model[0].vocab_size, ids.tolist())
    code = [i for i in range(1, len(ids)) if kinds[i] == Kind.CODE]
    return -sum(float(log_probs[i - 1, int(ids[i])]) for i in code), len(code)


def test_bare_is_the_plain_cross_entropy_of_code(model, texts, scored):
    """The prompt counted in, the start token, or the first token of a text that nothing predicts."""
    for trajectory, found in zip(texts[0], scored[0], strict=True):
        nats, tokens = code_nats(model, trajectory.ids, trajectory.kinds())
        assert found.tokens == tokens
        assert found.bare == pytest.approx(nats, rel=1e-5)


def test_thinking_counts_the_same_tokens_given_the_thoughts(model, texts, scored):
    """Comment tokens mixed in, or code tokens left out, where there are thoughts."""
    scores, drawn = scored
    assert any(s.thoughts for score in scores for s in score.samples)
    for rolled in drawn:
        infused, found = rolled.trajectory, scores[rolled.number]
        nats, tokens = code_nats(model, infused.ids, infused.kinds())
        sample = found.samples[rolled.member]
        assert tokens == found.tokens
        assert sample.nats == pytest.approx(nats, rel=1e-5)
        assert sample.thoughts == tuple(sorted(infused.thoughts()))
        assert sample.thought_tokens == int((infused.kinds() == Kind.THOUGHT).sum())
        assert not sample.broken
        lines = [s for s in infused.segments if s.kind == Kind.CODE and s.line in infused.thoughts()]
        for gain, segment in zip(sample.gains, lines, strict=True):
            line = segment.line
            with_it = rolled.line_log_probs[line] - rolled.log_act[line]
            assert gain * (segment.end - segment.start) == pytest.approx(with_it - rolled.without_thought[line])


def test_declined_is_the_part_of_not_thinking(model, texts, scored):
    """A line without a thought also pays for the thought it could have had: as many nats as the model wanted one."""
    for rolled in scored[1]:
        going_on = rolled.p_think[~rolled.thought]
        sample = scored[0][rolled.number].samples[rolled.member]
        assert sample.declined == pytest.approx(-np.log(1 - going_on).sum(), abs=1e-9)


def test_without_thoughts_the_code_costs_the_same_either_way(model, texts, parallel):
    """Packed windows and the rollout engine must say the same of the same text."""
    uniforms = SeededUniforms(4, list(range(len(texts[0]))))
    # Decisions drawn with nearly 1 never are for a thought.
    found, _ = score(model, texts, parallel, lambda *a: np.maximum(uniforms(*a), 1 - 1e-12))
    for s in found:
        assert [x.thoughts for x in s.samples] == [()] * SAMPLES
        assert s.nats("thinking") == pytest.approx(s.bare, rel=1e-5)
        assert s.nats("multi_sample") == pytest.approx(s.bare, rel=1e-5)
    assert cost(found, "thinking").value == pytest.approx(cost(found, "bare").value, rel=1e-5)
    figures = thinking_figures(found, 0.9)
    assert figures["think_rate"] == 0
    assert figures["duration"] is None
    assert figures["gain"] is None


def test_declined_is_left_out_at_another_temperature(model, texts, parallel):
    found, _ = score(model, texts, parallel, OftenThinks(1), temperature=0.7)
    assert all(s.declined is None for score in found for s in score.samples)
    assert thinking_figures(found, 0.9)["declined"] is None


def sample(nats, thoughts=(), gains=(), declined=0.0, decisions=4):
    return Sample(nats, declined, thoughts, 3 * len(thoughts), decisions, 0, 0, gains, False)


def by_hand():
    one = SnippetScore(3, "a", 10, 6, 20.0, (sample(12.0, (0, 2), (0.5, 0.25)), sample(16.0, (), (), 2.0)))
    two = SnippetScore(5, "b", 30, 4, 40.0, (sample(40.0, (1,), (-0.75,)), sample(36.0)))
    return [one, two, dataclasses.replace(two, snippet=6)]


def test_forms_by_hand():
    """-log mean exp(-12), exp(-16) = 12 + log 2 - log(1 + e^-4); it is below the mean of 12 and 16."""
    one = by_hand()[0]
    assert one.nats("thinking") == 14
    assert one.nats("multi_sample") == pytest.approx(12 + math.log(2) - math.log1p(math.exp(-4)))
    assert cost(by_hand(), "bare").value == pytest.approx(100 / 70)
    assert cost(by_hand(), "thinking").value == pytest.approx((14 + 38 + 38) / 70)
    # Two documents, not three snippets: an interval with one degree of freedom.
    totals, weights = np.array([20.0, 80.0]), np.array([10.0, 60.0])
    error = math.sqrt(2 * np.square(totals - 100 / 70 * weights).sum()) / 70
    assert cost(by_hand(), "bare").high == pytest.approx(100 / 70 + 12.7062 * error, rel=1e-4)


def test_figures_by_hand():
    figures = thinking_figures(by_hand(), 0.9)
    assert figures["think_rate"] == pytest.approx(4 / 24)
    assert figures["thought_tokens"] == 3
    assert figures["gain"] == pytest.approx((0.5 + 0.25 - 0.75 - 0.75) / 4)
    assert figures["declined"] == pytest.approx(2 / 140)
    # One latent ends after two lines; those cut off lasted at least four, three and three: Kaplan-Meier.
    assert figures["duration"] == pytest.approx(1 + 1 + 3 / 4 + 3 / 4)


def test_difference_by_hand_and_through_json():
    """Other snippets under the two models would compare nothing."""
    scores = by_hand()
    again = [SnippetScore.from_json(json.loads(json.dumps(dataclasses.asdict(s)))) for s in scores]
    assert again == scores
    cheaper = [dataclasses.replace(s, bare=s.bare - 7) for s in scores]
    found = difference(cheaper, scores, "bare")
    assert found.value == pytest.approx(-21 / 70)
    assert found.p_value == 0.5, "two documents have four sign patterns, of which two are as extreme"
    assert difference(scores, scores, "thinking", "bare").value == pytest.approx((90 - 100) / 70)
    with pytest.raises(ValueError, match="different snippets"):
        difference(scores, scores[:2], "bare")
