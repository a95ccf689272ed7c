"""Means, deviations and paired differences over seeds, with Student's t interval."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """Mean and spread of ``n`` values; ``deviation`` is the sample standard deviation (n - 1), None for one value."""

    mean: float
    deviation: float | None
    n: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Mean of ``n`` differences; ``low`` and ``high`` bound it with 95 % confidence, None for one pair."""

    mean: float
    deviation: float | None
    low: float | None
    high: float | None
    n: int


def summary(values: Sequence[float]) -> Summary | None:
    """Mean and spread; None where there is no value."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Summary(mean=statistics.fmean(values), deviation=deviation, n=len(values))


def paired_difference(values: Mapping[int, float], base: Mapping[int, float]) -> PairedDifference | None:
    """``values - base`` seed by seed; None where they share no seed.

    Seeds that only one of the two has are left out: an unpaired value would bring the spread between seeds back in.
    The interval is ``mean ± t(n - 1) · deviation / √n`` and assumes that the differences are about normal.
    """
    found = summary([values[seed] - base[seed] for seed in sorted(values.keys() & base.keys())])
    if found is None:
        return None
    half = None
    if found.deviation is not None:
        half = t_quantile((1 + CONFIDENCE) / 2, found.n - 1) * found.deviation / math.sqrt(found.n)
    return PairedDifference(
        mean=found.mean,
        deviation=found.deviation,
        low=None if half is None else found.mean - half,
        high=None if half is None else found.mean + half,
        n=found.n,
    )


def t_quantile(probability: float, degrees_of_freedom: int) -> float:
    """The ``probability`` quantile of Student's t distribution, for probabilities from 0.5 to below 1."""
    if not 0.5 <= probability < 1 or degrees_of_freedom < 1:
        raise ValueError(f"no t quantile for probability {probability} and {degrees_of_freedom} degrees of freedom")
    low, high = 0.0, 1.0
    while _t_probability(high, degrees_of_freedom) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_probability(middle, degrees_of_freedom) < probability else (low, middle)
    return high


def _t_probability(t: float, degrees_of_freedom: int) -> float:
    """P(T <= t) for t >= 0: the finite series for whole degrees of freedom, Abramowitz and Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees_of_freedom))
    cosine = math.cos(angle)
    odd = degrees_of_freedom % 2
    term = cosine if odd else 1.0
    total = term if degrees_of_freedom > 1 else 0.0
    for k in range(2 + odd, degrees_of_freedom - 1, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    within = math.sin(angle) * total
    if odd:
        within = 2 / math.pi * (angle + within)
    return (1 + within) / 2
