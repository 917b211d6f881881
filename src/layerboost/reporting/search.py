"""The search panel: quality loss against cost with the chosen plan, and how stable the ranking of layers is."""

from __future__ import annotations

from layerboost.reporting.figures import Figure, figure, scatter
from layerboost.reporting.page import Panel, Table
from layerboost.reporting.sources import Sources
from layerboost.reporting.text import ABSENT, number, percent
from layerboost.schemas.plan import AXES, Frontier, FrontierPoint, PlanFile, counted, counts
from layerboost.schemas.sensitivity import Stability
from layerboost.strategies import STRATEGIES


def search_panel(sources: Sources) -> Panel:
    """Return the frontier and the stability of the sensitivities; each is made by a command of its own."""
    panel = sources.panel("search", "Search", "frontier.json", "stability.json")
    frontier, stability, made_from = sources.frontier, sources.stability, sources.sensitivity_hash
    if frontier:
        metric = _metric(frontier)
        panel.notes.append(
            f"Predicted {metric} of the best plan by {frontier.settings['method']} at every budget: the sum of "
            "single-layer scores, which is less than a whole plan loses."
        )
        panel.chart("frontier", "Quality loss against cost", frontier_figure(frontier, sources.plan, metric))
        panel.tables.append(frontier_table(frontier))
        again = "run `layerboost plan --frontier` again"
        if made_from not in (None, frontier.sensitivity):
            panel.warnings.append(f"sensitivity.json changed after frontier.json was made: {again}")
        if sources.plan and sources.plan.valid_prediction:
            here, there = sources.plan.valid_prediction.context_tokens, frontier.points[0].predicted.context_tokens
            if here != there:
                contexts = f"plan.yaml is for {here:,} tokens, frontier.json for {there:,}"
                panel.warnings.append(f"{contexts}, so the chart does not show the plan: {again}")
    if stability:
        panel.notes.append("Stability: Spearman's rank correlation over layers, 95 % bootstrap interval over layers.")
        panel.tables.append(stability_table(stability))
        if made_from not in (None, stability.sensitivity):
            panel.warnings.append("sensitivity.json changed after stability.json was made: compare again")
    return panel


def frontier_figure(frontier: Frontier, plan: PlanFile | None, metric: str) -> Figure:
    """Return the predicted loss against the KV cache or the parameters as a fraction of the base's; the run's plan is a
    diamond."""
    # A plan that changes nothing has no metrics, and loses nothing.
    losses = [point.predicted.quality_loss for point in frontier.points]
    points = [point for point, loss in zip(frontier.points, losses, strict=True) if metric in loss or not loss]
    context, axis = frontier.points[0].predicted.context_tokens, frontier.axis
    traces = [
        scatter(
            f"best by {frontier.settings['method']}",
            [100 * getattr(point.predicted, axis) for point in points],
            [point.predicted.quality_loss.get(metric, 0.0) for point in points],
            "var(--sliding)",
            marker={"color": "var(--sliding)", "size": 6},
            text=[counted(point.layers) for point in points],
        )
    ]
    prediction = plan.valid_prediction if plan else None
    if prediction and metric in prediction.quality_loss and prediction.context_tokens == context:
        at = [100 * getattr(prediction, axis)], [prediction.quality_loss[metric]]
        marker = {"color": "var(--healed)", "size": 12, "symbol": "diamond"}
        traces.append(scatter("plan.yaml", *at, "var(--healed)", "markers", marker=marker))
    of_context = f" at {context:,} tokens" if axis == "kv_fraction" else ""
    return figure(traces, f"{AXES[axis]}{of_context}, % of the base", f"predicted {metric}")


def frontier_table(frontier: Frontier) -> Table:
    """Return a row per plan: cost, counts, window, predicted loss in every metric."""
    metrics = list(frontier.points[0].predicted.quality_loss)
    timed = frontier.points[0].predicted.decode_ms is not None
    taken = {name for point in frontier.points for name in counts(point.layers)}
    strategies = [name for name in STRATEGIES if name in taken]
    thinned = any(entry.mlp_changed for point in frontier.points for entry in point.layers)

    def cells(point: FrontierPoint) -> list[str]:
        predicted = point.predicted
        found = counts(point.layers)
        by_strategy = [str(found.get(name, 0)) for name in strategies]
        decode = [number(predicted.decode_ms)] if timed else []
        loss = [number(predicted.quality_loss.get(metric, 0.0)) for metric in metrics]
        mlps = sum(entry.mlp_changed for entry in point.layers)
        of_mlps = [str(mlps), percent(predicted.parameter_fraction)] if thinned else []
        return [percent(predicted.kv_fraction), *by_strategy, str(point.window or ABSENT), *of_mlps, *decode, *loss]

    of_mlps = ["changed MLPs", "parameters of base"] if thinned else []
    header = ["KV of base", *strategies, "window", *of_mlps, *(["decode, ms"] if timed else []), *metrics]
    return Table("Plans of every budget", header, [cells(point) for point in frontier.points], (), folded=True)


def stability_table(stability: Stability) -> Table:
    """Return a row per comparison, replacement and metric."""
    header = ["compared with", "replacement", "metric", "Spearman", "95 %", "layers or KV heads"]
    rows = [
        [
            comparison.other or "itself",
            entry.label + " of KV heads" * entry.kv_heads,
            ", ".join(dict.fromkeys((entry.metric, entry.other_metric))),
            f"{entry.spearman:.2f}",
            f"{entry.low:.2f} to {entry.high:.2f}",
            str(entry.layers),
        ]
        for comparison in stability.comparisons
        for entry in comparison.agreements
    ]
    return Table("Stability", header, rows, text_columns=(0, 1, 2), folded=len(rows) > 20)


def _metric(frontier: Frontier) -> str:
    wanted, losses = str(frontier.settings["metric"]), frontier.points[0].predicted.quality_loss
    return wanted if wanted in losses else next(iter(losses), wanted)
