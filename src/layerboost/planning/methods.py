"""Every way to choose a plan, by the name it has in a recipe."""

from __future__ import annotations

from collections.abc import Callable

from layerboost.costs.budget import Budget
from layerboost.errors import ConfigError
from layerboost.planning.choices import metric_limits
from layerboost.planning.greedy import Measure, greedy
from layerboost.planning.selection import budget, infeasible, least_cosine, spread, threshold
from layerboost.recipe import Plan
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.sensitivity import Sensitivity

# Methods that measure whole plans on the model.
MEASURING = ("greedy",)


def select(sensitivity: Sensitivity, settings: Plan, seed: int = 0, measure: Measure | None = None) -> list[LayerPlan]:
    """The plan that `settings.method` chooses; `seed` is for `random`, `measure` for the methods that measure plans.

    Raises ConfigError or InfeasibleBudget.
    """
    if settings.method in MEASURING:
        assert measure is not None
        return _measured(sensitivity, settings, measure)
    if settings.method == "budget":
        return budget(sensitivity, settings)
    if unheard := metric_limits(settings):
        raise ConfigError(
            f"plan.method {settings.method} keeps to no limit on damage",
            found=", ".join(f"plan.max_{metric} {most:g}" for metric, most in unheard.items()),
            do="leave the limit out, or use budget or greedy",
        )
    controls: dict[str, Callable[[], list[LayerPlan]]] = {
        "threshold": lambda: threshold(sensitivity, settings),
        "uniform": lambda: spread(sensitivity, settings, None),
        "random": lambda: spread(sensitivity, settings, seed),
        "cosine": lambda: least_cosine(sensitivity, settings),
    }
    return controls[settings.method]()


def _measured(sensitivity: Sensitivity, settings: Plan, measure: Measure) -> list[LayerPlan]:
    """A plan by the methods that measure; the search only leans towards limits on damage, so they are looked at."""
    plan = greedy(sensitivity, settings, measure)
    limits = metric_limits(settings)
    found = measure(plan) if any(entry.changed for entry in plan) else dict.fromkeys(limits, 0.0)
    if any(found[metric] > most + 1e-9 for metric, most in limits.items()):
        raise infeasible(Budget.of(sensitivity, settings), settings, plan, found, "measured")
    return plan
