"""Every way to choose a plan, by the name it has in a recipe."""

from __future__ import annotations

from collections.abc import Callable

from layerboost.artifacts import LayerPlan, Sensitivity
from layerboost.recipe import Plan
from layerboost.search.greedy import Measure, greedy, refine
from layerboost.search.selection import budget, least_cosine, spread, threshold

# Methods that measure whole plans on the model.
MEASURING = ("greedy", "refine")


def select(sensitivity: Sensitivity, settings: Plan, seed: int = 0, measure: Measure | None = None) -> list[LayerPlan]:
    """The plan that `settings.method` chooses; `seed` is for `random`, `measure` for the methods that measure plans.

    Raises ConfigError or InfeasibleBudget.
    """
    if settings.method in MEASURING:
        assert measure is not None
        return (greedy if settings.method == "greedy" else refine)(sensitivity, settings, measure)
    methods: dict[str, Callable[[], list[LayerPlan]]] = {
        "budget": lambda: budget(sensitivity, settings),
        "threshold": lambda: threshold(sensitivity, settings),
        "uniform": lambda: spread(sensitivity, settings, None),
        "random": lambda: spread(sensitivity, settings, seed),
        "cosine": lambda: least_cosine(sensitivity, settings),
    }
    return methods[settings.method]()
