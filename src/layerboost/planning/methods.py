"""The methods of choosing a plan, by their names in a recipe, and the curve of one method's plans at every budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from layerboost.costs.budget import Budget
from layerboost.errors import ConfigError, InfeasibleBudget
from layerboost.planning.choices import metric_limits, predict
from layerboost.planning.greedy import Measure, greedy
from layerboost.planning.selection import block_influence, budget, infeasible, least_cosine, spread, threshold
from layerboost.recipe import Plan
from layerboost.schemas.plan import Axis, FrontierPoint, LayerPlan
from layerboost.schemas.sensitivity import Sensitivity

# Methods that measure plans on the model.
MEASURING = ("greedy",)
STEPS = 40
# Nats per token: a model that loses more is not the same model any more.
LOST_KL = 1.0


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


def axis_of(settings: Plan) -> Axis:
    """Return the budget that a frontier steps over: parameters if the settings limit them, else KV bytes."""
    return "kv_fraction" if settings.parameter_fraction is None else "parameter_fraction"


def frontier(
    sensitivity: Sensitivity, settings: Plan, seed: int = 0, measure: Measure | None = None
) -> list[FrontierPoint]:
    """Return the plans of `settings.method` at each fortieth of the base's KV bytes, or parameters (`axis_of`), other
    limits as set, each once.

    Raise InfeasibleBudget if no budget has a plan.
    """
    points: list[FrontierPoint] = []
    for step in range(1, STEPS + 1):
        at = settings.model_copy(update={axis_of(settings): step / STEPS})
        try:
            layers = select(sensitivity, at, seed, measure)
        except InfeasibleBudget:
            if step == STEPS:
                raise
            continue
        if not points or layers != points[-1].layers:
            points.append(FrontierPoint(predicted=predict(sensitivity, layers, settings), layers=layers))
    return points


def knee(points: Sequence[FrontierPoint], metric: str, axis: Axis = "kv_fraction") -> FrontierPoint | None:
    """Return the point furthest below the line from the cheapest to the dearest; None for fewer than three points.

    Left of it, a saving costs more than it does on average (Satopää et al., 2011, "Kneedle"). Plans that lose more than
    LOST_KL are left out: their losses would hide where the useful ones begin to cost more.
    """
    points = [point for point in points if point.predicted.quality_loss.get("kl", 0.0) <= LOST_KL]
    if len(points) < 3:
        return None
    x: list[float] = [getattr(point.predicted, axis) for point in points]
    y = [point.predicted.quality_loss.get(metric, 0.0) for point in points]
    width, height = (x[-1] - x[0]) or 1.0, (y[0] - y[-1]) or 1.0
    below = [(x[-1] - cost) / width - (loss - y[-1]) / height for cost, loss in zip(x, y, strict=True)]
    return points[max(range(len(points)), key=below.__getitem__)]
