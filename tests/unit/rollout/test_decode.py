"""Decode passes, with exact sizes and with those of CUDA graphs, against the model's ordinary forward pass."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.groups import seed_everything
from ra3_megatron.rollout.decode import DecodeRunner, size_up
from ra3_megatron.rollout.engine import Extend, Query
from ra3_megatron.rollout.megatron import MegatronEngine
from tests.unit.model.hf_pairs import ARCHITECTURES
from tests.unit.rollout.conftest import full_log_probs

VOCAB = 101


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def model(request, make_model):
    return make_model(request.param, VOCAB)


def engine_of(model, parallel, rounded=False, **options):
    arch, chunks = model
    engine = MegatronEngine(chunks, arch, parallel, **({"max_batch": 9, "max_tokens": 150} | options))
    if rounded:  # the sizes that are captured on a GPU
        engine._decoder = DecodeRunner(engine._forward, engine._sets, engine._vocab, None, rounded=True)
    return engine


@given(st.integers(1, 100_000), st.sampled_from([1, 64]))
def test_sizes_waste_little(count, least):
    """A size below the number of rows would leave some out; too many sizes would be captured one by one."""
    size = size_up(count, least)
    assert count <= size <= max(1.25 * count, count + least - 1)
    assert size_up(size, least) == size
    assert size % least == 0


def test_sizes_are_few():
    """Every length of the cache would be a graph of its own."""
    assert len({size_up(n, 64) for n in range(1, 4097)}) <= 24
    assert len({size_up(n) for n in range(1, 257)}) <= 28


@pytest.mark.parametrize("rounded", [False, True], ids=["exact", "rounded"])
@pytest.mark.parametrize("top_p", [1.0, 0.7, 0.0])
def test_decoding_is_the_ordinary_pass(model, parallel, rounded, top_p):
    """Rows that leave, rows that pause, slots that move, keys past a size: nothing of another row may be seen."""
    _, (chunk,) = model
    engine = engine_of(model, parallel, rounded)
    chance = np.random.default_rng(0)
    number = engine.token_set(np.arange(VOCAB))
    # One row crosses a size of the cache on its way.
    texts = {engine.open(t): t for n in (62, 3, 17, 1, 40, 8, 25) for t in [chance.integers(VOCAB, size=n).tolist()]}
    for step in range(6):
        if step == 3:
            engine.close(gone := list(texts)[1])
            del texts[gone]
        # The last one pauses in a step, and must find its keys as they were.
        asked = list(texts)[: len(texts) - (step == 4)]
        uniforms = chance.random(len(asked))
        queries = [Query(0, number, float(u), top_p) for u in uniforms]
        answers = engine.step([Extend(r, (), (q,), append=True) for r, q in zip(asked, queries, strict=True)], 0.8)
        for row, answer, uniform in zip(asked, answers, uniforms, strict=True):
            expected = full_log_probs(chunk, VOCAB, texts[row], 0.8)[-1].numpy()
            assert answer.log_masses[0] == pytest.approx(0.0, abs=1e-6)
            order = np.lexsort((np.arange(VOCAB), -expected))
            kept = np.sort(order[: 1 + np.searchsorted(np.exp(expected[order]).cumsum(), top_p)])
            weights = np.exp(expected[kept]).cumsum()
            assert answer.drawn[0] == kept[np.searchsorted(weights, uniform * weights[-1], side="right")]
            assert answer.drawn_log_probs[0] == pytest.approx(expected[answer.drawn[0]], abs=2e-5)
            texts[row].append(int(answer.drawn[0]))
    # The first step reads the texts; all others are decode passes, and what they fed is the rows' tokens alone.
    assert engine.counters.ordinary == {"tokens are read or forced": 1}
    assert engine.counters.decode_passes == 5
    assert engine.counters.tokens == sum(len(t) - 1 for t in texts.values()) + 2 + 3
    # A text forced in afterwards attends to what the decode passes have cached.
    for row, text in texts.items():
        more = chance.integers(VOCAB, size=5).tolist()
        (answer,) = engine.step([Extend(row, more)])
        wanted = full_log_probs(chunk, VOCAB, text + more)[len(text) - 1 : -1]
        expected = wanted.gather(1, torch.tensor(more).unsqueeze(1))[:, 0]
        np.testing.assert_allclose(answer.log_probs, expected.numpy(), rtol=0, atol=2e-5)


def test_flat_distributions_are_looked_at_again(parallel):
    """The candidates of one look did not hold the wanted part, and the least of them was drawn."""
    arch = dataclasses.replace(ARCHITECTURES["qwen2"], num_layers=2, vocab_size=400)
    seed_everything(0, parallel)
    chunks = build_model(arch, ModelConfig(init_std=0.002), parallel)
    engine = MegatronEngine(chunks, arch, parallel, 3, 20)
    number = engine.token_set(np.arange(400))
    rows, texts = [engine.open([5 + i]) for i in range(3)], [[5 + i] for i in range(3)]
    for uniform in (0.2, 0.5, 0.999):
        queries = [Query(0, number, uniform, 0.9)]
        answers = engine.step([Extend(r, (), queries, append=True) for r in rows])
        for text, answer in zip(texts, answers, strict=True):
            p = full_log_probs(chunks[0], 400, text)[-1].exp().numpy()
            order = np.argsort(-p)
            kept = np.sort(order[: 1 + np.searchsorted(p[order].cumsum(), 0.9)])
            assert len(kept) > 300
            weights = p[kept].cumsum()
            assert (
                abs(int(np.searchsorted(kept, answer.drawn[0])) - np.searchsorted(weights, uniform * weights[-1])) < 2
            )
            text.append(int(answer.drawn[0]))
    assert engine.counters.decode_passes == 3


def test_what_is_no_decode_pass(model, parallel):
    """Rows that ask about different sets, or a few of many open rows, in a pass made for all alike."""
    engine = engine_of(model, parallel)
    number, other = engine.token_set(np.arange(VOCAB)), engine.token_set([1, 2, 3])
    rows = [engine.open([i + 1]) for i in range(6)]
    engine.step([Extend(r, (), (Query(0, n, 0.5),)) for r, n in zip(rows, (number, other) * 3, strict=True)])
    engine.step([Extend(rows[-1], (), (Query(0, number, 0.5),), append=True)])
    engine.step([Extend(r, (), (Query(0, number, 0.5, 0.5 + 0.1 * (r % 2)),)) for r in rows[:-1]])
    engine.step([Extend(r, (4,), ()) for r in rows])
    expected = {"different questions": 2, "few of the open rows": 1, "tokens are read or forced": 1}
    assert engine.counters.ordinary == expected
    assert engine.counters.decode_passes == 0


def test_a_full_row_is_refused(model, parallel):
    """A decode pass past a row's room wrote over the position of padding."""
    engine = engine_of(model, parallel, max_tokens=3)
    number = engine.token_set(np.arange(VOCAB))
    row = engine.open([1])
    for _ in range(2):
        engine.step([Extend(row, (), (Query(0, number, 0.5),), append=True)])
    engine.step([Extend(row, (), (Query(0, number, 0.5),))])
    with pytest.raises(UserError, match="4 tokens"):
        engine.step([Extend(row, (), (Query(0, number, 0.5),), append=True)])


def test_graphs_that_were_asked_for(model, parallel):
    """`latent.cuda_graphs: true` ran without them where there is no GPU, and nobody was told."""
    with pytest.raises(UserError, match=r"latent\.cuda_graphs = true; the device is cpu"):
        engine_of(model, parallel, cuda_graphs=True)
    assert "the device is cpu" in engine_of(model, parallel).description
    assert "latent.cuda_graphs is false" in engine_of(model, parallel, cuda_graphs=False).description
