"""The whole curve of damage against cost: the plan of one method at every budget."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from layerboost.artifacts import Artifact, LayerPlan, ModelInfo, Predicted, Sensitivity, counts, window_of
from layerboost.errors import InfeasibleBudget
from layerboost.recipe import Plan
from layerboost.search.choices import predict
from layerboost.search.greedy import Measure
from layerboost.search.methods import select
from layerboost.strategies import StrategyName

FRONTIER = "frontier.json"
STEPS = 40


class FrontierPoint(BaseModel):
    """The plan at one budget, with what is foretold of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    predicted: Predicted
    layers: list[LayerPlan]

    def count(self, attention: StrategyName) -> int:
        return counts(self.layers)[attention]

    @property
    def window(self) -> int | None:
        return window_of(self.layers)


class Frontier(Artifact):
    """`frontier.json`: plans from the cheapest to the base."""

    model: ModelInfo
    sensitivity: str = Field(description="hash of the sensitivity.json it was made from")
    settings: dict[str, Any]
    points: list[FrontierPoint]


def frontier(
    sensitivity: Sensitivity, settings: Plan, seed: int = 0, measure: Measure | None = None
) -> list[FrontierPoint]:
    """The plan of `settings.method` at each fortieth of the base's KV bytes, other limits as set; each plan once.

    Raises InfeasibleBudget when there is none at all.
    """
    points: list[FrontierPoint] = []
    for step in range(1, STEPS + 1):
        at = settings.model_copy(update={"kv_fraction": step / STEPS})
        try:
            layers = select(sensitivity, at, seed, measure)
        except InfeasibleBudget:
            if step == STEPS:
                raise
            continue
        if not points or layers != points[-1].layers:
            points.append(FrontierPoint(predicted=predict(sensitivity, layers, settings), layers=layers))
    return points
