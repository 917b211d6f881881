"""Paired differences with bootstrap intervals, and the smallest difference that such a sample can detect."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from layerboost.schemas.evaluation import Change
from layerboost.schemas.run import BASE
from layerboost.schemas.sensitivity import Score

RESAMPLES = 10_000
# Number of draws in memory at once.
BATCH_DRAWS = 1 << 22
# Two-sided 5 % and a power of 80 %: 1.96 + 0.84 standard errors.
DETECTABLE_ERRORS = 2.80


def difference(values: Sequence[float], right_or_wrong: bool = False) -> Change:
    """Return the change that paired differences, one per item, show. `right_or_wrong`: scores are 0 or 1."""
    return average_difference([values], right_or_wrong)


def average_difference(
    tasks: Sequence[Sequence[float]], right_or_wrong: bool = True, weights: Sequence[float] | None = None
) -> Change:
    """Return the mean over tasks of their mean paired differences, with its interval; tasks are independent samples.

    `weights` of the tasks, whose sum is 1; by default all have the same.

    For scores that are 0 or 1, no bound is nearer to the mean than what the sample cannot show: a bootstrap misses
    items that differ in a way that none here does. If none of n items does, fewer than 1 - 0.025 ** (1 / n) of all
    do, with 97.5 % probability (Clopper-Pearson). Such items of one task move the average by its weight.
    """
    weights = weights or [1 / len(tasks)] * len(tasks)
    average = weighted_mean([Score.of(values) for values in tasks], weights)
    mean, error = average.mean, average.standard_error
    low, lower_95, high = _bounds(tasks, weights, mean)
    shown = [weight * (1 - 0.025 ** (1 / len(values))) for values, weight in zip(tasks, weights, strict=True)]
    unseen = max(shown) if right_or_wrong else 0.0
    return Change(
        mean=mean,
        standard_error=error,
        low=min(low, mean - unseen),
        high=max(high, mean + unseen),
        lower_95=min(lower_95, mean - unseen),
        minimum_detectable=max(DETECTABLE_ERRORS * error, unseen),
    )


def weighted_mean(scores: Sequence[Score], weights: Sequence[float]) -> Score:
    """Return the weighted mean of scores of independent samples; the sum of `weights` is 1."""
    pairs = list(zip(scores, weights, strict=True))
    return Score(
        mean=sum(weight * score.mean for score, weight in pairs),
        standard_error=math.hypot(*(weight * score.standard_error for score, weight in pairs)),
        count=sum(score.count or 0 for score in scores),
    )


def _bounds(tasks: Sequence[Sequence[float]], weights: Sequence[float], mean: float) -> tuple[float, float, float]:
    """Return the points below which the true mean over tasks is with 2.5, 5 and 97.5 % probability, by BCa bootstrap.

    The same values give the same points. A task whose items are all equal has nothing to resample, and if no task
    has, all points are the mean; for values that are not finite they are NaN.
    """
    if not math.isfinite(mean):
        return math.nan, math.nan, math.nan
    samples = [(weight, np.asarray(values, dtype=np.float64)) for weight, values in zip(weights, tasks, strict=True)]
    of_varied = [weight for weight, sample in samples if np.ptp(sample) > 0]
    varied = [sample for _, sample in samples if np.ptp(sample) > 0]
    if not varied:
        return mean, mean, mean
    alike = sum(weight * float(sample[0]) for weight, sample in samples if np.ptp(sample) == 0)

    def average(*resampled: np.ndarray, axis: int) -> Any:
        parts = zip(of_varied, resampled, strict=True)
        return sum(weight * part.mean(axis) for weight, part in parts) + alike

    options: dict[str, Any] = {"vectorized": True, "batch": max(1, BATCH_DRAWS // sum(map(len, varied))), "rng": 0}
    resampled_means = bootstrap(varied, average, n_resamples=RESAMPLES, **options)
    # The same resamples: 5 % are below the lower end of their 90 % interval.
    inner = bootstrap(varied, average, n_resamples=0, bootstrap_result=resampled_means, confidence_level=0.9, **options)
    low, high = resampled_means.confidence_interval
    return float(low), float(inner.confidence_interval.low), float(high)


def differences(scores: Mapping[str, Mapping[Any, float]], right_or_wrong: bool = False) -> dict[str, Change]:
    """Return each model's difference from the base; `scores`: by model and item."""
    changed = {model: scored for model, scored in scores.items() if model != BASE}
    return {model: difference(paired(scores[BASE], scored), right_or_wrong) for model, scored in changed.items()}


def paired(base: Mapping[Any, float], changed: Mapping[Any, float]) -> list[float]:
    """Return changed minus base per item; both must have the same items."""
    assert base.keys() == changed.keys()
    return [changed[item] - base[item] for item in base]
