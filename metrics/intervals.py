"""Bootstrap intervals that resample patients."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from metrics.overlap import Counts, ratio


class Interval(NamedTuple):
    """Value with its bootstrap interval; bounds are NaN with fewer than two patients."""

    value: float
    low: float
    high: float


def bootstrap(
    values: np.ndarray,
    patients: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    n: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Computes a statistic of summed cases with its percentile interval by patient.

    Patients, not scans or nodules, are drawn with replacement, because cases of one patient
    are not independent. Draws where the statistic is undefined are left out.

    Args:
        values: (cases, columns) numbers that are summed over cases.
        patients: (cases,) patient of each case.
        statistic: Maps (..., columns) sums to (...) values, NaN if undefined.
        n: Number of draws.
        seed: Seed of the draws; equal seeds draw equal patients, so that two runs on
            the same cases can be compared draw by draw.
        level: Coverage of the interval.

    Reference: Efron and Tibshirani 1993, chapter 13 (percentile interval); here patients are
        resampled as clusters.
    """
    values = np.asarray(values, np.float64)
    names, patient_of_case = np.unique(np.asarray(patients), return_inverse=True)
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, patient_of_case, values)
    value = float(statistic(sums.sum(axis=0)))
    if np.count_nonzero(sums.any(axis=1)) < 2:
        return Interval(value, np.nan, np.nan)
    times = np.random.default_rng(seed).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=n
    )
    draws = statistic(times @ sums)  # (n,)
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return Interval(value, np.nan, np.nan)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))


def mean_columns(values: np.ndarray) -> np.ndarray:
    """Returns (cases, 2) for `bootstrap` with `mean_of_sums`; NaN cases are left out."""
    defined = np.isfinite(values)
    return np.stack([np.where(defined, values, 0), defined], axis=1)


def mean_of_sums(sums: np.ndarray) -> np.ndarray:
    """Computes the mean from summed `mean_columns`."""
    return ratio(sums[..., 0], sums[..., 1])


def bootstrap_mean(
    values: np.ndarray, patients: np.ndarray, **options: Any
) -> Interval:
    """Computes the mean of the values that are not NaN, with its interval by patient."""
    return bootstrap(mean_columns(values), patients, mean_of_sums, **options)


def bootstrap_pooled(
    counts: np.ndarray, patients: np.ndarray, name: str, **options: Any
) -> Interval:
    """Computes a ratio of the summed `Counts`, with its interval by patient.

    Args:
        counts: (cases, 3) true positives, false positives, false negatives.
        patients: (cases,) patient of each case.
        name: "dice", "iou", "sensitivity" or "precision".
        **options: Options of `bootstrap`.
    """
    return bootstrap(
        counts,
        patients,
        lambda sums: getattr(Counts(*np.moveaxis(sums, -1, 0)), name),
        **options,
    )
