"""A NaN never passes: the step stops or is left out, and the message says where it came from."""

import pytest
import torch

from ra3_megatron.algo.losses import PolicyLossConfig
from ra3_megatron.training.components import cross_entropy_component, policy_gradient_component
from ra3_megatron.training.nonfinite import NonFiniteStep
from tests.unit.training import tiny

NO_WEIGHT, WEIGHT = 2, 6
"""Positions of a token that does not count and of one that does."""


def test_stop_names_step_rank_and_micro_batch(parallel):
    """ "loss is nan" and nothing else: which of 2,000 micro-batches was it?"""
    e = tiny.engine(tiny.config(), parallel, [tiny.scaled()])
    good, bad = tiny.batch(1, scale=tiny.scale()), tiny.batch(2, scale=tiny.scale(WEIGHT))
    before = tiny.state(e)
    with pytest.raises(NonFiniteStep) as error:
        e.train_step([good, bad], step=7)
    text = str(error.value)
    assert text.startswith("step 7: loss nan")
    assert "rank 0: micro-batch 1 (token ids" in text
    assert "micro-batch 0" not in text
    assert str(bad.input_ids[:8].tolist()) in text
    after = tiny.state(e)
    assert all(torch.equal(after[k], v) for k, v in before.items()), "the update was done before the stop"


def test_poisoned_weight_is_found(parallel):
    """A weight that became NaN makes every micro-batch NaN: no one of them is to blame alone."""
    e = tiny.engine(tiny.config(), parallel, [cross_entropy_component()])
    with torch.no_grad():
        next(iter(e.chunks[0].parameters())).fill_(torch.nan)
    with pytest.raises(NonFiniteStep, match=r"micro-batch 0 .* micro-batch 1 "):
        e.train_step([tiny.batch(1), tiny.batch(2)], step=1)


def test_gradient_without_a_loss_is_named_by_parameter(parallel):
    """A finite loss with an infinite gradient went into the weights."""
    e = tiny.engine(tiny.config(), parallel, [tiny.component(lambda log_probs, _: (log_probs - log_probs).sqrt())])
    with pytest.raises(NonFiniteStep, match=r"loss 0\.0, gradient norm nan; found at rank 0: gradient of "):
        e.train_step([tiny.batch(1), tiny.batch(2)], step=1)


def test_skip_changes_nothing_and_goes_on(parallel):
    """A skipped step moved the moments or applied weight decay all the same."""
    settings = tiny.config(train={"on_nonfinite": "skip"})
    e = tiny.engine(settings, parallel, [tiny.scaled()])
    good = [tiny.batch(n, scale=tiny.scale()) for n in (1, 2)]
    first = e.train_step(good, step=1)
    assert not first.skipped
    before = tiny.state(e)
    assert any(k.startswith("optimizer.") for k in before)
    skipped = e.train_step([good[0], tiny.batch(2, scale=tiny.scale(WEIGHT))], step=2)
    assert skipped.skipped
    after = tiny.state(e)
    assert all(torch.equal(after[k], v) for k, v in before.items())
    third = e.train_step(good, step=3)
    assert not third.skipped
    assert third.loss < first.loss
    moved = tiny.state(e)
    assert any(not torch.equal(moved[k], v) for k, v in before.items())


def test_token_without_weight_reaches_neither_loss_nor_gradient(parallel):
    """0 x NaN is NaN: in the backward pass a NaN passes through a `where` around the result alone."""
    results = []
    for poisoned in ((), (NO_WEIGHT,)):
        e = tiny.engine(tiny.config(), parallel, [tiny.scaled()])
        batches = [tiny.batch(1, scale=tiny.scale(*poisoned)), tiny.batch(2, scale=tiny.scale())]
        results.append((e.train_step(batches, step=1), tiny.state(e)))
    (clean, weights), (found, others) = results
    assert (found.loss, found.grad_norm) == (clean.loss, clean.grad_norm)
    assert all(torch.equal(others[k], v) for k, v in weights.items())


def test_policy_gradient_ignores_what_thoughts_do_not_have(parallel):
    """Code tokens have no behaviour log-probability: whatever stands there must not matter."""
    norms = []
    for filler in (0.0, torch.nan, torch.inf):
        e = tiny.engine(tiny.config(), parallel, [policy_gradient_component(PolicyLossConfig(), reads="labels")])
        behaviour, advantages = torch.full((tiny.SEQ,), -4.6), torch.ones(tiny.SEQ)
        behaviour[NO_WEIGHT], advantages[NO_WEIGHT] = filler, filler
        extras = {"behaviour_log_probs": behaviour, "advantages": advantages}
        norms.append(e.train_step([tiny.batch(n, "policy_gradient", **extras) for n in (1, 2)], step=1).grad_norm)
    assert norms[0] > 0
    assert norms[1:] == [norms[0]] * 2


def test_missing_extra_is_named(parallel):
    """A KeyError alone does not say which component wanted what."""
    e = tiny.engine(tiny.config(), parallel, [policy_gradient_component(PolicyLossConfig(), reads="labels")])
    with pytest.raises(KeyError, match=r"policy_gradient.*needs batch.extras\['advantages'\].*behaviour_log_probs"):
        e.train_step([tiny.batch(1, "policy_gradient", behaviour_log_probs=torch.zeros(tiny.SEQ))], step=1)


def test_component_without_weight_counts_nothing(parallel):
    """A mean over no token is 0 / 0."""
    e = tiny.engine(tiny.config(), parallel, [cross_entropy_component()])
    empty = tiny.batch(1)
    empty.weights["cross_entropy"].zero_()
    result = e.evaluate([empty])
    assert (result.loss, result.weights["cross_entropy"]) == (0.0, 0.0)
    step = e.train_step([empty], step=1)
    assert step.loss == 0.0
    assert step.grad_norm == 0.0
    assert not step.skipped
