from __future__ import annotations

import pytest
from test_selection import sensitivity

from layerboost.errors import InfeasibleBudget
from layerboost.planning.frontier import frontier
from layerboost.planning.methods import select
from layerboost.recipe import Plan


def test_less_damage_costs_more_and_the_last_plan_is_the_base() -> None:
    found, settings = sensitivity(8), Plan(context_tokens=100)
    points = frontier(found, settings)
    damage = [point.predicted.damage.get("kl", 0.0) for point in points]
    assert len(points) > 8
    assert damage == sorted(damage, reverse=True)
    assert points[-1].count("full") == 8
    half = select(found, settings.model_copy(update={"kv_fraction": 0.5}))
    assert half in [point.layers for point in points]


def test_no_plan_at_all() -> None:
    with pytest.raises(InfeasibleBudget, match="a predicted kl of at most -1"):
        frontier(sensitivity(), Plan(max_kl=-1))
