"""Paired differences with bootstrap intervals, and what a sample of that size could have seen."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000
CHUNK_DRAWS = 1 << 22
# Two-sided 5 % and a power of 80 %: 1.96 + 0.84 standard errors.
DETECTABLE_ERRORS = 2.80
# 1 - 0.025 ** (1 / n), for large n.
UNSEEN_ITEMS = 3.69

Means = npt.NDArray[np.float64]


def mean_and_error(values: Sequence[float]) -> dict[str, float]:
    """Mean and its standard error; an error of 0 where one value alone tells nothing about it, NaN where a value is not
    finite."""
    if not all(map(math.isfinite, values)):
        return {"mean": float(np.mean(values)), "standard_error": math.nan}
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": fmean(values), "standard_error": error}


def resampled_means(values: Sequence[float]) -> Means:
    """Means `[RESAMPLES]` of samples drawn from `values` with replacement, the same in every run."""
    array, draw = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    step = max(1, CHUNK_DRAWS // len(array))
    counts = [min(step, RESAMPLES - start) for start in range(0, RESAMPLES, step)]
    return np.concatenate([array[draw.integers(len(array), size=(count, len(array)))].mean(-1) for count in counts])


def difference(values: Sequence[float], right_or_wrong: bool = False) -> dict[str, float]:
    """What paired differences, one an item, show: see `_described`. `right_or_wrong`: of scores that are 0 or 1."""
    found = _described(mean_and_error(values), resampled_means(values))
    return _widened(found, len(values)) if right_or_wrong else found


def average_difference(tasks: Sequence[Sequence[float]]) -> dict[str, float]:
    """The mean over tasks of their mean paired differences of right and wrong; each task is resampled on its own."""
    singles = [mean_and_error(values) for values in tasks]
    found = {
        "mean": fmean(single["mean"] for single in singles),
        "standard_error": sum(single["standard_error"] ** 2 for single in singles) ** 0.5 / len(singles),
    }
    # Shuffled, since every task draws from the same generator.
    draw = np.random.default_rng(1)
    means = np.mean([draw.permutation(resampled_means(values)) for values in tasks], axis=0)
    # A share of the smallest task's items that nobody saw moves the average most.
    return _widened(_described(found, means), len(tasks) * min(map(len, tasks)))


def _described(found: dict[str, float], means: Means) -> dict[str, float]:
    """A mean and its error, with what its bootstrap distribution adds.

    `low`, `high`: the 95 % interval; `at_least`: the bound that the true difference exceeds with 95 % probability, on
    which "no worse than" rests; `detectable`: the smallest true difference that such a sample shows four times in five.
    """
    with np.errstate(invalid="ignore"):
        low, at_least, high = (float(value) for value in np.quantile(means, (0.025, 0.05, 0.975)))
    return found | {
        "low": low,
        "high": high,
        "at_least": at_least,
        "detectable": DETECTABLE_ERRORS * found["standard_error"],
    }


def _widened(found: dict[str, float], items: int) -> dict[str, float]:
    """No bound nearer to the mean than what `items` cannot see: a bootstrap knows nothing of items that differ in a way
    that none here does. Had a share of 3.69 / n of all items, one of n would have, with 97.5 % probability.
    """
    reach = min(1.0, UNSEEN_ITEMS / items)
    low, high = found["mean"] - reach, found["mean"] + reach
    return found | {
        "low": min(found["low"], low),
        "high": max(found["high"], high),
        "at_least": min(found["at_least"], low),
        "detectable": max(found["detectable"], reach),
    }


def paired(base: Mapping[Any, float], changed: Mapping[Any, float]) -> list[float]:
    """Changed minus base of every item. Both must hold the same items."""
    assert base.keys() == changed.keys()
    return [changed[item] - base[item] for item in base]
