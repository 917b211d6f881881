"""The methods of choosing a plan, by their names in a recipe."""

from __future__ import annotations

from collections.abc import Callable

from layerboost.costs.budget import Budget
from layerboost.errors import ConfigError
from layerboost.planning.choices import metric_limits
from layerboost.planning.greedy import Measure, greedy
from layerboost.planning.selection import block_influence, budget, infeasible, least_cosine, spread, threshold
from layerboost.recipe import Plan
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.sensitivity import Sensitivity

# Methods that measure plans on the model.
MEASURING = ("greedy",)


def select(sensitivity: Sensitivity, settings: Plan, seed: int = 0, measure: Measure | None = None) -> list[LayerPlan]:
    """Return the plan of `settings.method`; `seed` is for `random`, `measure` for the methods that measure plans.

    Raise ConfigError for settings that do not fit the method, InfeasibleBudget if no plan fits.
    """
    if settings.method in MEASURING:
        assert measure is not None
        return _measured(sensitivity, settings, measure)
    if settings.method == "budget":
        return budget(sensitivity, settings)
    if settings.unit != "layer":
        raise ConfigError(
            f"plan.method {settings.method} gives every layer one strategy",
            found=f"plan.unit {settings.unit}",
            do="set plan.unit to layer, or use budget or greedy",
        )
    if unsupported := metric_limits(settings):
        raise ConfigError(
            f"plan.method {settings.method} supports no limit on quality loss",
            found=", ".join(f"plan.max_{metric} {most:g}" for metric, most in unsupported.items()),
            do="leave out the limit, or use budget or greedy",
        )
    if settings.components and settings.method != "cosine":
        raise ConfigError(
            f"plan.method {settings.method} knows itself what to change",
            found=f"plan.components {', '.join(settings.components)}",
            do="leave out plan.components, or use budget, greedy or cosine",
        )
    controls: dict[str, Callable[[], list[LayerPlan]]] = {
        "threshold": lambda: threshold(sensitivity, settings),
        "uniform": lambda: spread(sensitivity, settings, None),
        "random": lambda: spread(sensitivity, settings, seed),
        "cosine": lambda: least_cosine(sensitivity, settings),
        "block_influence": lambda: block_influence(sensitivity, settings),
    }
    return controls[settings.method]()


def _measured(sensitivity: Sensitivity, settings: Plan, measure: Measure) -> list[LayerPlan]:
    """Return the plan of a greedy search; check limits on quality loss, which the search only penalizes."""
    plan = greedy(sensitivity, settings, measure)
    limits = metric_limits(settings)
    losses = measure(plan) if any(entry.changed for entry in plan) else dict.fromkeys(limits, 0.0)
    if any(losses[metric] > most + 1e-9 for metric, most in limits.items()):
        raise infeasible(Budget.of(sensitivity, settings), settings, plan, losses, "measured")
    return plan
