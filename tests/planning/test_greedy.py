"""Greedy plans on losses that interact, against exhaustive search."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
from test_selection import sensitivity, with_mlps

from layerboost.costs.budget import Budget
from layerboost.errors import ConfigError, InfeasibleBudget
from layerboost.planning.choices import choices, variant_of
from layerboost.planning.greedy import greedy
from layerboost.planning.methods import select
from layerboost.planning.selection import budget
from layerboost.recipe import Plan
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.sensitivity import Sensitivity

LAYERS = 6
MADE = sensitivity(LAYERS)
SETTINGS = Plan(kv_fraction=0.4, context_tokens=64, kv_padding=False)


class Interacting:
    """Single scores add up, and two changed neighbours do harm together that neither score shows."""

    def __init__(self, harm: float, made: Sensitivity = MADE) -> None:
        self.harm, self.made, self.calls = harm, made, 0

    def __call__(self, plan: Sequence[LayerPlan]) -> Mapping[str, float]:
        self.calls += 1
        changed = [entry for entry in plan if entry.attention != "full"]
        single = sum(variant_of(self.made.layers[entry.layer], entry).scores["kl"].mean for entry in changed)
        pairs = sum(a.attention != "full" and b.attention != "full" for a, b in itertools.pairwise(plan))
        return {"kl": single + self.harm * pairs}


def best(measure: Interacting) -> float:
    limits = Budget.of(MADE, SETTINGS)
    options = [[choice.plan for choice in layer] for layer in choices(MADE, SETTINGS, 16)]
    return min(measure(plan)["kl"] for plan in itertools.product(*options) if limits.met(plan))


@pytest.mark.parametrize("harm", [0.0, 0.5])
def test_greedy_plans_meet_the_budget_and_are_near_the_best_there_is(harm: float) -> None:
    measure = Interacting(harm)
    plan = greedy(MADE, SETTINGS, measure)
    assert Budget.of(MADE, SETTINGS).met(plan)
    assert measure(plan)["kl"] <= 1.3 * best(measure)


def test_greedy_plans_of_attention_and_mlps() -> None:
    made, settings = with_mlps(), Plan(kv_fraction=0.6, parameter_fraction=0.8, context_tokens=64)

    def measure(plan: Sequence[LayerPlan]) -> Mapping[str, float]:
        sites = [site for entry in plan for site in entry.sites()]
        return {"kl": sum(variant_of(made.layers[site.layer], site).scores["kl"].mean for site in sites)}

    plan = greedy(made, settings, measure)
    assert Budget.of(made, settings).met(plan)
    assert any(entry.mlp_changed for entry in plan)
    assert any(entry.attention_changed for entry in plan)
    assert measure(plan)["kl"] <= 1.5 * measure(budget(made, settings))["kl"]


def test_measuring_again_pays_where_scores_do_not_add_up() -> None:
    made = sensitivity(14)
    measure = Interacting(1.0, made)
    alone = measure(budget(made, SETTINGS))["kl"]
    assert measure(greedy(made, SETTINGS, measure))["kl"] < 0.9 * alone


def test_lazy_greedy_measures_far_fewer_plans_than_a_sweep_a_step() -> None:
    many = sensitivity(24)
    measure = Interacting(0.05)

    def count(plan: Sequence[LayerPlan]) -> Mapping[str, float]:
        measure.calls += 1
        changed = [entry for entry in plan if entry.attention != "full"]
        return {"kl": sum(variant_of(many.layers[e.layer], e).scores["kl"].mean for e in changed) ** 1.2}

    greedy(many, SETTINGS, count)
    assert measure.calls < 24 * 24 / 2


def test_a_limit_on_one_metric_holds_while_the_other_is_kept_low() -> None:
    settings = SETTINGS.model_copy(update={"max_retrieval": 0.5})

    def measure(plan: Sequence[LayerPlan]) -> Mapping[str, float]:
        lost = sum(1.0 for entry in plan[:2] if entry.attention != "full")
        return {**Interacting(0.0)(plan), "retrieval": lost}

    assert measure(greedy(MADE, settings, measure))["retrieval"] == 0


def test_a_limit_that_the_plan_found_does_not_keep_is_infeasible() -> None:
    # By single scores the limit can be kept; as measured it cannot.
    settings = SETTINGS.model_copy(update={"method": "greedy", "max_kl": 8.0})
    with pytest.raises(InfeasibleBudget, match=r"a measured kl of at most 8[\s\S]*raise plan\.max_kl to"):
        select(MADE, settings, 0, Interacting(50.0))
    plan = select(MADE, settings, 0, Interacting(0.0))
    assert Interacting(0.0)(plan)["kl"] <= 8.0


def test_the_controls_know_no_limit_on_damage() -> None:
    for method in ("threshold", "uniform", "random", "cosine"):
        with pytest.raises(ConfigError, match=r"supports no limit on quality loss\nfound: plan\.max_kl 0\.5"):
            select(MADE, SETTINGS.model_copy(update={"method": method, "max_kl": 0.5}))


def test_a_budget_that_nothing_meets_is_infeasible() -> None:
    only_sliding = sensitivity(LAYERS, none=False)
    with pytest.raises(InfeasibleBudget):
        greedy(only_sliding, SETTINGS.model_copy(update={"kv_fraction": 0.1}), Interacting(0.0))
