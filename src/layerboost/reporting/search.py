"""The search panel: damage against cost with the chosen plan on it, and how stable the ranking of layers is."""

from __future__ import annotations

from typing import Any

from layerboost.artifacts import PlanFile
from layerboost.reporting.figures import layout
from layerboost.reporting.page import Chart, Panel, Table
from layerboost.reporting.sources import Sources, absent
from layerboost.reporting.text import ABSENT, number, percent, strategy
from layerboost.search.frontier import Frontier, FrontierPoint
from layerboost.search.stability import Stability


def search_panel(sources: Sources) -> Panel:
    """The frontier and the stability of the sensitivities; each is made by a command of its own."""
    missing, notes, charts, tables, warnings = [], [], [], [], []
    if sources.frontier is None:
        missing.append(absent("frontier.json"))
    else:
        metric = _metric(sources.frontier)
        notes.append(
            f"Predicted {metric} of the best plan by {sources.frontier.settings['method']} at every budget; the sum of "
            "single-layer scores, which the whole plan's damage exceeds."
        )
        charts.append(
            Chart("chart-frontier", "Damage against cost", frontier_figure(sources.frontier, sources.plan, metric))
        )
        header, *rows = frontier_rows(sources.frontier)
        tables.append(Table("Plans of every budget", header, rows, text_columns=(), folded=True))
    if sources.stability is None:
        missing.append(absent("stability.json"))
    else:
        header, *rows = stability_rows(sources.stability)
        notes.append("Stability: Spearman's rank correlation over layers, 95 % bootstrap interval over layers.")
        tables.append(Table("Stability", header, rows, text_columns=(0, 1, 2), folded=len(rows) > 20))
        if sources.sensitivity_hash not in (None, sources.stability.sensitivity):
            warnings.append("sensitivity.json changed after stability.json was made: compare again")
    if sources.frontier and sources.sensitivity_hash not in (None, sources.frontier.sensitivity):
        warnings.append("sensitivity.json changed after frontier.json was made: run `layerboost plan --frontier` again")
    if sources.frontier and sources.frontier.points and sources.plan and sources.plan.foretold:
        here, there = sources.plan.foretold.context_tokens, _context_tokens(sources.frontier)
        if here != there:
            warnings.append(
                f"plan.yaml is for {here:,} tokens, frontier.json for {there:,}, so the chart leaves the plan out: run "
                "`layerboost plan --frontier` again"
            )
    files = ["frontier.json", "stability.json"]
    return Panel("search", "Search", files, missing, warnings, notes=notes, charts=charts, tables=tables)


def frontier_figure(frontier: Frontier, plan: PlanFile | None, metric: str) -> dict[str, Any]:
    """Predicted damage against the KV cache's share of the base's; the plan of the run as a diamond."""
    # A plan that changes nothing has no damage to name.
    points = [point for point in frontier.points if metric in point.predicted.damage or not point.predicted.damage]
    context = _context_tokens(frontier)
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": f"best by {frontier.settings['method']}",
            "x": [100 * point.predicted.kv_fraction for point in points],
            "y": [point.predicted.damage.get(metric, 0.0) for point in points],
            "line": {"color": "var(--sliding)", "width": 2},
            "marker": {"color": "var(--sliding)", "size": 6},
            "customdata": [_counts(point) for point in points],
            "hovertemplate": "%{x:.1f} % of the KV cache, " + metric + " %{y:.3g}<br>%{customdata}<extra></extra>",
        }
    ]
    if plan and plan.foretold and metric in plan.foretold.damage and plan.foretold.context_tokens == context:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "plan.yaml",
                "x": [100 * plan.foretold.kv_fraction],
                "y": [plan.foretold.damage[metric]],
                "marker": {"color": "var(--healed)", "size": 12, "symbol": "diamond"},
                "hovertemplate": "plan.yaml: %{x:.1f} %, " + metric + " %{y:.3g}<extra></extra>",
            }
        )
    title = f"KV cache at {context:,} tokens, % of the base"
    return {"data": traces, "layout": layout(title, f"predicted {metric}")}


def frontier_rows(frontier: Frontier) -> list[list[str]]:
    """Header and a row a plan: cost, counts, window, predicted damage in every metric."""
    first = frontier.points[0].predicted
    metrics = list(first.damage)
    timed = first.decode_ms is not None
    header = ["KV of base", "full", "sliding", "none", "window", *(["decode, ms"] if timed else []), *metrics]
    rows = []
    for point in frontier.points:
        decode = [number(point.predicted.decode_ms)] if timed and point.predicted.decode_ms is not None else []
        damage = [number(point.predicted.damage.get(metric, 0.0)) for metric in metrics]
        counts = [str(point.count(kind)) for kind in ("full", "sliding", "none")]
        window = str(point.window) if point.window else ABSENT
        rows.append([percent(point.predicted.kv_fraction), *counts, window, *decode, *damage])
    return [header, *rows]


def stability_rows(stability: Stability) -> list[list[str]]:
    """Header and a row a comparison, replacement and metric."""
    rows = [
        [
            comparison.other or "itself",
            strategy(entry.attention, entry.window, entry.sink),
            entry.metric if entry.metric == entry.other_metric else f"{entry.metric}, {entry.other_metric}",
            f"{entry.spearman:.2f}",
            f"{entry.low:.2f} to {entry.high:.2f}",
            str(entry.layers),
        ]
        for comparison in stability.comparisons
        for entry in comparison.agreements
    ]
    return [["compared with", "replacement", "metric", "Spearman", "95 %", "layers"], *rows]


def _metric(frontier: Frontier) -> str:
    wanted = str(frontier.settings.get("metric"))
    found = frontier.points[0].predicted.damage if frontier.points else {}
    return wanted if wanted in found else next(iter(found), wanted)


def _context_tokens(frontier: Frontier) -> int:
    return frontier.points[0].predicted.context_tokens if frontier.points else 0


def _counts(point: FrontierPoint) -> str:
    window = f", window {point.window}" if point.window else ""
    return ", ".join(f"{point.count(kind)} {kind}" for kind in ("full", "sliding", "none")) + window
