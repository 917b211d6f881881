"""The choices for every layer and their predicted quality loss, which all selection methods use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from layerboost.costs.budget import KV_BYTES, PARAMETERS, Budget
from layerboost.errors import ConfigError
from layerboost.recipe import Plan
from layerboost.schemas.plan import LayerPlan, Predicted, all_full
from layerboost.schemas.sensitivity import LayerSensitivity, Sensitivity, Variant
from layerboost.strategies import FULL, FULL_KV_HEADS, ComponentName

COMPONENTS: tuple[ComponentName, ...] = ("attention", "mlp")


@dataclass(frozen=True)
class Choice:
    """One strategy of a layer's attention or MLP: `loss`, its quality loss as the settings blend it, and the mean of
    every metric."""

    plan: LayerPlan
    loss: float
    scores: dict[str, float]


def choices(sensitivity: Sensitivity, settings: Plan, window: int) -> list[list[Choice]]:
    """Return the choices of each layer's attention, then those of each layer's MLP if they were measured.

    The first is the base's own, without loss; then every replacement of the settings' components that was measured with
    this window or without one, and with a sink only if the settings have sinks. Raise ConfigError if MLPs are named
    there and were not measured.

    With `plan.unit` kv_head, also the window on the KV heads that lose least by it, for each number of them.
    """
    scales, components = metric_scales(sensitivity, settings), settings.components or COMPONENTS
    table, mlps = [], []
    for entry, base in zip(sensitivity.layers, all_full(sensitivity.model), strict=True):
        able = [each for each in entry.variants if each.window in (None, window) and (settings.sinks or not each.sink)]
        options = [_choice(entry, variant, scales) for variant in able]
        # Measured in a layer that is full, also where a hybrid's layer has no attention.
        of_mlp = [replace(each, plan=base.with_site(each.plan)) for each in options if each.plan.mlp_changed]
        attention = [choice for choice in options if not choice.plan.mlp_changed]
        if settings.unit == "kv_head":
            attention += _mixed(entry, window, settings, scales)
        full = Choice(base, 0.0, {})
        table.append([full, *attention] if "attention" in components else [full])
        if settings.components and "mlp" in components:
            variant_of(entry, LayerPlan(layer=entry.layer, attention=FULL, mlp="none"))
        mlps += [[full, *of_mlp]] if of_mlp and "mlp" in components else []
    return table + mlps


def merged(chosen: Sequence[Choice]) -> list[LayerPlan]:
    """Return the plan of one choice per layer's attention and, if they were measured, per layer's MLP."""
    plans: dict[int, LayerPlan] = {}
    for choice in chosen:
        before = plans.setdefault(choice.plan.layer, choice.plan)
        if choice.plan.mlp_changed:
            plans[choice.plan.layer] = before.with_site(choice.plan)
    return [plans[layer] for layer in sorted(plans)]


def windows(sensitivity: Sensitivity, settings: Plan) -> list[int]:
    """Return the windows to consider: `plan.window`, or all measured ones, shortest first; raise ConfigError."""
    variants = [variant for entry in sensitivity.layers for variant in entry.variants]
    measured = sorted({variant.window for variant in variants if variant.window})
    if not measured and sensitivity.model.sliding_window:  # every layer slides in the base: none or as it is
        return [sensitivity.model.sliding_window]
    if settings.window is None:
        return measured
    if settings.window not in measured:
        raise ConfigError(
            f"window {settings.window} was not measured",
            found=f"measured windows: {', '.join(map(str, measured))}",
            do="choose one of them, or add it to measure.windows and measure again",
        )
    return [settings.window]


def metric_limits(settings: Plan) -> dict[str, float]:
    """Return the settings' limits on the quality loss, by metric."""
    given = {"kl": settings.max_kl, "retrieval": settings.max_retrieval}
    return {metric: most for metric, most in given.items() if most is not None}


def score_in(choice: Choice, metric: str) -> float:
    """Return the quality loss of a choice in one metric; raise ConfigError if it was not measured."""
    if not choice.plan.changed:
        return 0.0
    return _measured(choice.plan.layer, choice.plan.label, choice.scores, metric)


def variant_of(entry: LayerSensitivity, plan: LayerPlan) -> Variant:
    """Return the measurement of one strategy; raise ConfigError if there is none."""
    for variant in (*entry.variants, *entry.heads):
        if variant.plan(entry.layer) == plan:
            return variant
    raise ConfigError(
        f"layer {entry.layer} was not measured as {plan.label}",
        do="measure again with it in measure.windows"
        if plan.attention_changed
        else "measure again with mlp in measure.components, and its width in measure.mlp_widths",
    )


def score_of(entry: LayerSensitivity, plan: LayerPlan, metric: str) -> float:
    """Return the quality loss of one strategy of a layer in one metric; raise ConfigError if it was not measured."""
    return _measured(plan.layer, plan.label, variant_of(entry, plan).means, metric)


def _measured(layer: int, replacement: str, scores: dict[str, float], metric: str) -> float:
    if metric not in scores:
        raise ConfigError(
            f"the sensitivities have no {metric}",
            found=f"layer {layer}, {replacement}: {', '.join(scores)}",
            do=f"measure {metric} with `layerboost measure`, or plan by another metric",
        )
    return scores[metric]


def metric_scales(sensitivity: Sensitivity, settings: Plan) -> dict[str, float]:
    """Return the weight of each metric that the settings blend.

    One metric alone has weight 1. With `retrieval_weight`, each is divided by its mean magnitude over all layers and
    replacements, so that weights compare losses and not units.
    """
    if not settings.retrieval_weight:
        return {settings.metric: 1.0}
    if settings.retrieval_weight == 1:
        return {"retrieval": 1.0}
    weights: dict[str, float] = {settings.metric: 1 - settings.retrieval_weight}
    weights["retrieval"] = weights.get("retrieval", 0.0) + settings.retrieval_weight
    for metric in weights:
        values = [
            abs(_measured(entry.layer, variant.label, variant.means, metric))
            for entry in sensitivity.layers
            for variant in entry.variants
        ]
        weights[metric] /= (sum(values) / len(values)) or 1.0
    return weights


def blended(scores: Mapping[str, float], scales: Mapping[str, float]) -> float:
    """Return the quality loss of a layer or a plan: its scores weighted by `metric_scales`.

    In a blend a score better than the base's counts as no loss and not as a gain: small gains of many layers would add
    up to more than the base can gain, and the aim is to match the base. No gain may offset a loss in the other metric.
    """
    if len(scales) == 1:
        return sum(scale * scores[metric] for metric, scale in scales.items())
    return sum(scale * max(scores[metric], 0.0) for metric, scale in scales.items())


def predict(sensitivity: Sensitivity, layers: Sequence[LayerPlan], settings: Plan) -> Predicted:
    """Return the sum of the scores of single layers, KV heads and MLPs, and the costs. The plan itself loses more:
    scores interact."""
    kv_heads = sensitivity.model.kv_heads
    sites = [site for entry in layers for site in entry.sites()]
    chosen = [scores_of(sensitivity.layers[site.layer], site, kv_heads) for site in sites]
    budget = Budget.of(sensitivity, settings)
    costs, fractions = budget.plan(layers), budget.relative(layers)
    return Predicted(
        quality_loss=_sums(chosen),
        kv_fraction=fractions[KV_BYTES],
        kv_bytes_per_request=round(costs[KV_BYTES]),
        parameter_fraction=fractions[PARAMETERS],
        context_tokens=settings.context_tokens,
        concurrency=settings.concurrency if budget.rates else None,
        decode_ms=costs.get("decode_ms"),
        decode_fraction=fractions.get("decode_ms"),
    )


def scores_of(entry: LayerSensitivity, plan: LayerPlan, kv_heads: int) -> dict[str, float]:
    """Return the mean scores of one strategy of a layer: measured, or the sums over its KV heads with a window.

    Raise ConfigError if it was not measured.
    """
    windowed = set(plan.windowed(kv_heads))
    groups = [
        (set(variant.plan(entry.layer).windowed(kv_heads)), variant)
        for variant in entry.heads
        if plan.full_kv_heads and (variant.window, variant.sink) == (plan.window, plan.sink)
    ]
    inside = [(heads, variant) for heads, variant in groups if heads <= windowed]
    if inside and set.union(*(heads for heads, _ in inside)) == windowed:
        return _sums([variant.means for _, variant in inside])
    return variant_of(entry, plan).means


def _sums(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the sum of every metric that all parts have."""
    metrics = [metric for metric in parts[0] if all(metric in scores for scores in parts)] if parts else []
    return {metric: sum(scores[metric] for scores in parts) for metric in metrics}


def _mixed(entry: LayerSensitivity, window: int, settings: Plan, scales: dict[str, float]) -> list[Choice]:
    """Return the best windows on some of a layer's KV heads, from one group of heads to all but one.

    Scores add up and every head saves the same, so the best of each size are the heads that lose least.
    """
    able = [each for each in entry.heads if each.window == window and (settings.sinks or not each.sink)]
    ranked = sorted((_choice(entry, variant, scales) for variant in able), key=lambda choice: choice.loss)
    options = []
    for size in range(1, len(ranked)):
        chosen = ranked[:size]
        full = set.intersection(*(set(choice.plan.full_kv_heads) for choice in chosen))
        plan = chosen[0].plan.model_copy(update={FULL_KV_HEADS: tuple(sorted(full))})
        options.append(Choice(plan, sum(each.loss for each in chosen), _sums([each.scores for each in chosen])))
    return options


def _choice(entry: LayerSensitivity, variant: Variant, scales: dict[str, float]) -> Choice:
    scores = {metric: _measured(entry.layer, variant.label, variant.means, metric) for metric in scales}
    return Choice(variant.plan(entry.layer), blended(scores, scales), variant.means)
