"""Selection: from sensitivities to one strategy a layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from layerboost.artifacts import LayerPlan, LayerSensitivity, Predicted, Sensitivity, Variant
from layerboost.errors import ConfigError, InfeasibleBudget
from layerboost.recipe import Plan
from layerboost.search.costs import base_kv_bytes, layer_kv_bytes, plan_kv_bytes


def select(sensitivity: Sensitivity, settings: Plan) -> list[LayerPlan]:
    """The plan that `settings.method` chooses; raises ConfigError or InfeasibleBudget."""
    methods: dict[str, Callable[[Sensitivity, Plan], list[LayerPlan]]] = {"budget": budget, "threshold": threshold}
    return methods[settings.method](sensitivity, settings)


def budget(sensitivity: Sensitivity, settings: Plan) -> list[LayerPlan]:
    """Least predicted damage for a fraction of the base's KV bytes; each replacement scored with itself.

    One integer program a window (one binary variable per layer and choice), the best window wins. Raises
    InfeasibleBudget, naming the nearest plan.
    """
    limit = settings.kv_fraction * base_kv_bytes(sensitivity.model, settings.context_tokens)
    metric = settings.metric
    options = [_choices(sensitivity, settings, window) for window in _windows(sensitivity, settings)]
    solved = [found for choices in options if (found := _solve(sensitivity, settings, choices, limit)) is not None]
    if not solved:
        nearest = min(
            sum(min(_cost(sensitivity, settings, entry) for entry, _ in layer) for layer in choices)
            for choices in options
        )
        least = nearest / base_kv_bytes(sensitivity.model, settings.context_tokens)
        raise InfeasibleBudget(
            f"no plan keeps the KV cache within {settings.kv_fraction:.1%} of the base's",
            found=f"the nearest holds {least:.1%}",
            do=f"set plan.kv_fraction to {least:.3f} or more, or measure a shorter window",
        )
    return min(solved, key=lambda layers: getattr(predict(sensitivity, layers, settings.context_tokens), metric))


def threshold(sensitivity: Sensitivity, settings: Plan) -> list[LayerPlan]:
    """The paper's three tiers: all layers ranked by the damage of removal alone; full, sliding, none from the top.

    The paper gives neither thresholds nor counts: `full_above` and `none_below` cut by value, `full_layers` and
    `none_layers` by count (default: a third each). A sliding layer has a sink where that measured better.
    """
    damage = {entry.layer: _damage(settings, _find(entry, "none")) for entry in sensitivity.layers}
    ranked = sorted(damage, key=lambda layer: damage[layer], reverse=True)
    third = len(ranked) // 3
    if settings.full_above is not None or settings.none_below is not None:
        high = np.inf if settings.full_above is None else settings.full_above
        low = -np.inf if settings.none_below is None else settings.none_below
        full = {layer for layer in ranked if damage[layer] > high}
        none = {layer for layer in ranked if damage[layer] < low} - full
    else:
        full_count = third if settings.full_layers is None else settings.full_layers
        none_count = third if settings.none_layers is None else settings.none_layers
        if full_count + none_count > len(ranked):
            raise ConfigError(
                "plan.full_layers and plan.none_layers exceed the layers of the model",
                found=f"{full_count} + {none_count} > {len(ranked)}",
            )
        full, none = set(ranked[:full_count]), set(ranked[len(ranked) - none_count :])
    window = _windows(sensitivity, settings)[0]
    layers = []
    for entry in sensitivity.layers:
        if entry.layer in full:
            layers.append(LayerPlan(layer=entry.layer, attention="full"))
        elif entry.layer in none:
            layers.append(LayerPlan(layer=entry.layer, attention="none"))
        else:
            best = min(_sliding(entry, window), key=lambda variant: _damage(settings, variant))
            layers.append(LayerPlan(layer=entry.layer, attention="sliding", window=window, sink=best.sink))
    return layers


def predict(sensitivity: Sensitivity, layers: Sequence[LayerPlan], context_tokens: int) -> Predicted:
    """What the single-layer scores add up to, and the KV cache. The whole plan's damage is larger: scores interact."""
    chosen = [_find(sensitivity.layers[entry.layer], *_key(entry)) for entry in layers if entry.attention != "full"]
    held = plan_kv_bytes(sensitivity.model, layers, context_tokens)
    return Predicted(
        kl=sum(variant.scores["kl"].mean for variant in chosen),
        nll=sum(variant.scores["nll"].mean for variant in chosen),
        kv_fraction=held / base_kv_bytes(sensitivity.model, context_tokens),
        kv_bytes_per_request=held,
        context_tokens=context_tokens,
    )


def _solve(
    sensitivity: Sensitivity, settings: Plan, choices: list[list[tuple[LayerPlan, float]]], limit: float
) -> list[LayerPlan] | None:
    flat = [(layer, entry, damage) for layer, options in enumerate(choices) for entry, damage in options]
    damages = np.array([damage for _, _, damage in flat])
    costs = np.array([float(_cost(sensitivity, settings, entry)) for _, entry, _ in flat])
    one_each = np.array([[float(layer == row) for layer, _, _ in flat] for row in range(len(choices))])
    scale = max(limit, 1.0)
    answer = milp(
        damages,
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs[None] / scale, -np.inf, limit / scale)],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
    )
    if answer.x is None:
        return None
    return [entry for (_, entry, _), taken in zip(flat, answer.x, strict=True) if taken > 0.5]


def _choices(sensitivity: Sensitivity, settings: Plan, window: int) -> list[list[tuple[LayerPlan, float]]]:
    """Per layer: full at no damage, none, and the window with and without a sink."""
    table = []
    for entry in sensitivity.layers:
        options = [(LayerPlan(layer=entry.layer, attention="full"), 0.0)]
        for variant in entry.variants:
            if variant.attention == "none" or variant.window == window:
                plan = LayerPlan(
                    layer=entry.layer, attention=variant.attention, window=variant.window, sink=variant.sink
                )
                options.append((plan, _damage(settings, variant)))
        table.append(options)
    return table


def _cost(sensitivity: Sensitivity, settings: Plan, entry: LayerPlan) -> int:
    return layer_kv_bytes(sensitivity.model, entry, settings.context_tokens)


def _windows(sensitivity: Sensitivity, settings: Plan) -> list[int]:
    """The windows to consider: the one asked for, or every measured one, shortest first."""
    variants = [variant for entry in sensitivity.layers for variant in entry.variants]
    measured = sorted({variant.window for variant in variants if variant.window})
    if settings.window is None:
        return measured
    if settings.window not in measured:
        raise ConfigError(
            f"window {settings.window} was not measured",
            found=f"measured windows: {', '.join(map(str, measured))}",
            do="choose one of them, or add it to measure.windows and measure again",
        )
    return [settings.window]


def _key(entry: LayerPlan) -> tuple[str, int | None, bool]:
    return entry.attention, entry.window, entry.sink


def _find(entry: LayerSensitivity, attention: str, window: int | None = None, sink: bool = False) -> Variant:
    for variant in entry.variants:
        if (variant.attention, variant.window, variant.sink) == (attention, window, sink):
            return variant
    raise ConfigError(
        f"layer {entry.layer} was not measured as {attention}"
        + (f" with window {window}, sink {sink}" if attention == "sliding" else ""),
        do="measure again with it in measure.windows",
    )


def _sliding(entry: LayerSensitivity, window: int) -> list[Variant]:
    return [variant for variant in entry.variants if variant.window == window]


def _damage(settings: Plan, variant: Variant) -> float:
    return variant.scores[settings.metric].mean
