"""The curve of quality loss against cost: the plan of one method at every budget."""

from __future__ import annotations

from collections.abc import Sequence

from layerboost.errors import InfeasibleBudget
from layerboost.planning.choices import predict
from layerboost.planning.greedy import Measure
from layerboost.planning.methods import select
from layerboost.recipe import Plan
from layerboost.schemas.plan import Axis, FrontierPoint
from layerboost.schemas.sensitivity import Sensitivity

STEPS = 40
# Nats per token: a model that loses more is not the same model any more.
LOST_KL = 1.0


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
