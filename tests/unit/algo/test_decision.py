import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.algo.decision import (
    Decision,
    TokenSets,
    decide,
    latent_log_probs,
    mask_columns,
    two_step_decision,
)
from ra3_megatron.algo.logprobs import VocabShard, token_entropy, token_log_probs
from tests.distributed.launch import run_ranks
from tests.unit.algo.decision_ranks import SETS, TEMPERATURE, WHICH, full_logits, weights
from tests.unit.algo.decision_ranks import VOCAB as VOCAB_SPLIT


def slow_decision(row: torch.Tensor, ids: list[int], vocab: int, temperature: float) -> tuple[float, float]:
    """(log p_think, log p_act) of one row, from the definition, in double precision."""
    weights = [math.exp(float(v) / temperature) for v in row[:vocab].double()]
    think = sum(weights[i] for i in ids)
    return math.log(think / sum(weights)), math.log((sum(weights) - think) / sum(weights))


def test_hand_computed():
    """Weights 1, 2, 5 and a padding column: thinking with the first two has probability 3/8."""
    logits = torch.tensor([[0.0, math.log(2), math.log(5), 90.0]])
    out = decide(logits, TokenSets.make([[0, 1]]), torch.tensor([0]), VocabShard(0, 3))
    assert out.p_think.item() == pytest.approx(3 / 8)
    assert out.log_act.exp().item() == pytest.approx(5 / 8)
    assert out.entropy().item() == pytest.approx(-(3 / 8 * math.log(3 / 8) + 5 / 8 * math.log(5 / 8)))
    assert [out.draw(torch.tensor([u])).item() for u in (0.0, 0.374, 0.376)] == [True, True, False]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(3, 9), st.integers(0, 3), st.sampled_from([1.0, 0.6, 2.5]), st.integers(0, 9999))
def test_matches_the_definition(rows, vocab, padding, temperature, seed):
    """Sets of several sizes, padded vocabulary, temperature: all against sums over the vocabulary."""
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab + padding, generator=g) * 4
    before = logits.clone()
    lists = [
        torch.randperm(vocab, generator=g)[: 1 + int(n)].tolist() for n in torch.randint(vocab - 1, (3,), generator=g)
    ]
    which = torch.randint(3, (rows,), generator=g)
    out = decide(logits, TokenSets.make(lists), which, VocabShard(0, vocab), temperature)
    assert torch.equal(logits, before)
    for i in range(rows):
        think, act = slow_decision(logits[i], lists[int(which[i])], vocab, temperature)
        assert out.log_think[i].item() == pytest.approx(think, abs=1e-5)
        assert out.log_act[i].item() == pytest.approx(act, abs=1e-5)


@pytest.mark.parametrize("gap", [-300.0, -40.0, 0.0, 40.0, 300.0])
def test_both_outcomes_keep_their_digits(gap):
    """log(1 - p_think) by subtraction is minus infinity from p_think = 1 - 6e-8 on, and so would be the gradient."""
    logits = torch.tensor([[gap, 0.0, 0.0]], requires_grad=True)
    out = decide(logits, TokenSets.make([[0]]), torch.tensor([0]), VocabShard(0, 3))
    act = -math.log1p(math.exp(gap) / 2) if gap <= 0 else math.log(2) - gap - math.log1p(2 * math.exp(-gap))
    assert out.log_act.item() == pytest.approx(act, rel=1e-5, abs=1e-12)
    assert out.log_think.item() == pytest.approx(act + gap - math.log(2), rel=1e-5, abs=1e-6)
    out.log_act.sum().backward()
    p = 1 / (1 + 2 * math.exp(-gap)) if gap > -300 else 0.0
    torch.testing.assert_close(logits.grad, torch.tensor([[-p, p / 2, p / 2]]), atol=1e-6, rtol=0)


def autograd_reference(logits, lists, which, vocab, temperature):
    """The same by log_softmax and logsumexp, which autograd can follow."""
    log_p = (logits[:, :vocab].double() / temperature).log_softmax(-1)
    think, act = [], []
    for i, s in enumerate(which.tolist()):
        others = [v for v in range(vocab) if v not in lists[s]]
        think.append(log_p[i, lists[s]].logsumexp(0))
        act.append(log_p[i, others].logsumexp(0))
    return torch.stack(think), torch.stack(act)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_gradients_match_autograd(temperature):
    """The hand-written backward pass, with unequal weights on both outcomes and padding columns."""
    torch.manual_seed(0)
    logits = (torch.randn(6, 11) * 3).requires_grad_()
    plain = logits.detach().clone().requires_grad_()
    lists, which = [[0, 3, 8], [5]], torch.tensor([0, 1, 0, 0, 1, 1])
    a, b = torch.randn(6), torch.randn(6)
    out = decide(logits, TokenSets.make(lists), which, VocabShard(0, 9), temperature)
    (out.log_think * a + out.log_act * b).sum().backward()
    think, act = autograd_reference(plain, lists, which, 9, temperature)
    (think * a + act * b).sum().backward()
    torch.testing.assert_close(logits.grad, plain.grad, atol=1e-5, rtol=1e-4)
    assert (logits.grad[:, 9:] == 0).all()
    half = logits.detach().bfloat16().requires_grad_()
    decide(half, TokenSets.make(lists), which, VocabShard(0, 9)).log_act.sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_masked_tokens_have_no_probability_and_no_gradient():
    """The sampler never draws them, so a score that counts their mass is not what was sampled from."""
    torch.manual_seed(0)
    logits = torch.randn(2, 6, requires_grad=True)
    masked = mask_columns(logits, torch.tensor([1, 4]), VocabShard(0, 5))
    got = token_log_probs(masked, torch.tensor([0, 3]), VocabShard(0, 5))
    allowed = logits[:, [0, 2, 3]].log_softmax(-1)
    torch.testing.assert_close(got, torch.stack((allowed[0, 0], allowed[1, 2])))
    (got.sum() + token_entropy(masked, VocabShard(0, 5)).sum()).backward()
    assert (logits.grad[:, [1, 4, 5]] == 0).all()
    assert torch.isfinite(logits.grad).all()


def test_latent_log_probs_by_hand():
    """Lines: act, thought of two tokens, thought of one token; a missing token is an error and no zero."""
    decision = Decision(torch.tensor([-3.0, -1.0, -2.0]), torch.tensor([-0.5, -0.7, -0.9]))
    thinks = torch.tensor([False, True, True])
    owner = torch.tensor([1, 1, 2])
    got = latent_log_probs(decision, thinks, torch.tensor([-1.5, -0.25, -4.0]), owner)
    torch.testing.assert_close(got, torch.tensor([-0.5, -1.75, -4.0]))
    with pytest.raises(ValueError, match="disagree"):
        latent_log_probs(decision, thinks, torch.tensor([-1.5, -0.25]), torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="disagree"):
        latent_log_probs(decision, thinks, torch.tensor([-1.5, -0.25, -4.0]), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize("bad", [[[]], [[1, 1]], [[-1, 2]]])
def test_bad_sets_are_refused(bad):
    """A repeated id would count its probability twice; the data package's sets, which are arrays, are taken."""
    assert TokenSets.make([np.array([4]), np.array([1, 2])]).ids.tolist() == [[4, -1], [1, 2]]
    with pytest.raises(ValueError, match="token set 0"):
        TokenSets.make(bad)


# A tiny language. 0 "\n", 1 "#", 2 "#\n", 3 "a", 4 "x", 5 "  " (opener: the opening is "  #"), 6 end of text.
VOCAB, NEWLINE, HASH, HASH_NEWLINE, LETTER, OPENER, END = 7, 0, 1, 2, 3, 5, 6
BANNED = torch.tensor([HASH_NEWLINE, END])


def logits_after(context: tuple[int, ...], seed: int) -> torch.Tensor:
    """Another random row for every context: [1, vocab]."""
    code = seed + sum((token + 1) * 11**place for place, token in enumerate(context))
    return torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(code), dtype=torch.float32) * 2


def thought_log_probs(first: tuple[int, ...], start: float, limit: int, temperature: float, seed: int) -> list[float]:
    """log q of all thoughts that begin with `first`: closed by a newline token, or by force at `limit` tokens."""
    if first[-1] in (NEWLINE, HASH_NEWLINE) or len(first) == limit:
        return [start]
    found = []
    logits = mask_columns(logits_after(first, seed), BANNED, VocabShard(0, VOCAB))
    for token in range(VOCAB):
        if token not in BANNED:
            step = token_log_probs(logits, torch.tensor([token]), VocabShard(0, VOCAB), temperature).item()
            found += thought_log_probs((*first, token), start + step, limit, temperature, seed)
    return found


@pytest.mark.parametrize(("limit", "temperature", "seed"), [(1, 1.0, 0), (2, 0.6, 1), (4, 1.0, 2), (4, 1.7, 3)])
def test_q_sums_to_one_over_all_latents(limit, temperature, seed):
    """q(act) and all thoughts together: a decision that forgets a token, or a cut thought, breaks the sum."""
    shard, zero = VocabShard(0, VOCAB), torch.tensor([0])
    logits = logits_after((), seed)
    ids = [HASH, HASH_NEWLINE]
    log_q = [decide(logits, TokenSets.make([ids]), zero, shard, temperature).log_act.item()]
    for token in ids:
        start = token_log_probs(logits, torch.tensor([token]), shard, temperature).item()
        log_q += thought_log_probs((token,), start, limit, temperature, seed)
    assert sum(map(math.exp, log_q)) == pytest.approx(1.0, abs=1e-5)
    assert len(log_q) > 2


@pytest.mark.parametrize("forced", [True, False])
def test_q_sums_to_one_with_an_opener(forced):
    """Both readings of an opener: the completion follows by force, or is drawn and may turn the decision."""
    shard, zero, seed = VocabShard(0, VOCAB), torch.tensor([0]), 5
    logits, free = logits_after((), seed), [HASH]
    opened = token_log_probs(logits, torch.tensor([OPENER]), shard).item()
    if forced:
        log_q = [decide(logits, TokenSets.make([[*free, OPENER]]), zero, shard).log_act.item()]
    else:
        after = logits_after((OPENER,), seed)
        second = decide(after, TokenSets.make([[HASH]]), zero, shard)
        both = two_step_decision(logits, TokenSets.make([free]), zero, torch.tensor([OPENER]), second, shard)
        assert both.log_think.exp().item() + both.log_act.exp().item() == pytest.approx(1.0, abs=1e-6)
        p = logits[0].softmax(-1)
        assert both.p_think.item() == pytest.approx((p[HASH] + p[OPENER] * after[0].softmax(-1)[HASH]).item(), rel=1e-5)
        log_q = [both.log_act.item()]
        opened += token_log_probs(after, torch.tensor([HASH]), shard).item()
    for token in free:
        start = token_log_probs(logits, torch.tensor([token]), shard).item()
        log_q += thought_log_probs((token,), start, 3, 1.0, seed)
    # The opener and its completion are one opening: the thought's length counts from there.
    log_q += thought_log_probs((OPENER, HASH), opened, 4, 1.0, seed)
    assert sum(map(math.exp, log_q)) == pytest.approx(1.0, abs=1e-5)


def test_completions_of_several_tokens():
    """Two steps by hand: both must be for a thought."""
    first, second = (Decision(*torch.tensor([[p], [1 - p]]).log()) for p in (0.5, 0.2))
    assert first.then(second).p_think.item() == pytest.approx(0.1)
    assert first.then(second).log_act.exp().item() == pytest.approx(0.9)


def test_split_vocabulary_gives_the_same(tmp_path: Path):
    """Think ids on several ranks, a rank with none, and one with padding alone (NaN from a shard without a maximum)."""
    world = 3
    parts = run_ranks("tests.unit.algo.decision_ranks:work", world, timeout=120, tmp_path=tmp_path)
    full, a = full_logits(world).requires_grad_(), weights()
    think, act = autograd_reference(full, SETS, torch.tensor(WHICH), VOCAB_SPLIT, TEMPERATURE)
    (think * a + act * a.square()).sum().backward()
    scores = full.detach()[:, [1, 2, 4]].log_softmax(-1)[range(4), [0, 1, 2, 2]]
    for part in parts:
        torch.testing.assert_close(torch.tensor(part["think"]), think.detach().float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(part["act"]), act.detach().float(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(part["scores"]), scores, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([torch.tensor(p["grad"]) for p in parts], -1), full.grad, atol=1e-5, rtol=1e-5)


def test_the_tiny_language_is_not_degenerate():
    """The sums above mean something only if contexts differ."""
    rows = [logits_after(c, 0) for n in range(3) for c in product((HASH, LETTER), repeat=n)]
    assert len({tuple(r[0].tolist()) for r in rows}) == len(rows)
