"""The report's charts as plotly figures; colours are names of CSS variables, resolved by page.js."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from layerboost.artifacts import PlanFile, Sensitivity, Variant
from layerboost.healing.metrics import MetricLine
from layerboost.reporting.sources import MODELS
from layerboost.reporting.text import strategy, with_error

# The metrics that plans are made by: title and axis of their charts.
SENSITIVITIES = {
    "kl": ("Sensitivity of each layer", "KL, nats per token"),
    "retrieval": ("Sensitivity in retrieval", "nats lost on an answer"),
    "benchmark": ("Sensitivity in tasks", "accuracy lost"),
}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "hexagon")
SHADES = ("var(--sliding)", "var(--sliding-2)", "var(--sliding-3)")
OTHERS = ("var(--other)", "var(--other-2)", "var(--other-3)")


def layout(x_title: str, y_title: str) -> dict[str, Any]:
    """A plain layout: no box, faint horizontal lines, legend above."""
    axis = {"gridcolor": "var(--rule)", "linecolor": "var(--rule)", "zeroline": False, "automargin": True}
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {
            "family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif",
            "size": 12.5,
            "color": "var(--ink)",
        },
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"bgcolor": "var(--page)", "bordercolor": "var(--rule)", "font": {"color": "var(--ink)"}},
        "xaxis": {
            **axis,
            "title": {"text": x_title},
            "showgrid": False,
            "ticks": "outside",
            "tickcolor": "var(--rule)",
        },
        "yaxis": {**axis, "title": {"text": y_title}},
    }


def sensitivity_figure(sensitivity: Sensitivity, plan: PlanFile | None, metric: str = "kl") -> dict[str, Any]:
    """One metric of each layer under each replacement, bars of one standard error; the plan's choices ringed.

    KL has a log axis. With a plan, windows it does not use start hidden: a click on the legend shows them.
    """
    kinds = variant_kinds(sensitivity)
    windows = sorted({kind[1] for kind in kinds if kind[1]})
    planned = plan.window if plan else None
    hidden = [kind for kind in kinds if planned and kind[1] and kind[1] != planned]
    shown = [kind for kind in kinds if kind not in hidden]
    traces: list[dict[str, Any]] = []
    for kind in kinds:
        attention, window, sink = kind
        rank = windows.index(window) if window else 0
        color = "var(--none)" if attention == "none" else SHADES[rank % len(SHADES)]
        symbol = "x" if attention == "none" else SYMBOLS[rank % len(SYMBOLS)] + ("" if sink else "-open")
        side = hidden if kind in hidden else shown
        offset = 0.5 * ((side.index(kind) + 0.5) / len(side) - 0.5)
        found = [
            (entry.layer, variant)
            for entry in sensitivity.layers
            for variant in entry.variants
            if _kind(variant) == kind and metric in variant.scores
        ]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": strategy(*kind),
                "x": [layer + offset for layer, _ in found],
                "y": [
                    variant.scores[metric].mean if metric != "kl" else _positive(variant.scores["kl"].mean)
                    for _, variant in found
                ],
                "error_y": {
                    "type": "data",
                    "array": [variant.scores[metric].standard_error for _, variant in found],
                    "color": color,
                    "thickness": 1.2,
                    "width": 0,
                },
                "marker": {"color": color, "symbol": symbol, "size": 7},
                "customdata": [_hover(layer, variant) for layer, variant in found],
                "hovertemplate": "%{customdata}<extra></extra>",
                "visible": "legendonly" if kind in hidden else True,
            }
        )
    figure: dict[str, Any] = {"data": traces, "layout": layout("layer", SENSITIVITIES[metric][1])}
    if metric == "kl":
        figure["layout"]["yaxis"] |= {"type": "log", "dtick": 1, "exponentformat": "power"}
    else:
        figure["layout"]["yaxis"] |= {"zeroline": True, "zerolinecolor": "var(--soft)"}
    figure["layout"]["xaxis"] |= {"range": [-0.7, sensitivity.model.layers - 0.3]}
    if plan and plan.count("full") < len(plan.layers):
        traces.append(_chosen(traces, kinds, plan))
    return figure


def variant_kinds(sensitivity: Sensitivity) -> list[tuple[str, int | None, bool]]:
    """The replacements measured, as attention, window and sink: none first, then windows from short to long."""
    kinds = {_kind(variant) for entry in sensitivity.layers for variant in entry.variants}
    return sorted(kinds, key=lambda kind: (kind[0] != "none", kind[1] or 0, kind[2]))


def healing_figure(lines: list[MetricLine]) -> dict[str, Any]:
    """Loss of one healing stage against its tokens, with the validation KL where it was measured."""
    training = [line for line in lines if line.loss is not None]
    validation = [line for line in lines if line.validation_kl is not None]
    color = "var(--healed)"
    losses = [line.loss or 0.0 for line in training]
    smooth = running_mean(losses, half=len(losses) // 40)
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines" if len(losses) > 1 else "markers",
            "name": "training loss",
            "x": [line.tokens for line in training],
            "y": losses,
            "line": {"color": color, "width": 1},
            "opacity": 0.4 if smooth != losses else 1.0,
            "hovertemplate": "%{x:,} tokens: loss %{y:.4g}<extra></extra>",
        }
    ]
    if smooth != losses:
        mean = {"name": f"mean over {2 * (len(losses) // 40) + 1} lines", "y": smooth, "opacity": 1.0}
        traces.append({**traces[0], **mean, "line": {"color": color, "width": 2}})
    if validation:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "validation KL",
                "x": [line.tokens for line in validation],
                "y": [line.validation_kl for line in validation],
                "marker": {"color": "var(--converted)", "size": 9, "symbol": "diamond"},
                "hovertemplate": "%{x:,} tokens: validation KL %{y:.4g}<extra></extra>",
            }
        )
    # Stage 1's loss is of another kind than the validation KL beside it.
    local = bool(training) and training[0].stage == "attention"
    title = "normalised MSE of all layers (KL: nats per token)" if local else "nats per token" if validation else "loss"
    figure: dict[str, Any] = {"data": traces, "layout": layout("tokens", title)}
    values = [*losses, *(line.validation_kl or 0.0 for line in validation)]
    if values and min(values) > 0 and max(values) > 20 * min(values):
        figure["layout"]["yaxis"] |= {"type": "log", "dtick": "D2", "tickformat": "~g"}
    return figure


def running_mean(values: list[float], half: int) -> list[float]:
    """Each value's mean with its `half` neighbours on both sides, fewer at the ends."""
    means = []
    for index in range(len(values)):
        near = values[max(0, index - half) : index + half + 1]
        means.append(sum(near) / len(near))
    return means


def model_color(name: str, among: Iterable[str]) -> str:
    """The colour of a model in charts of `among`: base, converted and healed have their own, the others take turns."""
    if name in MODELS:
        return f"var(--{name})"
    return OTHERS[sorted(set(among) - set(MODELS)).index(name) % len(OTHERS)]


def _kind(variant: Variant) -> tuple[str, int | None, bool]:
    return (variant.attention, variant.window, variant.sink)


def _positive(value: float) -> float | None:
    # A log axis cannot show zero; the panel says how many values it leaves out.
    return value if value > 0 else None


def _hover(layer: int, variant: Variant) -> str:
    scores = "".join(f"<br>{metric} {with_error(score)}" for metric, score in variant.scores.items())
    return f"layer {layer}, {strategy(*_kind(variant))}{scores}"


def _chosen(traces: list[dict[str, Any]], kinds: list[tuple[str, int | None, bool]], plan: PlanFile) -> dict[str, Any]:
    """Rings around what the plan chose, where that was measured."""
    x, y = [], []
    for entry in plan.layers:
        kind = (entry.attention, entry.window, entry.sink)
        if kind not in kinds:
            continue
        trace = traces[kinds.index(kind)]
        for at, value in zip(trace["x"], trace["y"], strict=True):
            if round(at) == entry.layer and value is not None:
                x.append(at)
                y.append(value)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "chosen by the plan",
        "x": x,
        "y": y,
        "marker": {"symbol": "circle-open", "size": 14, "color": "var(--ink)", "line": {"width": 1.5}},
        "hoverinfo": "skip",
    }
