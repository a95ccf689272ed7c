"""Means, deviations and paired differences over seeds, with Student's t interval."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from scipy import stats

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
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, found.n - 1))
        half = quantile * found.deviation / math.sqrt(found.n)
    return PairedDifference(
        mean=found.mean,
        deviation=found.deviation,
        low=None if half is None else found.mean - half,
        high=None if half is None else found.mean + half,
        n=found.n,
    )
