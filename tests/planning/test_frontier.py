from __future__ import annotations

import pytest
from test_selection import sensitivity, with_mlps
from tiny import layer_plans

from layerboost.errors import InfeasibleBudget
from layerboost.planning.methods import axis_of, frontier, knee, select
from layerboost.recipe import Plan
from layerboost.schemas.plan import FrontierPoint, Predicted, counts


def test_less_damage_costs_more_and_the_last_plan_is_the_base() -> None:
    found, settings = sensitivity(8), Plan(context_tokens=100)
    points = frontier(found, settings)
    quality_loss = [point.predicted.quality_loss.get("kl", 0.0) for point in points]
    assert len(points) > 8
    assert quality_loss == sorted(quality_loss, reverse=True)
    assert counts(points[-1].layers)["full"] == 8
    half = select(found, settings.model_copy(update={"kv_fraction": 0.5}))
    assert half in [point.layers for point in points]


def test_a_limit_on_parameters_gives_the_curve_over_parameters() -> None:
    found, settings = with_mlps(4), Plan(kv_fraction=1, parameter_fraction=0.8)
    points = frontier(found, settings)
    parameters = [point.predicted.parameter_fraction for point in points]
    assert len(points) > 8
    assert parameters == sorted(parameters)
    assert any(entry.mlp_width for point in points for entry in point.layers)
    assert select(found, settings) in [point.layers for point in points]
    assert {point.predicted.kv_fraction for point in points} != {1.0}
    cheapest = knee(points, "kl", axis_of(settings))
    assert cheapest
    assert parameters[0] < cheapest.predicted.parameter_fraction < 1


def test_no_plan_at_all() -> None:
    with pytest.raises(InfeasibleBudget, match="a predicted kl of at most -1"):
        frontier(sensitivity(), Plan(max_kl=-1))


def test_the_knee_is_where_savings_begin_to_cost_more() -> None:
    def point(kv_fraction: float, loss: float) -> FrontierPoint:
        predicted = Predicted(
            quality_loss={"kl": loss} if loss else {},
            kv_fraction=kv_fraction,
            kv_bytes_per_request=1,
            parameter_fraction=1.0,
            context_tokens=100,
        )
        return FrontierPoint(predicted=predicted, layers=layer_plans("f"))

    curve = [point(0.1, 1.0), point(0.2, 0.6), point(0.3, 0.2), point(0.5, 0.15), point(0.75, 0.1), point(1.0, 0.0)]
    assert knee(curve, "kl") is curve[2]
    assert knee(curve[:2], "kl") is None
    assert knee([point(0.02, 15.0), point(0.05, 4.0), *curve], "kl") is curve[2], "lost models do not bend the curve"
