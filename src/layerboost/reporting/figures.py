"""The report's charts as plotly figures; colours are names of CSS variables, which page.js replaces."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import fmean
from typing import Any

from layerboost.reporting.sources import MODELS
from layerboost.schemas.healing import MetricLine
from layerboost.schemas.plan import PlanFile
from layerboost.schemas.sensitivity import Sensitivity, Variant
from layerboost.strategies import FULL, STRATEGIES

Trace = dict[str, Any]
Figure = dict[str, Any]
# The low and the high end of each point's bar.
Ends = Sequence[tuple[float, float]]

# The metrics that plans are made by: title and axis of their charts.
SENSITIVITIES = {
    "kl": ("Sensitivity of each layer", "KL, nats per token"),
    "retrieval": ("Sensitivity in retrieval", "nats lost on an answer"),
    "benchmark": ("Sensitivity in tasks", "accuracy lost"),
}
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "pentagon", "hexagon")
OTHERS = ("var(--extra)", "var(--extra-2)", "var(--extra-3)")


def figure(
    traces: list[Trace], x_title: str, y_title: str, x: dict[str, Any] | None = None, y: dict[str, Any] | None = None
) -> Figure:
    """Return a figure without a box, with faint horizontal lines and the legend above; `x`, `y`: more axis settings."""
    axis = {"gridcolor": "var(--rule)", "linecolor": "var(--rule)", "zeroline": False, "automargin": True}
    axis["hoverformat"] = ",.4~g"
    ticks = {"showgrid": False, "ticks": "outside", "tickcolor": "var(--rule)"}
    font = {"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 12.5, "color": "var(--ink)"}
    layout = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": font,
        "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"bgcolor": "var(--page)", "bordercolor": "var(--rule)", "font": {"color": "var(--ink)"}},
        "xaxis": {**axis, "title": {"text": x_title}, **ticks, **(x or {})},
        "yaxis": {**axis, "title": {"text": y_title}, **(y or {})},
    }
    return {"data": traces, "layout": layout}


def scatter(
    name: str,
    x: Iterable[Any],
    y: Iterable[Any],
    color: str,
    mode: str = "lines+markers",
    x_ends: Ends | None = None,
    y_ends: Ends | None = None,
    **more: Any,
) -> Trace:
    """Return points of one colour.

    `x_ends`, `y_ends`: the low and high end of each point's bar. `more`: further keys of plotly's trace, which override
    those here.
    """
    points = {"x": list(x), "y": list(y)}
    trace = {
        "type": "scatter",
        "mode": mode,
        "name": escape(name),  # plotly reads tags in names
        **points,
        "line": {"color": color, "width": 2},
        "marker": {"color": color, "size": 8},
    }
    for axis, ends in (("x", x_ends), ("y", y_ends)):
        if ends is not None:
            trace[f"error_{axis}"] = {
                "type": "data",
                "array": [high - value for value, (_, high) in zip(points[axis], ends, strict=True)],
                "arrayminus": [value - low for value, (low, _) in zip(points[axis], ends, strict=True)],
                "color": color,
                "thickness": 1.5,
                "width": 4 if mode.startswith("lines") else 0,
            }
    return {**trace, **more}


def sensitivity_figure(sensitivity: Sensitivity, plan: PlanFile | None, metric: str = "kl") -> Figure:
    """Return one metric of each layer under each replacement, bars of one standard error; the plan's choices ringed.

    KL has a log axis. With a plan, windows it does not use start hidden: a click on the legend shows them.
    """
    measured: dict[str, list[tuple[int, Variant]]] = {}
    for entry in sensitivity.layers:
        for variant in entry.variants:
            # A log axis cannot show zero; the panel says how many values it leaves out.
            if metric in variant.scores and (metric != "kl" or variant.scores["kl"].mean > 0):
                measured.setdefault(variant.label, []).append((entry.layer, variant))
    kinds = [rows[0][1] for rows in measured.values()]
    windows = sorted({kind.window for kind in kinds if kind.window})
    widths = sorted({kind.mlp_width for kind in kinds if kind.mlp_width}, reverse=True)
    traces = {}
    for index, ((name, rows), kind) in enumerate(zip(measured.items(), kinds, strict=True)):
        offset = 0.5 * ((index + 0.5) / len(kinds) - 0.5)
        scores = [variant.scores[metric] for _, variant in rows]
        color, symbol = _mark(kind, windows, widths)
        traces[name] = scatter(
            name,
            [layer + offset for layer, _ in rows],
            [score.mean for score in scores],
            color,
            "markers",
            y_ends=[(score.mean - score.standard_error, score.mean + score.standard_error) for score in scores],
            marker={"color": color, "symbol": symbol, "size": 7},
            visible="legendonly" if plan and plan.window and kind.window not in (None, plan.window) else True,
        )
    log = {"type": "log", "dtick": 1, "exponentformat": "power"}
    y = log if metric == "kl" else {"zeroline": True, "zerolinecolor": "var(--soft)"}
    chosen = [_chosen(traces, plan)] if plan and any(entry.changed for entry in plan.layers) else []
    x = {"range": [-0.7, sensitivity.model.layers - 0.3], "hoverformat": ".0f"}
    return figure([*traces.values(), *chosen], "layer", SENSITIVITIES[metric][1], x, y)


def healing_figure(lines: list[MetricLine]) -> Figure:
    """Return the loss of one healing stage against its tokens, with the validation KL where it was measured."""
    training = [(line.tokens, line.loss) for line in lines if line.loss is not None]
    validation = [(line.tokens, line.validation_kl) for line in lines if line.validation_kl is not None]
    losses = [loss for _, loss in training]
    half = len(losses) // 40
    # Each value's mean with its neighbours on both sides, fewer at the ends.
    smooth = [fmean(losses[max(0, index - half) : index + half + 1]) for index in range(len(losses))]
    x, color = [tokens for tokens, _ in training], "var(--healed)"
    mode = "lines" if len(losses) > 1 else "markers"
    faint: dict[str, Any] = {"line": {"color": color, "width": 1}, "opacity": 0.4 if smooth != losses else 1.0}
    traces = [scatter("training loss", x, losses, color, mode, **faint)]
    if smooth != losses:
        traces.append(scatter(f"mean over {2 * half + 1} lines", x, smooth, color, mode))
    if validation:
        at, values = [tokens for tokens, _ in validation], [kl for _, kl in validation]
        marker = {"color": "var(--converted)", "size": 9, "symbol": "diamond"}
        traces.append(scatter("validation KL", at, values, "var(--converted)", "markers", marker=marker))
    # The loss of stage 1 has another unit than the validation KL in the same chart.
    local = any(line.stage == "attention" and line.loss is not None for line in lines)
    title = "normalised MSE of all layers (KL: nats per token)" if local else "nats per token" if validation else "loss"
    values = [value for _, value in (*training, *validation)]
    wide = values and min(values) > 0 and max(values) > 20 * min(values)
    return figure(traces, "tokens", title, y={"type": "log", "dtick": "D2", "tickformat": "~g"} if wide else None)


def model_color(name: str, among: Iterable[str]) -> str:
    """Return a model's colour in charts of `among`: three have their own, the others cycle through OTHERS."""
    if name in MODELS:
        return f"var(--{name})"
    return OTHERS[sorted(set(among) - set(MODELS)).index(name) % len(OTHERS)]


def _mark(kind: Variant, windows: list[int], widths: list[int]) -> tuple[str, str]:
    """Return the colour and symbol of a replacement."""
    if kind.mlp != FULL:
        return "var(--thin)", SYMBOLS[widths.index(kind.mlp_width) % len(SYMBOLS)] if kind.mlp_width else "x"
    color = f"var(--{kind.attention})"
    if kind.window is None:
        return color, "x"
    rank = windows.index(kind.window)
    if shade := rank % len(STRATEGIES[kind.attention].shades):
        color = f"var(--{kind.attention}-{shade + 1})"
    return color, SYMBOLS[rank % len(SYMBOLS)] + ("" if kind.sink else "-open")


def _chosen(traces: Mapping[str, Trace], plan: PlanFile) -> Trace:
    """Return rings around the plan's choices, if they were measured."""
    points = [
        (x, y)
        for entry in plan.layers
        for site in entry.sites() or [entry]
        if (trace := traces.get(site.label))
        for x, y in zip(trace["x"], trace["y"], strict=True)
        if round(x) == entry.layer
    ]
    marker = {"symbol": "circle-open", "size": 14, "color": "var(--ink)", "line": {"width": 1.5}}
    x, y = [x for x, _ in points], [y for _, y in points]
    return scatter("chosen by the plan", x, y, "var(--ink)", "markers", marker=marker, hoverinfo="skip")
