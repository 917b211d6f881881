"""Selection: from sensitivities to one strategy a layer, by optimization or by the rules it is compared with."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from layerboost.costs.budget import DECODE_MS, KV_BYTES, PARAMETERS, Budget
from layerboost.costs.memory import cached
from layerboost.errors import ConfigError, InfeasibleBudget
from layerboost.planning.choices import Choice, best_sliding, choices, metric_limits, removal, score_in, windows
from layerboost.recipe import Plan
from layerboost.schemas.plan import LayerPlan, counted
from layerboost.schemas.sensitivity import Sensitivity
from layerboost.strategies import SINK, StrategyName

# What a message calls the costs that a budget limits, and the settings that limit them.
NAMES = {KV_BYTES: "KV cache", PARAMETERS: "parameters", DECODE_MS: "decoding time"}
SETTINGS = {KV_BYTES: "kv_fraction", PARAMETERS: "parameter_fraction", DECODE_MS: "decode_fraction"}

Exceed = Literal["nothing", "damage", "costs"]


def budget(sensitivity: Sensitivity, settings: Plan) -> list[LayerPlan]:
    """Least predicted damage within every limit; each replacement scored with itself.

    One integer program a window (one binary variable per layer and choice), the best window wins. Raises
    InfeasibleBudget, naming the nearest plan.
    """
    limits = Budget.of(sensitivity, settings)
    tables = [_settled(choices(sensitivity, settings, window), settings) for window in windows(sensitivity, settings)]
    solved = [found for table in tables if (found := _solve(table, limits, settings)) is not None]
    if not solved:
        nearest = _nearest(tables, limits, settings)
        scores = {metric: sum(score_in(choice, metric) for choice in nearest) for metric in metric_limits(settings)}
        raise infeasible(limits, settings, [choice.plan for choice in nearest], scores)
    return [choice.plan for choice in min(solved, key=lambda found: found[0])[1]]


def threshold(sensitivity: Sensitivity, settings: Plan) -> list[LayerPlan]:
    """The paper's three tiers: all layers ranked by the damage of removal alone; full, sliding, none from the top.

    The paper gives neither thresholds nor counts: `full_above` and `none_below` cut by value, `full_layers` and
    `none_layers` by count. By default a third is removed and as many stay full as the budget allows. A sliding layer
    has a sink where that measured better.
    """
    damage = {entry.layer: removal(entry, settings.metric) for entry in sensitivity.layers}
    ranked = sorted(damage, key=lambda layer: damage[layer], reverse=True)
    table = _settled(choices(sensitivity, settings, windows(sensitivity, settings)[0]), settings)

    def tiers(full: set[int], none: set[int]) -> list[LayerPlan]:
        return [_tier(options, "full" if layer in full else "none" if layer in none else "sliding")
                for layer, options in enumerate(table)]  # fmt: skip

    if settings.full_above is not None or settings.none_below is not None:
        high = np.inf if settings.full_above is None else settings.full_above
        low = -np.inf if settings.none_below is None else settings.none_below
        full = {layer for layer in ranked if damage[layer] > high}
        return tiers(full, {layer for layer in ranked if damage[layer] < low} - full)
    none_count = len(ranked) // 3 if settings.none_layers is None else settings.none_layers
    if (settings.full_layers or 0) + none_count > len(ranked):
        raise ConfigError(
            "plan.full_layers and plan.none_layers exceed the layers of the model",
            found=f"{settings.full_layers or 0} + {none_count} > {len(ranked)}",
        )
    none = set(ranked[len(ranked) - none_count :])
    if settings.full_layers is None:
        return _most_full(sensitivity, settings, lambda full: tiers(set(ranked[:full]), none), len(ranked) - none_count)
    return tiers(set(ranked[: settings.full_layers]), none)


def spread(sensitivity: Sensitivity, settings: Plan, seed: int | None) -> list[LayerPlan]:
    """A control: as many full layers as the budget allows, evenly spaced or drawn with `seed`, all others sliding.

    The window is the one asked for, or the shortest measured; a sink where that measured better.
    """
    table = _settled(choices(sensitivity, settings, windows(sensitivity, settings)[0]), settings)
    count = len(table)
    order = list(range(count))
    if seed is not None:
        random.Random(seed).shuffle(order)

    def plan(full: int) -> list[LayerPlan]:
        even = {int((index + 0.5) * count / full) for index in range(full)}
        kept = even if seed is None else set(order[:full])
        return [_tier(options, "full" if layer in kept else "sliding") for layer, options in enumerate(table)]

    return _most_full(sensitivity, settings, plan, count)


def least_cosine(sensitivity: Sensitivity, settings: Plan) -> list[LayerPlan]:
    """A control, LLM-Drop (arXiv 2406.15786): the attention that turns the stream least is removed, all other is full.

    As few layers are removed as the budget allows.
    """
    ranked = sorted(sensitivity.layers, key=lambda entry: removal(entry, "cosine"), reverse=True)
    order = [entry.layer for entry in ranked]

    def plan(full: int) -> list[LayerPlan]:
        kept = set(order[:full])
        return [LayerPlan(layer=layer, attention="full" if layer in kept else "none") for layer in range(len(order))]

    return _most_full(sensitivity, settings, plan, len(order))


def _most_full(
    sensitivity: Sensitivity, settings: Plan, plan: Callable[[int], list[LayerPlan]], most: int
) -> list[LayerPlan]:
    """The plan with the most full layers that meets the budget; raises InfeasibleBudget when not even none does."""
    limits = Budget.of(sensitivity, settings)
    for full in range(most, -1, -1):
        found = plan(full)
        if limits.met(found):
            return found
    raise infeasible(limits, settings, plan(0), {})


def _settled(table: list[list[Choice]], settings: Plan) -> list[list[Choice]]:
    """In a blend with retrieval, each layer's window with or without its sink by the blend's other metric alone.

    A sink costs nothing, and a few prompts cannot tell with from without: by the blend, noise chooses, and a wrong sink
    does far more damage among changed layers than alone (docs/log/selection.md).
    """
    limited = metric_limits(settings).keys() - {settings.metric}
    if not 0 < settings.retrieval_weight < 1 or settings.metric == "retrieval" or limited:
        return table
    kept = []
    for options in table:
        either = [choice for choice in options if SINK in choice.plan.strategy.settings]
        best = min(either, key=lambda choice: score_in(choice, settings.metric), default=None)
        kept.append([choice for choice in options if choice not in either or choice is best])
    return kept


def _tier(options: list[Choice], attention: StrategyName) -> LayerPlan:
    if attention == "sliding":
        return best_sliding(options)
    return LayerPlan(layer=options[0].plan.layer, attention=attention)


def _solve(
    table: list[list[Choice]], limits: Budget, settings: Plan, exceed: Exceed = "nothing"
) -> tuple[float, list[Choice]] | None:
    """The best choices and their damage, or None where no plan is within the limits.

    `exceed`: what may go beyond its limits, the others being held; then the plan is the one whose greatest excess, as a
    share of the base or of the limit, is least, and that excess stands in place of the damage.
    """
    if exceed == "nothing":
        # Padding needs the larger program; mostly the best plan without has none.
        found = _program(table, replace(limits, padding=False), settings, exceed)
        if found is None or limits.met([choice.plan for choice in found[1]]):
            return found
    return _program(table, limits, settings, exceed)


def _program(
    table: list[list[Choice]], limits: Budget, settings: Plan, exceed: Exceed
) -> tuple[float, list[Choice]] | None:
    """The integer program of `_solve`, by HiGHS.

    Variables: a binary one for each choice, one for each pair of counts (full, sliding), because padding depends on
    both, and the excess.
    """
    flat = [choice for options in table for choice in options]
    pairs = _pairs(len(table), limits, exceed)
    rows, bounds, of_costs = _limits(flat, pairs, limits, settings)
    slack = np.zeros(len(rows)) if exceed == "nothing" else np.where(of_costs == (exceed == "costs"), -1.0, 0.0)
    if exceed == "costs":
        bounds = np.where(of_costs, bounds, np.inf)
    equal, right = _equalities(table, pairs)
    damages = np.array([choice.damage for choice in flat])
    others = np.zeros(len(pairs) + 1)
    if exceed != "nothing":
        damages, others[-1] = np.zeros(len(flat)), 1.0
    answer = milp(
        np.append(damages, others),
        constraints=[
            LinearConstraint(np.hstack([equal, np.zeros((len(equal), 1))]), right, right),
            LinearConstraint(np.hstack([rows, slack[:, None]]), -np.inf, bounds),
        ],
        integrality=np.append(np.ones(equal.shape[1]), 0),
        bounds=Bounds(0, np.append(np.ones(equal.shape[1]), np.inf)),
    )
    if answer.x is None:
        return None
    return float(answer.fun), [choice for choice, taken in zip(flat, answer.x, strict=False) if taken > 0.5]


def _pairs(most: int, limits: Budget, exceed: Exceed) -> list[tuple[int, int]]:
    """The counts of full and sliding layers that padding leaves within the limit on KV bytes; none without padding."""
    if not limits.padding:
        return []
    pairs = [(full, sliding) for full in range(most + 1) for sliding in range(most + 1 - full)]
    least = 1 / limits.model.layers  # of a full layer; what sliding ones hold is left to the program
    limit = limits.fractions.get(KV_BYTES, 1.0)
    fits = [pair for pair in pairs if pair[0] * least + limits.padding_share(*pair) <= limit + 1e-9]
    return pairs if exceed == "costs" else fits


def _equalities(table: list[list[Choice]], pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """One choice a layer, and the pair of counts that the choices make."""
    flat = [(layer, cached([choice.plan])) for layer, options in enumerate(table) for choice in options]
    rows = [[float(layer == row) for layer, _ in flat] + [0.0] * len(pairs) for row in range(len(table))]
    right = [1.0] * len(table)
    if pairs:
        rows.append([0.0] * len(flat) + [1.0] * len(pairs))
        right.append(1.0)
        for index in range(2):
            rows.append([float(found[index]) for _, found in flat] + [-float(pair[index]) for pair in pairs])
            right.append(0.0)
    return np.array(rows), np.array(right)


def _limits(
    flat: list[Choice], pairs: list[tuple[int, int]], limits: Budget, settings: Plan
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One row a limit with the share of it that each choice and pair takes; the bounds; whether it is on a cost."""
    base, without = limits.base(), limits.plan([])
    costs = [limits.layer(choice.plan) for choice in flat]
    rows, bounds, of_costs = [], [], []
    for name, fraction in limits.fractions.items():
        padding = [limits.padding_share(*pair) if name == KV_BYTES else 0.0 for pair in pairs]
        rows.append([cost[name] / base[name] for cost in costs] + padding)
        bounds.append(fraction - without[name] / base[name])
        of_costs.append(True)
    for metric, most in metric_limits(settings).items():
        scale = abs(most) or 1.0
        rows.append([score_in(choice, metric) / scale for choice in flat] + [0.0] * len(pairs))
        bounds.append(most / scale)
        of_costs.append(False)
    return np.array(rows), np.array(bounds), np.array(of_costs)


def _nearest(tables: list[list[list[Choice]]], limits: Budget, settings: Plan) -> list[Choice]:
    """Where no plan is within all limits: the one within the costs that does least too much damage, or else the
    cheapest."""
    for exceed in ("damage", "costs"):
        found = [plan for table in tables if (plan := _solve(table, limits, settings, exceed)) is not None]
        if found:
            return min(found, key=lambda plan: plan[0])[1]
    raise AssertionError("a plan without limits always exists")


def infeasible(
    limits: Budget, settings: Plan, layers: list[LayerPlan], scores: Mapping[str, float], how: str = "predicted"
) -> InfeasibleBudget:
    """The error that names the nearest plan and the limits it would need; `scores` are `how` they were found."""
    share, wanted, found, do = limits.held(layers), [], [], []
    for name, fraction in limits.fractions.items():
        if share[name] > fraction + 1e-9:
            wanted.append(f"the {NAMES[name]} within {fraction:.1%} of the base's")
            found.append(f"{share[name]:.1%} of the base's {NAMES[name]}")
            do.append(f"plan.{SETTINGS[name]} to {math.ceil(share[name] * 1000) / 1000:g}")
    for metric, most in metric_limits(settings).items():
        if scores and scores[metric] > most + 1e-9:
            wanted.append(f"a {how} {metric} of at most {most:g}")
            found.append(f"a {how} {metric} of {scores[metric]:.3g}")
            do.append(f"plan.max_{metric} to {math.ceil(scores[metric] * 1000) / 1000:g}")
    return InfeasibleBudget(
        f"no plan by {settings.method} keeps " + " and ".join(wanted),
        found=f"the nearest ({counted(layers)}) has " + " and ".join(found),
        do=f"raise {' and '.join(do)} or more, or measure a shorter window",
    )
