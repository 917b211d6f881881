"""Selection: from sensitivities to strategies of layers and KV heads, by optimization or by the rules of controls."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from layerboost.costs.budget import DECODE_MS, KV_BYTES, PARAMETERS, Budget
from layerboost.costs.memory import cached, module_heads
from layerboost.errors import ConfigError, InfeasibleBudget
from layerboost.planning.choices import Choice, choices, merged, metric_limits, score_in, score_of, windows
from layerboost.recipe import Plan
from layerboost.schemas.plan import LayerPlan, all_full, counted, window_of
from layerboost.schemas.sensitivity import Sensitivity
from layerboost.strategies import FULL, OTHER, SINK, SLIDING, StrategyName

# Names of the limited costs in messages, and their settings.
NAMES = {KV_BYTES: "KV cache", PARAMETERS: "parameters", DECODE_MS: "decoding time"}
SETTINGS = {KV_BYTES: "kv_fraction", PARAMETERS: "parameter_fraction", DECODE_MS: "decode_fraction"}

Exceed = Literal["nothing", "losses", "costs"]


def budget(sensitivity: Sensitivity, settings: Plan) -> list[LayerPlan]:
    """Return the plan of least predicted quality loss within every limit; each replacement has its own score.

    One integer program per window (one binary variable per choice of a layer's attention or MLP); the best window wins.
    Raise InfeasibleBudget, which names the nearest plan, if no plan fits.
    """
    limits = Budget.of(sensitivity, settings)
    tables = [_fix_sinks(choices(sensitivity, settings, window), settings) for window in windows(sensitivity, settings)]
    if DECODE_MS in limits.fractions:
        # Where any KV heads differ, every layer takes several attention calls: plans of whole layers apart.
        whole = [[[each for each in options if not each.plan.full_kv_heads] for options in table] for table in tables]
        tables += whole if whole != tables else []
    solved = [found for table in tables if (found := _solve(table, limits, settings)) is not None]
    if not solved:
        nearest = _nearest(tables, limits, settings)
        scores = {metric: sum(score_in(choice, metric) for choice in nearest) for metric in metric_limits(settings)}
        raise infeasible(limits, settings, merged(nearest), scores)
    return merged(min(solved, key=lambda found: found[0])[1])


def threshold(sensitivity: Sensitivity, settings: Plan) -> list[LayerPlan]:
    """Return the paper's three tiers: all layers ranked by removal score alone; full, sliding, none from the top.

    The paper has neither thresholds nor counts: `full_above` and `none_below` cut by value, `full_layers` and
    `none_layers` by count. By default, remove a third and leave as many full as the budget allows. A sliding layer
    has a sink if that measured better.
    """
    loss = {
        layer: score_of(sensitivity.layers[layer], LayerPlan(layer=layer, attention="none"), settings.metric)
        for layer in sensitivity.model.attention_layers
    }
    ranked = sorted(loss, key=lambda layer: loss[layer], reverse=True)
    table = _of_attention(sensitivity, settings)

    def tiers(full: set[int], none: set[int]) -> list[LayerPlan]:
        return [_tier(options, "full" if layer in full else "none" if layer in none else "sliding")
                for layer, options in enumerate(table)]  # fmt: skip

    if settings.full_above is not None or settings.none_below is not None:
        high = np.inf if settings.full_above is None else settings.full_above
        low = -np.inf if settings.none_below is None else settings.none_below
        full = {layer for layer in ranked if loss[layer] > high}
        return tiers(full, {layer for layer in ranked if loss[layer] < low} - full)
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
    """Return a control: as many full layers as the budget allows, evenly spaced or drawn with `seed`; the rest slide.

    The window is `plan.window`, or the shortest measured; a sink if that measured better.
    """
    table = _of_attention(sensitivity, settings)
    order = sensitivity.model.attention_layers
    layers, count = list(order), len(order)
    if seed is not None:
        random.Random(seed).shuffle(order)

    def plan(full: int) -> list[LayerPlan]:
        even = {layers[int((index + 0.5) * count / full)] for index in range(full)}
        chosen = even if seed is None else set(order[:full])
        return [_tier(options, "full" if layer in chosen else "sliding") for layer, options in enumerate(table)]

    return _most_full(sensitivity, settings, plan, count)


def least_cosine(sensitivity: Sensitivity, settings: Plan) -> list[LayerPlan]:
    """Return a control, LLM-Drop (arXiv 2406.15786): remove the attention that turns the stream least, as little as the
    budget allows; the rest is full. With MLPs among the settings' components, its joint drop: attention and MLPs in one
    ranking.
    """
    turns: list[tuple[float, LayerPlan]] = []
    for entry in sensitivity.layers:
        for component in settings.components or ("attention",):
            if component == "attention" and entry.layer in sensitivity.model.other_layers:
                continue
            site = LayerPlan.model_validate({"layer": entry.layer, "attention": FULL, component: "none"})
            turns.append((score_of(entry, site, "cosine"), site))
    return _fewest_removed(sensitivity, settings, turns)


def block_influence(sensitivity: Sensitivity, settings: Plan) -> list[LayerPlan]:
    """Return a control, ShortGPT (arXiv 2403.03853): remove the whole layers that turn the stream least, as few as the
    budget allows. Raise ConfigError if the file does not say how much they turn it.
    """
    turns = []
    for entry in (sensitivity.layers[layer] for layer in sensitivity.model.attention_layers):
        if entry.block_influence is None:
            raise ConfigError(
                "the sensitivities lack block_influence, as older files do",
                do="measure again in another --run folder",
            )
        turns.append((entry.block_influence.mean, LayerPlan(layer=entry.layer, attention="none", mlp="none")))
    return _fewest_removed(sensitivity, settings, turns)


def _fewest_removed(sensitivity: Sensitivity, settings: Plan, turns: list[tuple[float, LayerPlan]]) -> list[LayerPlan]:
    """Return the plan that removes what turns the stream least, as little as the budget allows."""
    ranked = [plan for _, plan in sorted(turns, key=lambda each: each[0], reverse=True)]

    def plan(kept: int) -> list[LayerPlan]:
        layers = all_full(sensitivity.model)
        for removed in ranked[kept:]:
            for site in removed.sites():
                layers[site.layer] = layers[site.layer].with_site(site)
        return layers

    return _most_full(sensitivity, settings, plan, len(ranked))


def _of_attention(sensitivity: Sensitivity, settings: Plan) -> list[list[Choice]]:
    """Return the choices of each layer's attention at `plan.window` or the shortest window; MLPs stay full."""
    table = choices(sensitivity, settings, windows(sensitivity, settings)[0])
    return _fix_sinks(table[: sensitivity.model.layers], settings)


def _most_full(
    sensitivity: Sensitivity, settings: Plan, plan: Callable[[int], list[LayerPlan]], most: int
) -> list[LayerPlan]:
    """Return the plan with the most full layers within the budget; raise InfeasibleBudget if none is."""
    limits = Budget.of(sensitivity, settings)
    for full in range(most, -1, -1):
        found = plan(full)
        if limits.met(found):
            return found
    raise infeasible(limits, settings, plan(0), {})


def _fix_sinks(table: list[list[Choice]], settings: Plan) -> list[list[Choice]]:
    """Return the choices with one window for a whole layer in a blend with retrieval: with a sink if the other metric
    says so.

    A sink costs nothing, and a few prompts cannot tell with from without: in the blend, noise decides, and a wrong sink
    loses far more among changed layers than alone (docs/log/selection.md).
    """
    limited = metric_limits(settings).keys() - {settings.metric}
    if not 0 < settings.retrieval_weight < 1 or settings.metric == "retrieval" or limited:
        return table
    fixed = []
    for options in table:
        whole = (choice for choice in options if not choice.plan.full_kv_heads)
        either = [choice for choice in whole if SINK in choice.plan.strategy.settings]
        best = min(either, key=lambda choice: score_in(choice, settings.metric), default=None)
        fixed.append([choice for choice in options if choice not in either or choice is best])
    return fixed


def _tier(options: list[Choice], attention: StrategyName) -> LayerPlan:
    base = options[0].plan
    if attention == "full" or base.attention == OTHER:
        return base
    if attention != SLIDING:
        return LayerPlan(layer=base.layer, attention=attention)
    # With or without a sink, whichever loses less. A layer that slides in the base has no window to choose.
    sliding = [choice for choice in options if choice.plan.attention == SLIDING and not choice.plan.full_kv_heads]
    return min(sliding, key=lambda choice: choice.loss).plan if sliding else base


def _solve(
    table: list[list[Choice]], limits: Budget, settings: Plan, exceed: Exceed = "nothing"
) -> tuple[float, list[Choice]] | None:
    """Return the best choices and their quality loss, or None if no plan is within the limits.

    `exceed`: the kind of limits that may be exceeded. Then minimize the largest excess, as a fraction of the base or of
    the limit, and return it instead of the loss.
    """
    if exceed == "nothing":
        # Padding needs the larger program; mostly the best plan without it has none.
        found = _program(table, replace(limits, padding=False), settings, exceed)
        if found is None or limits.met(merged(found[1])):
            return found
    return _program(table, limits, settings, exceed)


def _program(
    table: list[list[Choice]], limits: Budget, settings: Plan, exceed: Exceed
) -> tuple[float, list[Choice]] | None:
    """Solve the integer program of `_solve` by HiGHS.

    Variables: a binary one for each choice, one for each pair of counts (full, windowed), because padding depends on
    both, and the excess.
    """
    flat = [choice for options in table for choice in options]
    plans = [choice.plan for choice in flat]
    module = module_heads(limits.model.kv_heads, plans)
    limits = replace(limits, module=module, window=window_of(plans) or limits.window)
    pairs = _pairs(limits, module, exceed)
    rows, bounds, of_costs = _limits(flat, pairs, module, limits, settings)
    slack = np.zeros(len(rows)) if exceed == "nothing" else np.where(of_costs == (exceed == "costs"), -1.0, 0.0)
    if exceed == "costs":
        bounds = np.where(of_costs, bounds, np.inf)
    equal, right = _equalities(table, pairs, module, limits)
    losses = np.array([choice.loss for choice in flat])
    # HiGHS' tolerances are absolute, 1e-6: losses of that size would all be the same to it.
    unit = float(np.median(np.abs(losses[losses != 0]))) if losses.any() else 1.0
    losses, others = losses / unit, np.zeros(len(pairs) + 1)
    if exceed != "nothing":
        losses, others[-1], unit = np.zeros(len(flat)), 1.0, 1.0
    solution = milp(
        np.append(losses, others),
        constraints=[
            LinearConstraint(np.hstack([equal, np.zeros((len(equal), 1))]), right, right),
            LinearConstraint(np.hstack([rows, slack[:, None]]), -np.inf, bounds),
        ],
        integrality=np.append(np.ones(equal.shape[1]), 0),
        bounds=Bounds(0, np.append(np.ones(equal.shape[1]), np.inf)),
    )
    if solution.x is None:
        return None
    return float(solution.fun) * unit, [choice for choice, taken in zip(flat, solution.x, strict=False) if taken > 0.5]


def _pairs(limits: Budget, module: int, exceed: Exceed) -> list[tuple[int, int]]:
    """Return the counts of full and windowed modules of `module` KV heads whose padding fits the limit on KV bytes.

    None without padding.
    """
    if not limits.padding:
        return []
    most = len(limits.model.attention_layers) * limits.model.kv_heads // module
    pairs = [(full, sliding) for full in range(most + 1) for sliding in range(most + 1 - full)]
    least = 1 / most  # of a full module; the program counts what windowed ones hold
    limit = limits.fractions.get(KV_BYTES, 1.0)
    fits = [pair for pair in pairs if pair[0] * least + limits.padding_fraction(*pair, module) <= limit + 1e-9]
    return pairs if exceed == "costs" else fits


def _equalities(
    table: list[list[Choice]], pairs: list[tuple[int, int]], module: int, limits: Budget
) -> tuple[np.ndarray, np.ndarray]:
    """Return the equalities: one choice per layer and component, and the pair of counts that the choices make."""
    sites = [(site, choice.plan) for site, options in enumerate(table) for choice in options]
    one_each = [[site == row for site, _ in sites] + [0] * len(pairs) for row in range(len(table))]
    if not pairs:
        return np.array(one_each, float), np.ones(len(table))
    # The first sites are attention's; MLPs hold no cache.
    heads, layers = limits.model.kv_heads, limits.model.layers
    counts = [cached([plan] if site < layers else [], heads, module) for site, plan in sites]
    one_pair, made = [0] * len(sites) + [1] * len(pairs), np.hstack([np.transpose(counts), -np.transpose(pairs)])
    return np.vstack([one_each, one_pair, made]).astype(float), np.array([1.0] * (len(table) + 1) + [0.0, 0.0])


def _limits(
    flat: list[Choice], pairs: list[tuple[int, int]], module: int, limits: Budget, settings: Plan
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return one row per limit with the fraction that each choice and pair uses; the bounds; which limit costs."""
    # Each choice against the full one: the rest of a layer is counted once.
    base, full = limits.base(), limits.plan(all_full(limits.model))
    costs = [limits.added(choice.plan) for choice in flat]
    rows, bounds, of_costs = [], [], []
    for name, fraction in limits.fractions.items():
        padding = [limits.padding_fraction(*pair, module) if name == KV_BYTES else 0.0 for pair in pairs]
        rows.append([cost[name] / base[name] for cost in costs] + padding)
        bounds.append(fraction - full[name] / base[name])
        of_costs.append(True)
    for metric, most in metric_limits(settings).items():
        scale = abs(most) or 1.0
        rows.append([score_in(choice, metric) / scale for choice in flat] + [0.0] * len(pairs))
        bounds.append(most / scale)
        of_costs.append(False)
    return np.array(rows), np.array(bounds), np.array(of_costs)


def _nearest(tables: list[list[list[Choice]]], limits: Budget, settings: Plan) -> list[Choice]:
    """Return the nearest plan if none is within all limits: within the costs, or else the cheapest."""
    for exceed in ("losses", "costs"):
        solved = [plan for table in tables if (plan := _solve(table, limits, settings, exceed)) is not None]
        if solved:
            return min(solved, key=lambda plan: plan[0])[1]
    raise AssertionError("a plan without limits always exists")


def infeasible(
    limits: Budget, settings: Plan, layers: list[LayerPlan], scores: Mapping[str, float], how: str = "predicted"
) -> InfeasibleBudget:
    """Return the error that names the nearest plan and the limits it needs; `how`: scores are predicted or measured."""
    costs, limit, found, do = limits.limited(layers), [], [], []
    for name, fraction in limits.fractions.items():
        if costs[name] > fraction + 1e-9:
            limit.append(f"the {NAMES[name]} within {fraction:.1%} of the base's")
            found.append(f"{costs[name]:.1%} of the base's {NAMES[name]}")
            do.append(f"plan.{SETTINGS[name]} to {math.ceil(costs[name] * 1000) / 1000:g}")
    for metric, most in metric_limits(settings).items():
        if scores and scores[metric] > most + 1e-9:
            limit.append(f"a {how} {metric} of at most {most:g}")
            found.append(f"a {how} {metric} of {scores[metric]:.3g}")
            do.append(f"plan.max_{metric} to {math.ceil(scores[metric] * 1000) / 1000:g}")
    return InfeasibleBudget(
        f"no plan by {settings.method} keeps " + " and ".join(limit),
        found=f"the nearest ({counted(layers)}) has " + " and ".join(found),
        do=f"raise {' and '.join(do)} or more, or measure a shorter window",
    )
