from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy.stats import binomtest

from layerboost.evaluating.statistics import average_difference, difference, paired
from layerboost.schemas.sensitivity import Score


def accuracies(items: int, lost: int, won: int) -> list[float]:
    values = [-1.0] * lost + [1.0] * won + [0.0] * (items - lost - won)
    random.Random(0).shuffle(values)
    return values


def test_a_mean_and_its_error() -> None:
    found = Score.of([1.0, 2.0, 3.0, 6.0])
    assert (found.mean, found.count) == (3.0, 4)
    assert found.standard_error == pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4))
    assert Score.of([2.0]) == Score(mean=2.0, standard_error=0.0, count=1)


def test_a_value_that_is_not_finite_stays_visible() -> None:
    for odd in (math.nan, math.inf):
        found = difference([1.0, odd, 2.0])
        assert not math.isfinite(found.mean)
        assert math.isnan(found.standard_error)


def test_differences_are_paired_over_items_in_any_order() -> None:
    base = {("t", 0): 1.0, ("t", 1): 0.0, ("t", 2): 1.0, ("u", 0): 1.0}
    changed = {("u", 0): 0.0, ("t", 2): 1.0, ("t", 1): 1.0, ("t", 0): 0.0}
    assert paired(base, changed) == [-1.0, 1.0, 0.0, -1.0]


def test_bounds_are_those_of_the_standard_error_where_a_sample_is_large_and_the_same_every_time() -> None:
    values = accuracies(1000, 80, 50)
    found = difference(values)
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.standard_error, rel=0.05)
    assert found.mean - found.lower_95 == pytest.approx(1.64 * found.standard_error, rel=0.08)
    assert found == difference(values)


@pytest.mark.parametrize(
    ("tasks", "covered"),
    # Items, the share lost and the share won per task. Nominally 95 %; three standard errors are 5.3 points.
    [
        ([(200, 0.12, 0.08)], 0.897),
        ([(60, 0.05, 0.05)], 0.897),
        ([(150, 0.02, 0.0)], 0.897),
        ([(60, 0.2, 0.1), (120, 0.05, 0.05)], 0.88),
    ],
)
def test_an_interval_covers_the_truth_as_often_as_it_says(
    tasks: list[tuple[int, float, float]], covered: float
) -> None:
    draw, truth = np.random.default_rng(7), np.mean([won - lost for _, lost, won in tasks])
    found = []
    for _ in range(150):
        samples = [
            draw.choice([-1.0, 1.0, 0.0], p=[lost, won, 1 - lost - won], size=n).tolist() for n, lost, won in tasks
        ]
        found.append(average_difference(samples) if samples[1:] else difference(samples[0], right_or_wrong=True))
    assert np.mean([each.low <= truth <= each.high for each in found]) >= covered
    # "No worse than" is claimed of a truth just below it in one of twenty samples.
    assert np.mean([each.lower_95 <= truth for each in found]) >= covered
    assert all(each.low <= each.lower_95 <= each.mean <= each.high for each in found)


def test_an_interval_of_any_differences_is_neither_too_narrow_nor_too_wide() -> None:
    # 100 samples of 200 items in which 12 % are lost and 8 % won: the true difference is -0.04.
    kinds = np.random.default_rng(5).choice([-1.0, 1.0, 0.0], p=[0.12, 0.08, 0.8], size=(100, 200))
    found = [difference(sample.tolist()) for sample in kinds]
    assert 0.90 <= np.mean([each.low <= -0.04 <= each.high for each in found]) <= 0.99
    assert np.mean([each.lower_95 > -0.04 for each in found]) <= 0.10


def test_what_a_sample_could_have_seen_shrinks_with_its_root() -> None:
    few, many = difference(accuracies(100, 10, 10)), difference(accuracies(10_000, 1000, 1000))
    assert few.minimum_detectable == pytest.approx(2.8 * few.standard_error)
    assert few.minimum_detectable / many.minimum_detectable == pytest.approx(10, rel=0.01)


def unseen(items: int) -> float:
    """The largest fraction of items of which a sample of this size has none, with 97.5 % probability."""
    return float(binomtest(0, items).proportion_ci(0.95).high)


def test_items_that_never_differ_still_leave_room() -> None:
    found = difference([0.0] * 50, right_or_wrong=True)
    assert (found.mean, found.standard_error) == (0.0, 0.0)
    assert found.high == -found.low == found.minimum_detectable == pytest.approx(unseen(50))
    assert difference([0.0] * 50).high == 0


def test_one_item_that_differs_proves_no_more_than_none() -> None:
    gained = accuracies(60, 0, 1)
    found = difference(gained, right_or_wrong=True)
    assert found.lower_95 == found.low == pytest.approx(1 / 60 - unseen(60))
    assert found.minimum_detectable == pytest.approx(unseen(60))
    none = accuracies(60, 0, 0)
    assert average_difference([gained, none, none]).lower_95 == pytest.approx((1 / 60 - unseen(60)) / 3)
    # Tasks have equal weights, so a large one does not make up for what a small one cannot show.
    assert average_difference([[0.0] * 50, [0.0] * 14_000]).lower_95 == pytest.approx(-unseen(50) / 2)
    # Where many differ, the bootstrap says more than the items unseen.
    many = accuracies(1000, 80, 50)
    assert difference(many, right_or_wrong=True) == difference(many)


def test_tasks_have_equal_weights_in_the_average() -> None:
    small, large = accuracies(100, 10, 0), accuracies(2000, 0, 100)
    found = average_difference([small, large])
    assert found.mean == pytest.approx((-0.1 + 0.05) / 2)
    errors = [Score.of(values).standard_error for values in (small, large)]
    assert found.standard_error == pytest.approx(math.hypot(*errors) / 2)
    # Independent samples: the interval is that of the sum of squares.
    assert found.high - found.low == pytest.approx(2 * 1.96 * found.standard_error, rel=0.08)
    twice = average_difference([small, small])
    assert twice.standard_error == pytest.approx(errors[0] / math.sqrt(2))
    assert twice.high - twice.low == pytest.approx(2 * 1.96 * twice.standard_error, rel=0.08)
