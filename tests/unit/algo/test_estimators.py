import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.algo.estimators import resampling_weights, staleness


def test_resampling_by_hand():
    """Weights 1, 2 and 5 of 8; effective samples 64 / 30; far below what exp() can hold."""
    joint = torch.tensor([1.0, 2.0, 5.0]).log() - 3000
    got = resampling_weights(joint.double(), torch.full((3,), -100.0))
    torch.testing.assert_close(got.log_weights.exp(), torch.tensor([1.0, 2.0, 5.0]).double() / 8, atol=1e-3, rtol=0)
    assert got.effective_samples.item() == pytest.approx(64 / 30, rel=1e-3)
    picks = [got.draw(torch.tensor(u)).item() for u in (0.0, 0.12, 0.13, 0.37, 0.38, 0.999999)]
    assert picks == [0, 0, 1, 1, 2, 2]


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 9999))
def test_resampling_matches_the_loop(snippets, samples, seed):
    """Every snippet is normalised by itself; equal weights count fully, one dominating weight counts as one sample."""
    g = torch.Generator().manual_seed(seed)
    joint, proposal = torch.randn(2, snippets, samples, generator=g, dtype=torch.float64) * 3
    got = resampling_weights(joint, proposal)
    uniform = torch.rand(snippets, generator=g, dtype=torch.float64)
    picks = got.draw(uniform)
    for i in range(snippets):
        raw = [math.exp(joint[i, k] - proposal[i, k]) for k in range(samples)]
        weights = [w / sum(raw) for w in raw]
        assert got.log_weights[i].exp().tolist() == pytest.approx(weights)
        assert got.effective_samples[i].item() == pytest.approx(1 / sum(w * w for w in weights))
        below = sum(weights[: int(picks[i])])
        assert below - 1e-12 <= uniform[i].item() <= below + weights[int(picks[i])] + 1e-12
    same = resampling_weights(torch.zeros(samples), torch.zeros(samples))
    assert same.effective_samples.item() == pytest.approx(samples)


def test_impossible_samples_are_never_drawn():
    """A sample of weight zero came out for uniform = 0 or just below 1; no weight at all is an error and not NaN."""
    inf = math.inf
    got = resampling_weights(torch.tensor([-inf, 0.0, 0.0, -inf]), torch.zeros(4))
    draws = {got.draw(torch.tensor(u)).item() for u in (0.0, 0.3, 0.7, 1 - 1e-12, math.nextafter(1.0, 0.0))}
    assert draws == {1, 2}
    with pytest.raises(ValueError, match="all zero"):
        resampling_weights(torch.tensor([[0.0, 0.0], [-inf, -inf]]), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="all zero"):
        resampling_weights(torch.tensor([0.0, math.nan]), torch.zeros(2))


def test_resampled_latents_follow_the_posterior():
    """BoLT's reason to be: with many proposals the resampled one is distributed as p(z | x), not as q."""
    posterior, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.2, 0.3, 0.5])
    g = torch.Generator().manual_seed(0)
    z = torch.multinomial(q, 4000 * 64, replacement=True, generator=g).view(4000, 64)
    weights = resampling_weights(posterior.log()[z], q.log()[z])
    chosen = z.gather(1, weights.draw(torch.rand(4000, generator=g))[:, None])
    frequency = torch.bincount(chosen[:, 0], minlength=3) / 4000
    torch.testing.assert_close(frequency, posterior, atol=0.03, rtol=0)


def test_staleness_by_hand():
    """Ratios 1, 2.5 (truncated at 2), one half; the fourth is too old, and its ratio would overflow."""
    current = torch.tensor([0.0, math.log(2.5), math.log(0.5), 500.0], requires_grad=True)
    got = staleness(current, torch.zeros(4), torch.tensor([0, 1, 2, 3]), max_lag=2)
    torch.testing.assert_close(got.weights, torch.tensor([1.0, 2.0, 0.5, 0.0]))
    assert got.truncated.tolist() == [False, True, False, False]
    assert got.kept.tolist() == [True, True, True, False]
    assert not got.weights.requires_grad
    with pytest.raises(ValueError, match="2 versions ahead"):
        staleness(current, torch.zeros(4), torch.tensor([0, -2, 0, 0]), max_lag=2)


def test_weights_turn_stale_means_into_current_ones():
    """Without a bound the weighted mean over the old policy is the mean over the new one, exactly (enumerated)."""
    old, new = (torch.randn(6, generator=torch.Generator().manual_seed(s)).log_softmax(0) for s in (1, 2))
    value = torch.arange(6.0)
    got = staleness(new, old, torch.ones(6, dtype=torch.int64), 1, max_importance_weight=math.inf)
    torch.testing.assert_close((old.exp() * got.weights * value).sum(), (new.exp() * value).sum())
