"""pass@k, its intervals, differences of two models, ratings: hand-computed and brute force."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ra3_megatron.evaluation.statistics import by_rating, paired_rates, pass_at_k, rate_interval, sampling_error


def test_pass_at_k_by_hand() -> None:
    """4 answers, 1 right: two of them hold it in 3 of 6 draws."""
    assert pass_at_k(np.array([4, 4, 4, 4]), np.array([0, 1, 3, 4]), 2).tolist() == pytest.approx([0, 0.5, 1, 1])
    assert pass_at_k(np.array([5]), np.array([2]), 1).tolist() == pytest.approx([0.4])


@given(st.integers(1, 8), st.data())
@settings(deadline=None)
def test_pass_at_k_is_the_share_of_draws_with_a_right_answer(n: int, data: st.DataObject) -> None:
    """The estimate 1 - (1 - c/n)^k is biased."""
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([i < c for i in range(n)], k))
    expected = sum(any(draw) for draw in draws) / len(draws)
    assert pass_at_k(np.array([n]), np.array([c]), k)[0] == pytest.approx(expected)


def test_pass_at_k_refuses_too_few_answers() -> None:
    """pass@10 of one answer was the same as pass@1."""
    with pytest.raises(ValueError, match="at least 10 answers"):
        pass_at_k(np.array([10, 9]), np.array([1, 1]), 10)


def test_the_interval_of_no_success_does_not_vanish() -> None:
    """0 of 164 solved: a bootstrap says 0 ± 0. Wilson's upper end is z^2 / (n + z^2)."""
    found = rate_interval(np.zeros(164))
    z2 = 1.959963984540054**2
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(z2 / (164 + z2))


def test_wilson_by_hand() -> None:
    """Centre (p + z^2/2n) / (1 + z^2/n) with p = 7/164."""
    n, p, z = 164, 7 / 164, 1.959963984540054
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    found = rate_interval(np.array([1.0] * 7 + [0.0] * 157))
    ends = ((centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n))
    assert (found.low, found.high) == pytest.approx(ends)


def test_intervals_of_shares_hold_the_truth_about_as_often_as_they_say() -> None:
    """Shares of several answers: 95 % intervals over problems cover the true mean in 34 to 40 of 40 samples."""
    rng = np.random.default_rng(3)
    inside = 0
    for seed in range(40):
        chances = rng.beta(0.6, 1.2, size=60)
        values = rng.binomial(8, chances) / 8
        found = rate_interval(values, seed=seed)
        inside += found.low <= 0.6 / 1.8 <= found.high
        assert 0 <= found.low <= found.high <= 1
    assert 34 <= inside <= 40


def test_sampling_error_by_hand() -> None:
    """Two problems of 4 answers with 2 and 4 right: sqrt(0.25 / 3) / 2."""
    assert sampling_error(np.array([4, 4]), np.array([2, 4])) == pytest.approx(math.sqrt(0.25 / 3) / 2)
    assert math.isnan(sampling_error(np.array([1, 1]), np.array([0, 1])))


def test_paired_single_answers_are_mcnemars_test() -> None:
    """8 problems better, 1 worse: two-sided exact binomial 2 (C(9,0) + C(9,1)) / 2^9."""
    first = np.array([1.0] * 8 + [0.0] + [1.0] * 20)
    second = np.array([0.0] * 8 + [1.0] + [1.0] * 20)
    found = paired_rates(first, second)
    assert found.value == pytest.approx(7 / 29)
    assert found.p_value == pytest.approx(2 * (1 + 9) / 2**9)
    assert found.low < found.value < found.high


def test_equal_models_leave_room_for_a_difference() -> None:
    """No problem differs: an interval of no width said that the models are the same."""
    found = paired_rates(np.zeros(100), np.zeros(100))
    assert (found.value, found.p_value) == (0, 1)
    assert found.high == -found.low == pytest.approx(1 - 0.025**0.01)


def test_ratings_are_put_into_buckets() -> None:
    """Rating 1199 and 1200 are neighbours in different buckets; problems without a rating are kept apart."""
    found = by_rating([800, 1199, 1200, None], np.array([1.0, 0.0, 1.0, 1.0]))
    assert list(found) == ["800-1199", "1200-1599", "unrated"]
    assert [f.value for f in found.values()] == [0.5, 1.0, 1.0]
