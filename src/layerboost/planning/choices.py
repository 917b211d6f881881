"""What can be chosen for every layer, and the damage it is said to do: the common ground of the selection methods."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from layerboost.costs.budget import KV_BYTES, PARAMETERS, Budget
from layerboost.errors import ConfigError
from layerboost.recipe import Plan
from layerboost.schemas.plan import LayerPlan, Predicted
from layerboost.schemas.sensitivity import LayerSensitivity, Sensitivity, Variant
from layerboost.strategies import FULL, label


@dataclass(frozen=True)
class Choice:
    """One strategy of one layer: `damage` as the settings blend it, `scores` the means of every metric measured."""

    plan: LayerPlan
    damage: float
    scores: dict[str, float]


def choices(sensitivity: Sensitivity, settings: Plan, window: int) -> list[list[Choice]]:
    """Per layer: full at no damage, none, and the window with and without a sink, as far as they were measured."""
    scales = metric_scales(sensitivity, settings)
    table = []
    for entry in sensitivity.layers:
        options = [Choice(LayerPlan(layer=entry.layer, attention=FULL), 0.0, {})]
        options += [
            _choice(entry, variant, settings, scales) for variant in entry.variants if variant.window in (None, window)
        ]
        table.append(options)
    return table


def windows(sensitivity: Sensitivity, settings: Plan) -> list[int]:
    """The windows to consider: the one asked for, or every measured one, shortest first; raises ConfigError."""
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
    """The most a plan may do in a metric, where the settings say so."""
    given = {"kl": settings.max_kl, "retrieval": settings.max_retrieval}
    return {metric: most for metric, most in given.items() if most is not None}


def score_in(choice: Choice, metric: str) -> float:
    """What a choice does in one metric; raises ConfigError when that was not measured."""
    if not choice.plan.changed:
        return 0.0
    return _measured(choice.plan.layer, choice.plan.attention, choice.scores, metric)


def best_sliding(options: list[Choice]) -> LayerPlan:
    """The window with or without a sink, whichever does less damage; full where it slides in the base already."""
    sliding = [choice for choice in options if choice.plan.attention == "sliding"]
    return min(sliding, key=lambda choice: choice.damage).plan if sliding else options[0].plan


def removal(entry: LayerSensitivity, metric: str) -> float:
    """What removing a layer's attention does in one metric; raises ConfigError where that was not measured."""
    return mean_score(entry, variant_of(entry, LayerPlan(layer=entry.layer, attention="none")), metric)


def variant_of(entry: LayerSensitivity, plan: LayerPlan) -> Variant:
    """The measurement of one strategy; raises ConfigError without one."""
    for variant in entry.variants:
        if variant.plan(entry.layer) == plan:
            return variant
    raise ConfigError(
        f"layer {entry.layer} was not measured as {label(plan)}",
        do="measure again with it in measure.windows",
    )


def mean_score(entry: LayerSensitivity, variant: Variant, metric: str) -> float:
    """One metric of one measurement; raises ConfigError when it was not measured."""
    return _measured(
        entry.layer, variant.attention, {name: score.mean for name, score in variant.scores.items()}, metric
    )


def _measured(layer: int, attention: str, scores: dict[str, float], metric: str) -> float:
    if metric not in scores:
        raise ConfigError(
            f"the sensitivities have no {metric}",
            found=f"layer {layer}, {attention}: {', '.join(scores)}",
            do=f"measure {metric} with `layerboost measure`, or plan by another metric",
        )
    return scores[metric]


def metric_scales(sensitivity: Sensitivity, settings: Plan) -> dict[str, float]:
    """The weight of each metric that the settings blend.

    One metric counts as it is. With a share of retrieval, each is divided by its mean magnitude over all layers and
    replacements, so that shares weigh damages and not units.
    """
    if not settings.retrieval_weight:
        return {settings.metric: 1.0}
    if settings.retrieval_weight == 1:
        return {"retrieval": 1.0}
    weights: dict[str, float] = {settings.metric: 1 - settings.retrieval_weight}
    weights["retrieval"] = weights.get("retrieval", 0.0) + settings.retrieval_weight
    for metric in weights:
        values = [abs(mean_score(entry, variant, metric)) for entry in sensitivity.layers for variant in entry.variants]
        weights[metric] /= (sum(values) / len(values)) or 1.0
    return weights


def blended(scores: Mapping[str, float], scales: Mapping[str, float]) -> float:
    """The damage that the scales of `metric_scales` make of a layer's or a plan's scores.

    In a blend a score better than the base's counts as no damage, not as a gain. Small gains of many layers add up to
    more than the base leaves to gain, and what the base does is what is asked for: neither shall pay for damage in the
    other metric.
    """
    if len(scales) == 1:
        return sum(scale * scores[metric] for metric, scale in scales.items())
    return sum(scale * max(scores[metric], 0.0) for metric, scale in scales.items())


def predict(sensitivity: Sensitivity, layers: Sequence[LayerPlan], settings: Plan) -> Predicted:
    """What the single-layer scores add up to, and the costs. The whole plan's damage is larger: scores interact."""
    chosen = [variant_of(sensitivity.layers[entry.layer], entry).scores for entry in layers if entry.changed]
    metrics = set.intersection(*(set(scores) for scores in chosen)) if chosen else set()
    first = next(iter(chosen), {})
    budget = Budget.of(sensitivity, settings)
    costs, share = budget.plan(layers), budget.share(layers)
    return Predicted(
        damage={metric: sum(scores[metric].mean for scores in chosen) for metric in first if metric in metrics},
        kv_fraction=share[KV_BYTES],
        kv_bytes_per_request=round(costs[KV_BYTES]),
        parameter_fraction=share[PARAMETERS],
        context_tokens=settings.context_tokens,
        concurrency=settings.concurrency if budget.rates else None,
        decode_ms=costs.get("decode_ms"),
        decode_fraction=share.get("decode_ms"),
    )


def _choice(entry: LayerSensitivity, variant: Variant, settings: Plan, scales: dict[str, float]) -> Choice:
    damage = blended({metric: mean_score(entry, variant, metric) for metric in scales}, scales)
    return Choice(variant.plan(entry.layer), damage, {metric: score.mean for metric, score in variant.scores.items()})
