"""Intervals and tests for comparisons of arms: over held-out documents of one run, and over the seeds of several.

A figure per token is a ratio of sums, total nats over total tokens. Documents are drawn independently, tokens and the
pieces of one document are not: so documents are resampled, each with all its nats and tokens.
"""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

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
        half = float(stats.t.ppf((1 + level) / 2, len(sums) - 1)) * scale
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
    half = float(stats.t.ppf((1 + level) / 2, len(found) - 1) * stats.sem(found))
    return Interval(mean, mean - half, mean + half)


def paired_mean(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Difference:
    """Mean difference of runs that share a seed pair by pair, Student's t interval and paired t test.

    NaN interval and p-value for fewer than two pairs; p is 1 (0) when all differences are equal and zero (not zero).
    """
    one, other = _pair(np.asarray(first), np.asarray(second))
    interval = mean_interval((one - other).tolist(), level)
    if len(one) < 2:
        return Difference(interval.value, math.nan, math.nan, math.nan)
    error = float(stats.sem(one - other))
    if error == 0:
        return Difference(interval.value, interval.low, interval.high, float(interval.value == 0))
    p_value = 2 * float(stats.t.sf(abs(interval.value) / error, len(one) - 1))
    return Difference(interval.value, interval.low, interval.high, p_value)


def _pair(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 [rows]; raises ValueError unless they are as long as each other."""
    one, other = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if one.shape != other.shape or one.ndim != 1:
        raise ValueError(f"values of shape {one.shape} beside {other.shape}; give two lists of equal length")
    return one, other
