"""Intervals and tests for comparisons of arms: over held-out documents of one run, and over the seeds of several.

A figure per token is a ratio of sums, total nats over total tokens. Documents are drawn independently, tokens and the
pieces of one document are not: so documents are resampled, each with all its nats and tokens.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

RESAMPLES = 9999
"""Bootstrap resamples, and random sign patterns of a permutation test."""

EXACT_SIGNS = 12
"""Up to this many differences that are not zero all sign patterns are tried."""

FEW_ROWS = 5
"""Below this many rows resamples repeat one another: an interval is Student's t times the standard error."""

_AT_ONCE = 2_000_000
"""Numbers of a block of resamples that are in memory at once."""


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval; NaN ends where there is too little data for one."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """A paired difference, first minus second."""

    value: float
    low: float
    high: float
    """Ends of the confidence interval, NaN where there is too little data."""
    p_value: float
    """Two-sided, of "no difference"; NaN where there is too little data."""


def _stats() -> ModuleType:
    """`scipy.stats`, on first use: a second of imports that every process of every job would pay at its start."""
    from scipy import stats

    return stats


def by_group(values: np.ndarray, groups: Sequence[Hashable]) -> np.ndarray:
    """Sum the rows of `values` [rows, ...] that have an equal entry in `groups` [rows]; groups in order of first use.

    For example the pieces of one document. Raises ValueError when the lengths differ.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) != len(groups):
        raise ValueError(f"{len(values)} rows in {len(groups)} groups; give one group per row")
    numbers: dict[Hashable, int] = {}
    index = np.array([numbers.setdefault(g, len(numbers)) for g in groups], dtype=np.int64)
    summed = np.zeros((len(numbers), *values.shape[1:]))
    np.add.at(summed, index, values)
    return summed


def ratio_interval(sums: np.ndarray, weights: np.ndarray, level: float = 0.95, seed: int = 0) -> Interval:
    """sum(sums) / sum(weights) with a studentised bootstrap interval over the rows, both [rows]; weights > 0.

    Studentised (Efron & Tibshirani 1993, ch. 12.5) with the standard error of a ratio from its linearisation: it
    follows the skew of long documents, which percentiles do not. Below `FEW_ROWS` Student's t takes the bootstrap's
    place; ends are NaN for fewer than two rows.
    """
    sums, weights = _pair(sums, weights)
    if not len(sums) or not (weights > 0).all():
        raise ValueError(f"{len(sums)} rows, smallest weight {weights.min(initial=np.inf)}; give rows with weights > 0")
    value, error = _ratio_and_error(sums[None], weights[None])
    point, scale = float(value[0]), float(error[0])
    if len(sums) < 2:
        return Interval(point, math.nan, math.nan)
    if scale == 0:
        return Interval(point, point, point)
    if len(sums) < FEW_ROWS:
        half = float(_stats().t.ppf((1 + level) / 2, len(sums) - 1)) * scale
        return Interval(point, point - half, point + half)
    rng = np.random.default_rng(seed)
    parts = []
    block = max(1, _AT_ONCE // len(sums))
    for start in range(0, RESAMPLES, block):
        rows = rng.integers(len(sums), size=(min(block, RESAMPLES - start), len(sums)))
        resampled, own = _ratio_and_error(sums[rows], weights[rows])
        # A resample of one row over and over has no error of its own and says nothing about the spread.
        kept = own > 1e-9 * scale
        parts.append((resampled[kept] - point) / own[kept])
    low, high = np.quantile(np.concatenate(parts), [(1 - level) / 2, (1 + level) / 2])
    return Interval(point, point - float(high) * scale, point - float(low) * scale)


def _ratio_and_error(sums: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ratio of totals and its standard error, for samples [samples, rows]."""
    n, total = sums.shape[1], weights.sum(1)
    ratio = sums.sum(1) / total
    left = np.square(sums - ratio[:, None] * weights).sum(1)
    return ratio, np.sqrt(left * n / max(n - 1, 1)) / total


def paired_ratio(
    first: np.ndarray, second: np.ndarray, weights: np.ndarray, level: float = 0.95, seed: int = 0
) -> Difference:
    """Difference of two figures measured on the same rows: sum(first - second) / sum(weights), all [rows].

    The interval is that of `ratio_interval`, the p-value that of `sign_flip_p_value`.
    """
    first, second = _pair(first, second)
    interval = ratio_interval(first - second, weights, level, seed)
    return Difference(interval.value, interval.low, interval.high, sign_flip_p_value(first - second, seed))


def sign_flip_p_value(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of "the differences [rows] are symmetric about 0", by flipping their signs; the sum is tested.

    All patterns up to `EXACT_SIGNS` rows that differ, `RESAMPLES` random ones and the observed one beyond. 1 when
    nothing differs, NaN without rows.
    """
    differences = np.asarray(differences, dtype=np.float64)
    if not len(differences):
        return math.nan
    size = np.abs(differences[differences != 0])
    observed = abs(float(differences.sum()))
    # Rounding of sums must not decide between equal patterns.
    bar = observed * (1 - 1e-12) - 1e-300
    n = len(size)
    if n <= EXACT_SIGNS:
        patterns = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float((np.abs((2 * patterns - 1) @ size) >= bar).mean())
    rng = np.random.default_rng(seed)
    block, beyond = max(1, _AT_ONCE // n), 1
    for start in range(0, RESAMPLES, block):
        signs = 2 * rng.integers(2, size=(min(block, RESAMPLES - start), n), dtype=np.int8) - 1
        beyond += int((np.abs(signs @ size) >= bar).sum())
    return beyond / (RESAMPLES + 1)


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean of independent runs with Student's t interval; NaN ends for fewer than two."""
    found = np.asarray(values, dtype=np.float64)
    if not len(found):
        raise ValueError("the mean of no values; give at least one")
    mean = float(found.mean())
    if len(found) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(_stats().t.ppf((1 + level) / 2, len(found) - 1) * _stats().sem(found))
    return Interval(mean, mean - half, mean + half)


def paired_mean(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Difference:
    """Mean difference of runs that share a seed pair by pair, Student's t interval and paired t test.

    NaN interval and p-value for fewer than two pairs; p is 1 (0) when all differences are equal and zero (not zero).
    """
    one, other = _pair(np.asarray(first), np.asarray(second))
    interval = mean_interval((one - other).tolist(), level)
    if len(one) < 2:
        return Difference(interval.value, math.nan, math.nan, math.nan)
    error = float(_stats().sem(one - other))
    if error == 0:
        return Difference(interval.value, interval.low, interval.high, float(interval.value == 0))
    p_value = 2 * float(_stats().t.sf(abs(interval.value) / error, len(one) - 1))
    return Difference(interval.value, interval.low, interval.high, p_value)


def _pair(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [rows]; raises ValueError unless they are as long as each other."""
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != other.shape or one.ndim != 1:
        raise ValueError(f"values of shape {one.shape} beside {other.shape}; give two lists of equal length")
    return one, other


# -------------------------------------------------------------------------------------------------- rates of success


def pass_at_k(samples: np.ndarray, correct: np.ndarray, k: int) -> np.ndarray:
    """Unbiased estimate of the chance that one of k answers is right, for every problem; float64 [problems].

    `samples`, `correct` [problems]: answers drawn and right ones. 1 - C(n-c, k) / C(n, k) as a product (Chen et al.
    2021, arXiv 2107.03374). Raises ValueError where a problem has fewer than k answers.
    """
    n, c = (np.asarray(v, dtype=np.int64) for v in (samples, correct))
    if n.shape != c.shape or n.ndim != 1 or (c > n).any() or (c < 0).any():
        raise ValueError("give two lists of equal length, right answers no more than answers")
    if k < 1 or (n < k).any():
        raise ValueError(f"pass@{k} needs at least {k} answers to every problem; one has {n.min(initial=0)}")
    # The chance that all k of them are among the n - c wrong ones: drawn one after the other.
    wrong = np.ones(len(n))
    for drawn in range(k):
        wrong *= np.maximum(n - c - drawn, 0) / (n - drawn)
    return 1 - wrong


def rate_interval(values: np.ndarray, level: float = 0.95, seed: int = 0) -> Interval:
    """Mean of one value in [0, 1] per problem, with an interval over problems as drawn from all that could be asked.

    Wilson's score interval where all values are 0 or 1 (it does not vanish when no or every problem is solved), else
    the bootstrap of `ratio_interval`, cut to [0, 1]. NaN without values.
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return Interval(math.nan, math.nan, math.nan)
    if ((values == 0) | (values == 1)).all():
        found = _stats().binomtest(int(values.sum()), len(values)).proportion_ci(level, method="wilson")
        return Interval(float(values.mean()), float(found.low), float(found.high))
    found = ratio_interval(values, np.ones(len(values)), level, seed)
    return Interval(found.value, max(0.0, found.low), min(1.0, found.high))


def sampling_error(samples: np.ndarray, correct: np.ndarray) -> float:
    """Standard error of the mean pass@1 over other answers of the same model to these very problems.

    Of p = c / n with n independent answers the variance is p (1 - p) / (n - 1), unbiased; NaN where n is 1.
    """
    n, c = (np.asarray(v, dtype=np.float64) for v in (samples, correct))
    if not len(n) or (n < 2).any():
        return math.nan
    p = c / n
    return float(np.sqrt((p * (1 - p) / (n - 1)).sum()) / len(n))


def paired_rates(first: np.ndarray, second: np.ndarray, level: float = 0.95, seed: int = 0) -> Difference:
    """Difference of two models' rates on the same problems, both [problems], and a test by flipping signs.

    For single answers the test is McNemar's exact one. Where no problem differs, the interval is what such a sample
    leaves possible: the share of problems that differ lies below 1 - ((1 - level) / 2) ** (1 / problems).
    """
    first, second = _pair(first, second)
    if not len(first):
        return Difference(math.nan, math.nan, math.nan, math.nan)
    if (first == second).all():
        most = 1 - ((1 - level) / 2) ** (1 / len(first))
        return Difference(0.0, -most, most, 1.0)
    return paired_ratio(first, second, np.ones(len(first)), level, seed)


def by_rating(ratings: Sequence[int | None], values: np.ndarray, width: int = 400) -> dict[str, Interval]:
    """Rate per bucket of `width` rating points, such as `800-1199`, in rising order; `unrated` comes last."""
    values = np.asarray(values, dtype=np.float64)
    starts = [None if r is None else r // width * width for r in ratings]
    found = {}
    for start in sorted({s for s in starts if s is not None}):
        chosen = np.array([s == start for s in starts])
        found[f"{start}-{start + width - 1}"] = rate_interval(values[chosen])
    unrated = np.array([s is None for s in starts], dtype=bool)
    if unrated.any():
        found["unrated"] = rate_interval(values[unrated])
    return found
