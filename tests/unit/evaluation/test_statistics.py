"""Intervals and tests against cases worked out by hand, and their coverage and size by simulation."""

import math

import numpy as np
import pytest

from ra3_megatron.evaluation import statistics
from ra3_megatron.evaluation.statistics import (
    by_group,
    mean_interval,
    paired_mean,
    paired_ratio,
    ratio_interval,
    sign_flip_p_value,
)


def test_pieces_of_a_document_are_added_up():
    """Pieces of one long file counted as independent documents, and intervals were too narrow."""
    values = np.array([[1.0, 10.0], [2.0, 20.0], [4.0, 40.0]])
    assert by_group(values, ["b", "a", "b"]).tolist() == [[5.0, 50.0], [2.0, 20.0]]
    with pytest.raises(ValueError, match="3 rows in 2 groups"):
        by_group(values, ["a", "b"])


def test_ratio_is_of_totals():
    """A mean of per-snippet means gives short snippets the weight of long ones."""
    found = ratio_interval(np.array([3.0, 20.0]), np.array([1.0, 99.0]))
    assert found.value == pytest.approx(0.23)
    # Both rows are 2.77 off 0.23 x weight: error sqrt(2 x 2.77^2 x 2) / 100, t(1) quantile 12.7062.
    assert found.high - found.value == pytest.approx(12.7062 * 2 * 2.77 / 100, abs=1e-4)
    assert found.value - found.low == pytest.approx(found.high - found.value)


def test_ratio_without_spread_and_with_one_row():
    """Division by a standard error of zero; an interval made up from a single document."""
    same = ratio_interval(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    assert (same.value, same.low, same.high) == (2.0, 2.0, 2.0)
    one = ratio_interval(np.array([2.0]), np.array([4.0]))
    assert one.value == 0.5
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    for sums, weights in (([], []), ([1.0], [0.0])):
        with pytest.raises(ValueError, match="weights > 0"):
            ratio_interval(np.array(sums), np.array(weights))


def test_ratio_interval_near_normal_theory():
    """Equal weights and many rows: the interval is mean +- t s / sqrt(n)."""
    x = np.random.default_rng(0).normal(1.0, 0.5, 400)
    found, expected = ratio_interval(x, np.ones(400)), mean_interval(x.tolist())
    assert found.low == pytest.approx(expected.low, abs=0.004)
    assert found.high == pytest.approx(expected.high, abs=0.004)


def test_sign_flips_by_hand():
    """Differences 1, 2, 4: of the 8 sums +-1 +-2 +-4 only +-7 reach 7; with 1, 2, -4 all but +-1, twice, reach 1."""
    assert sign_flip_p_value(np.array([1.0, 2.0, 4.0])) == 2 / 8
    assert sign_flip_p_value(np.array([1.0, 2.0, -4.0])) == 1.0
    assert sign_flip_p_value(np.array([1.0, 2.0, 4.0, 0.0])) == 2 / 8, "a row that does not differ says nothing"
    assert sign_flip_p_value(np.array([1.0, -2.0, 4.0])) == 6 / 8, "all sums but +-1, twice, reach 3"
    assert sign_flip_p_value(np.zeros(3)) == 1.0
    assert math.isnan(sign_flip_p_value(np.zeros(0)))


def test_random_flips_agree_with_all_flips(monkeypatch):
    """The random patterns beyond `EXACT_SIGNS` rows, with the observed one among them."""
    x = np.random.default_rng(5).normal(0.4, 1.0, 12)
    exact = sign_flip_p_value(x)
    monkeypatch.setattr(statistics, "EXACT_SIGNS", 4)
    drawn = sign_flip_p_value(x)
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact / statistics.RESAMPLES))
    assert sign_flip_p_value(np.full(40, 0.1)) == 1 / (statistics.RESAMPLES + 1), "never 0"


def test_paired_ratio_uses_the_pairing():
    """Two arms on documents of very different difficulty: apart their intervals overlap, paired they differ."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(50, 500, 60).astype(float)
    hard = rng.uniform(0.5, 3.0, 60) * tokens
    better = hard - 0.05 * tokens + rng.normal(0, 0.01, 60) * tokens
    assert ratio_interval(better, tokens).high > ratio_interval(hard, tokens).low
    found = paired_ratio(better, hard, tokens)
    assert found.value == pytest.approx(-0.05, abs=0.01)
    assert found.low < found.value < found.high < 0
    assert found.p_value < 0.001


def test_over_seeds_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t(2) quantile 4.302653; t = 3.464 gives p = 0.0742."""
    found = paired_mean([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2 - half, 2 + half), abs=1e-5)
    assert found.p_value == pytest.approx(0.0742, abs=1e-4)
    assert mean_interval([1.0, 2.0, 3.0]).value == 2.0
    one = paired_mean([2.0], [1.5])
    assert one.value == 0.5
    assert math.isnan(one.p_value)
    assert math.isnan(mean_interval([1.0]).low)
    assert paired_mean([1.0, 2.0], [1.0, 2.0]).p_value == 1.0
    assert paired_mean([2.0, 3.0], [1.0, 2.0]).p_value == 0.0
    with pytest.raises(ValueError, match="equal length"):
        paired_mean([1.0], [1.0, 2.0])


def test_coverage_and_size(monkeypatch):
    """95 % intervals for skewed sums that depend on skewed weights, and a test at 5 %, by simulation.

    Over 400 trials the standard error of a share is 1 to 1.5 %. Percentiles of the same bootstrap hold the truth less
    often, which is why they are not used.
    """
    monkeypatch.setattr(statistics, "RESAMPLES", 499)
    rng = np.random.default_rng(11)

    def draw(n):
        # E[weight] = e^(1/8), E[sum] = E[weight * (1 + weight)] = e^(1/8) + e^(1/2)
        weights = np.exp(rng.normal(0.0, 0.5, n))
        return weights * (1 + weights) * rng.gamma(4.0, 0.25, n), weights

    truth = 1 + math.exp(0.5 - 0.125)
    trials, held, by_percentiles, rejected = 400, 0, 0, 0
    for trial in range(trials):
        sums, weights = draw(40)
        found = ratio_interval(sums, weights, seed=trial)
        held += found.low <= truth <= found.high
        rows = rng.integers(40, size=(499, 40))
        low, high = np.quantile(sums[rows].sum(1) / weights[rows].sum(1), [0.025, 0.975])
        by_percentiles += low <= truth <= high
        rejected += sign_flip_p_value(sums - draw(40)[0], trial) <= 0.05
    assert 0.89 <= held / trials <= 0.98
    assert held > by_percentiles + 8
    assert 0.02 <= rejected / trials <= 0.085
