"""The Megatron engine against the model's ordinary forward pass."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.model.factory import build_model
from ra3_megatron.rollout.engine import Extend, Query
from ra3_megatron.rollout.megatron import MegatronEngine
from ra3_megatron.training.components import cross_entropy_component
from ra3_megatron.training.engine import TrainEngine
from tests.unit.model.hf_pairs import ARCHITECTURES
from tests.unit.rollout.conftest import full_log_probs

VOCAB = 101


@pytest.fixture(scope="module", params=["llama3", "qwen2", "qwen3", "qwen3_moe"])
def model(request, make_model):
    return make_model(request.param, VOCAB)


@pytest.fixture(scope="module")
def qwen(make_model):
    return make_model("qwen2", VOCAB)


def engine_of(model, parallel, **options):
    arch, chunks = model
    return MegatronEngine(chunks, arch, parallel, **({"max_batch": 4, "max_tokens": 96} | options))


def random_ids(generator, n):
    return generator.integers(VOCAB, size=n).tolist()


def check_scores(model, ids, known, log_probs):
    _, (chunk,) = model
    expected = full_log_probs(chunk, VOCAB, ids)[known - 1 : -1].gather(1, torch.tensor(ids[known:]).unsqueeze(1))
    np.testing.assert_allclose(log_probs, expected[:, 0].numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("budget", [8192, 13], ids=["one pass", "passes of 13 tokens"])
def test_ragged_rows(model, parallel, budget):
    """Rows of different lengths in one pass: positions, masks and cached keys of one row must not leak into another."""
    engine = engine_of(model, parallel, tokens_per_forward=budget)
    generator = np.random.default_rng(0)
    texts = [random_ids(generator, n) for n in (1, 40, 7, 20)]
    rows = [engine.open(t) for t in texts]
    # First long and short runs together, then all kinds of lengths after a cache, one token among them.
    for sizes in ((30, 1, 17, 3), (1, 1, 1, 1), (2, 16, 1, 40), (1, 5, 33, 4)):
        news = [random_ids(generator, n) for n in sizes]
        answers = engine.step([Extend(r, n) for r, n in zip(rows, news, strict=True)])
        for text, new, answer in zip(texts, news, answers, strict=True):
            known = len(text)
            text += new
            check_scores(model, text, known, answer.log_probs)
    assert engine.counters.tokens == sum(map(len, texts)) - 4  # every token once, the last of each row not yet


@given(seed=st.integers(0, 10_000))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_history(qwen, parallel, seed):
    """Rollbacks, closed and reused slots, forks, rows left out of a step or moved: stale keys must not be seen."""
    engine = engine_of(qwen, parallel, max_batch=6)
    generator = np.random.default_rng(seed)
    texts: dict[int, list[int]] = {}
    for _ in range(12):
        for row in list(texts):
            fate = generator.random()
            if fate < 0.25:
                engine.close(row)
                del texts[row]
            elif fate < 0.5:
                keep = int(generator.integers(1, len(texts[row]) + 1))
                engine.rollback(row, keep)
                del texts[row][keep:]
        while len(texts) < 6 and generator.random() < 0.8:
            if texts and generator.random() < 0.4:
                source = generator.choice(list(texts))
                length = int(generator.integers(1, len(texts[source]) + 1))
                texts[engine.fork(source, length)] = texts[source][:length]
                continue
            ids = random_ids(generator, int(generator.integers(1, 20)))
            texts[engine.open(ids)] = ids
        chosen = [row for row in texts if generator.random() < 0.8]
        news = [random_ids(generator, min(int(generator.integers(0, 25)), 90 - len(texts[r]))) for r in chosen]
        answers = engine.step([Extend(r, n) for r, n in zip(chosen, news, strict=True)])
        for row, new, answer in zip(chosen, news, answers, strict=True):
            known = len(texts[row])
            texts[row] += new
            check_scores(qwen, texts[row], known, answer.log_probs)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_queries(model, parallel, temperature):
    """Raw probabilities at a temperature other than 1 (trl#4159), an off-by-one in the place that is asked."""
    _, (chunk,) = model
    engine = engine_of(model, parallel)
    generator = np.random.default_rng(1)
    few, most = np.array([3, 5, 100]), np.arange(1, VOCAB)
    numbers = [engine.token_set(few), engine.token_set(most), engine.token_set([])]
    start, new = random_ids(generator, 5), random_ids(generator, 9)
    row = engine.open(start)
    asked = [(0, 0), (4, 1), (9, 0), (2, 2), (9, 1)]
    uniforms = generator.random(len(asked))
    queries = [Query(o, numbers[s], u) for (o, s), u in zip(asked, uniforms, strict=True)]
    (answer,) = engine.step([Extend(row, new, queries, append=True)], temperature)
    check_scores(model, start + new, 5, answer.log_probs)  # forced ids: temperature 1 whatever was asked
    log_probs = full_log_probs(chunk, VOCAB, start + new, temperature).numpy()
    for i, (offset, number) in enumerate(asked):
        ids = (few, most, np.array([], dtype=int))[number]
        weights = np.exp(log_probs[4 + offset][ids])
        if not len(ids):
            assert answer.log_masses[i] == -np.inf
            assert answer.drawn[i] == -1
            continue
        assert answer.log_masses[i] == pytest.approx(np.log(weights.sum()), abs=1e-5)
        expected = ids[np.searchsorted(weights.cumsum(), uniforms[i] * weights.sum(), side="right")]
        assert answer.drawn[i] == expected
        assert answer.drawn_log_probs[i] == pytest.approx(log_probs[4 + offset][expected], abs=1e-5)
    assert engine.length(row) == 5 + 9 + 1
    # The appended draw is part of the row: what follows is conditioned on it.
    more = random_ids(generator, 3)
    (answer2,) = engine.step([Extend(row, more)])
    check_scores(model, [*start, *new, int(answer.drawn[-1]), *more], 15, answer2.log_probs)


def test_sampled_distribution(qwen, parallel):
    """Draws follow the model's distribution restricted to the set, no forbidden id among them."""
    _, (chunk,) = qwen
    engine = engine_of(qwen, parallel, max_batch=1)
    allowed = np.setdiff1d(np.arange(VOCAB), [0, 7, 50])
    number, text = engine.token_set(allowed), [1, 2, 3]
    row = engine.open(text)
    count = 2000
    queries = [Query(0, number, (i + 0.5) / count) for i in range(count)]
    (answer,) = engine.step([Extend(row, [], queries)], temperature=1.3)
    p = full_log_probs(chunk, VOCAB, text, 1.3)[-1].exp().numpy()[allowed]
    p /= p.sum()
    found = np.bincount(answer.drawn, minlength=VOCAB)
    assert found[[0, 7, 50]].sum() == 0
    # An evenly spaced grid of uniforms leaves less than two counts of difference per id.
    assert np.abs(found[allowed] - count * p).max() < 2
    assert engine.length(row) == 3


def test_model_is_left_as_it_was(qwen, parallel):
    """Plug-ins that stay in the model after a rollout would train through a stale cache."""
    _, (chunk,) = qwen
    before = full_log_probs(chunk, VOCAB, list(range(20)))
    modules = [name for name, _ in chunk.named_modules()]
    chunk.train()
    engine = engine_of(qwen, parallel)
    row = engine.open([1])
    engine.step([Extend(row, [2, 3])])
    assert not chunk.training, "recomputation of activations happens in training mode"
    assert torch.equal(full_log_probs(chunk, VOCAB, list(range(20))), before)
    assert [name for name, _ in chunk.named_modules()] == modules
    with pytest.raises(AssertionError):
        engine.step([Extend(row, [4]), Extend(row, [5])])
    with pytest.raises(IndexError):
        engine.step([Extend(row, [VOCAB + 1000, 0])])  # fails inside the forward pass
    assert [name for name, _ in chunk.named_modules()] == modules


def test_wrapped_bf16_model(parallel):
    """The chunks of a running training stage: bf16, in Megatron's wrappers; scores are the trainer's up to rounding."""
    arch = dataclasses.replace(ARCHITECTURES["qwen2"], num_layers=2, vocab_size=VOCAB)
    config = config_from_dict(
        {"model": {"precision": "bf16", "init_std": 0.1, "vocab_multiple": 8}, "train": {"steps": 1}}
    )
    bare = build_model(arch, config.model, parallel)
    chunks = TrainEngine(config, arch, parallel, bare, [cross_entropy_component()], 1).chunks
    engine = MegatronEngine(chunks, arch, parallel, max_batch=2, max_tokens=64)
    ids = random_ids(np.random.default_rng(2), 50)
    row = engine.open(ids[:3])
    pieces = [engine.step([Extend(row, ids[a:b])])[0].log_probs for a, b in ((3, 24), (24, 25), (25, 50))]
    labels = torch.tensor(ids[3:]).unsqueeze(1)
    expected = full_log_probs(bare[0], VOCAB, ids)[2:-1].gather(1, labels)[:, 0].numpy()
    np.testing.assert_allclose(np.concatenate(pieces), expected, rtol=0, atol=0.1)
    assert np.abs(np.concatenate(pieces) - expected).mean() < 0.02


def test_refusals(qwen, parallel):
    """A full engine, a row past its room, a temperature of 0, ids of another tokenizer: said, not done."""
    engine = engine_of(qwen, parallel, max_batch=1, max_tokens=8)
    row = engine.open([1, 2])
    with pytest.raises(UserError, match="room for"):
        engine.open([1])
    with pytest.raises(UserError, match="9 tokens"):
        engine.step([Extend(row, [1] * 7)])
    with pytest.raises(UserError, match="temperature"):
        engine.step([Extend(row, [1])], temperature=0.0)
    with pytest.raises(UserError, match="tokenizer"):
        engine.token_set([VOCAB])
    with pytest.raises(RuntimeError, match="rows are open"):
        engine.weights_version = 1
    with pytest.raises(UserError, match="positions"):
        engine_of(qwen, parallel, max_tokens=100_000)
    engine.close(row)
    engine.weights_version = 1
    assert engine.weights_version == 1
    assert engine.open([1]) != row, "a handle must not come back to life"
