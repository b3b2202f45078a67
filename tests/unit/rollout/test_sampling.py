"""Draws against sorting and adding up one row at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.algo.logprobs import VocabShard
from ra3_megatron.rollout.sampling import BLOCK, CANDIDATES, LocalSet, answer_queries


def slow(logits, ids, uniform, temperature, top_p):
    """(log-mass, id, log-probability) of one query."""
    p = (logits.double() / temperature).softmax(0).numpy()
    mass = p[ids].sum()
    order = sorted(ids, key=lambda i: (-logits[i], i))
    kept, total = [], 0.0
    for i in order:
        kept.append(i)
        total += p[i]
        if total >= top_p * mass * (1 - 1e-9):
            break
    kept = np.sort(kept)
    drawn = kept[np.searchsorted(p[kept].cumsum(), uniform * p[kept].sum(), side="right")]
    return np.log(mass), drawn, np.log(p[drawn])


@pytest.mark.parametrize("scale", [0.01, 3.0], ids=["flat", "peaked"])
def test_every_kind_of_set(scale):
    """A block that begins in the wrong place, candidates that do not reach the mass, columns of another set."""
    chance = np.random.default_rng(0)
    vocab, width = 3 * BLOCK + 17, 4 * BLOCK
    shard = VocabShard(0, vocab)
    logits = torch.from_numpy(chance.normal(size=(64, width)).astype(np.float32)) * scale
    logits[:, vocab:] = 50.0  # padding, never asked about
    every = [np.arange(vocab), np.arange(vocab - 9), np.arange(5, vocab), np.array([4, 300, 301, vocab - 1])]
    sets = [LocalSet.of(ids, shard, width, torch.device("cpu")) for ids in every]
    numbers, shares = torch.arange(64) % 4, torch.tensor([1.0, 0.0, 0.2, 0.9]).double()[torch.arange(64) // 4 % 4]
    uniforms = torch.from_numpy(chance.random(64))
    found = answer_queries(logits, sets, numbers, uniforms, shard, 0.7, shares)
    if scale < 1:
        assert 0.2 * vocab > CANDIDATES, "one look at the candidates must not do"
    for row in range(64):
        mass, drawn, log_prob = slow(
            logits[row, :vocab], every[numbers[row]], float(uniforms[row]), 0.7, float(shares[row])
        )
        assert found.ids[row] == drawn
        assert float(found.log_masses[row]) == pytest.approx(mass, abs=1e-5)
        assert float(found.log_probs[row]) == pytest.approx(log_prob, abs=1e-5)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=40), st.floats(0, 1), st.integers(0, 999))
@settings(max_examples=200, deadline=None)
def test_equals_go_by_their_ids(values, top_p, uniform):
    """`topk` promises no order among equals: which of them was in the set depended on the machine."""
    logits = torch.tensor([values], dtype=torch.float32)
    shard = VocabShard(0, len(values))
    whole = [LocalSet.of(np.arange(len(values)), shard, len(values), torch.device("cpu"))]
    chosen = (uniform + 0.5) / 1000
    arguments = (logits, whole, torch.tensor([0]), torch.tensor([chosen], dtype=torch.float64), shard, 1.0)
    found = answer_queries(*arguments, torch.tensor([top_p], dtype=torch.float64))
    p = logits[0].double().softmax(0)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    cumulative = p[order].cumsum(0).numpy()
    if top_p and np.abs(cumulative - top_p).min() < 1e-6:
        return  # rounding decides whether one more belongs to the set
    kept = np.sort(order[: 1 + int((cumulative < top_p).sum())])[: len(values)]
    inside = p[kept].cumsum(0).numpy()
    if np.abs(inside / inside[-1] - chosen).min() > 1e-6:
        assert found.ids[0] == kept[np.searchsorted(inside, chosen * inside[-1], side="right")]
    if top_p == 0:
        assert found.ids[0] == int(np.argmax(values))


def test_nothing_to_draw():
    """An empty set, a set without probability, a question without a draw, in the same call as others."""
    logits = torch.zeros(4, 6)
    logits[1, 2] = -torch.inf
    shard = VocabShard(0, 5)
    sets = [LocalSet.of(np.array(ids, dtype=np.int64), shard, 6, torch.device("cpu")) for ids in ([], [2], range(5))]
    nan = float("nan")
    uniforms = torch.tensor([0.5, 0.5, nan, 0.999999999], dtype=torch.float64)
    found = answer_queries(logits, sets, torch.tensor([0, 1, 2, 2]), uniforms, shard)
    assert found.ids.tolist() == [-1, -1, -1, 4]
    assert found.log_masses.tolist() == [-np.inf, -np.inf, 0.0, 0.0]
    assert found.log_probs[:3].isnan().all()
    assert float(found.log_probs[3]) == pytest.approx(-np.log(5))
