"""The search panel: damage against cost with the chosen plan on it, and how stable the ranking of layers is."""

from __future__ import annotations

from layerboost.reporting.figures import Figure, figure, scatter
from layerboost.reporting.page import Chart, Panel, Table, tabulate
from layerboost.reporting.sources import Sources, absent
from layerboost.reporting.text import ABSENT, number, percent
from layerboost.schemas.plan import Frontier, FrontierPoint, PlanFile, Predicted, counted, counts
from layerboost.schemas.sensitivity import Agreement, Comparison, Stability
from layerboost.strategies import STRATEGIES, label


def search_panel(sources: Sources) -> Panel:
    """Return the frontier and the stability of the sensitivities; each is made by a command of its own."""
    missing, notes, charts, tables, warnings = [], [], [], [], []
    frontier, stability, made_from = sources.frontier, sources.stability, sources.sensitivity_hash
    if frontier is None:
        missing.append(absent("frontier.json"))
    else:
        metric = _metric(frontier)
        notes.append(
            f"Predicted {metric} of the best plan by {frontier.settings['method']} at every budget; the sum of "
            "single-layer scores, which the whole plan's damage exceeds."
        )
        charts.append(Chart("chart-frontier", "Damage against cost", frontier_figure(frontier, sources.plan, metric)))
        tables.append(frontier_table(frontier))
    if stability is None:
        missing.append(absent("stability.json"))
    else:
        notes.append("Stability: Spearman's rank correlation over layers, 95 % bootstrap interval over layers.")
        tables.append(stability_table(stability))
        if made_from not in (None, stability.sensitivity):
            warnings.append("sensitivity.json changed after stability.json was made: compare again")
    if frontier and made_from not in (None, frontier.sensitivity):
        warnings.append("sensitivity.json changed after frontier.json was made: run `layerboost plan --frontier` again")
    if frontier and frontier.points and sources.plan and sources.plan.valid_prediction:
        here, there = sources.plan.valid_prediction.context_tokens, _context_tokens(frontier)
        if here != there:
            warnings.append(
                f"plan.yaml is for {here:,} tokens, frontier.json for {there:,}, so the chart leaves the plan out: run "
                "`layerboost plan --frontier` again"
            )
    files = ["frontier.json", "stability.json"]
    return Panel("search", "Search", files, missing, warnings, notes=notes, charts=charts, tables=tables)


def frontier_figure(frontier: Frontier, plan: PlanFile | None, metric: str) -> Figure:
    """Return predicted damage against the KV cache's share of the base's; the plan of the run as a diamond."""
    # A plan that changes nothing has no damage to name.
    points = [point for point in frontier.points if metric in point.predicted.damage or not point.predicted.damage]
    context = _context_tokens(frontier)
    traces = [
        scatter(
            f"best by {frontier.settings['method']}",
            [100 * point.predicted.kv_fraction for point in points],
            [point.predicted.damage.get(metric, 0.0) for point in points],
            "var(--sliding)",
            [_hover(point.predicted, metric, _counts(point)) for point in points],
            marker={"color": "var(--sliding)", "size": 6},
        )
    ]
    found = plan.valid_prediction if plan else None
    if found and metric in found.damage and found.context_tokens == context:
        at, hover = ([100 * found.kv_fraction], [found.damage[metric]]), [_hover(found, metric)]
        marker = {"color": "var(--healed)", "size": 12, "symbol": "diamond"}
        traces.append(scatter("plan.yaml", *at, "var(--healed)", hover, "markers", marker=marker))
    return figure(traces, f"KV cache at {context:,} tokens, % of the base", f"predicted {metric}")


def frontier_table(frontier: Frontier) -> Table:
    """Return a row per plan: cost, counts, window, predicted damage in every metric."""
    metrics = list(frontier.points[0].predicted.damage)
    timed = frontier.points[0].predicted.decode_ms is not None

    def cells(point: FrontierPoint) -> list[str]:
        found = point.predicted
        by_strategy = [str(count) for count in counts(point.layers).values()]
        decode = [number(found.decode_ms)] if timed and found.decode_ms is not None else []
        damage = [number(found.damage.get(metric, 0.0)) for metric in metrics]
        return [percent(found.kv_fraction), *by_strategy, str(point.window or ABSENT), *decode, *damage]

    header = ["KV of base", *STRATEGIES, "window", *(["decode, ms"] if timed else []), *metrics]
    return Table("Plans of every budget", header, [cells(point) for point in frontier.points], (), folded=True)


def stability_table(stability: Stability) -> Table:
    """Return a row per comparison, replacement and metric."""
    Row = tuple[Comparison, Agreement]
    rows: list[Row] = [(found, entry) for found in stability.comparisons for entry in found.agreements]
    return tabulate(
        "Stability",
        rows,
        {
            "compared with": lambda row: row[0].other or "itself",
            "replacement": lambda row: label(row[1]) + " of KV heads" * row[1].kv_heads,
            "metric": lambda row: ", ".join(dict.fromkeys((row[1].metric, row[1].other_metric))),
            "Spearman": lambda row: f"{row[1].spearman:.2f}",
            "95 %": lambda row: f"{row[1].low:.2f} to {row[1].high:.2f}",
            "layers or KV heads": lambda row: str(row[1].layers),
        },
        text_columns=(0, 1, 2),
        folded=len(rows) > 20,
    )


def _hover(predicted: Predicted, metric: str, counts: str = "") -> str:
    cost = f"{percent(predicted.kv_fraction)} of the KV cache, {metric} {number(predicted.damage.get(metric, 0.0))}"
    return f"{cost}<br>{counts}" if counts else cost


def _metric(frontier: Frontier) -> str:
    wanted = str(frontier.settings.get("metric"))
    found = frontier.points[0].predicted.damage if frontier.points else {}
    return wanted if wanted in found else next(iter(found), wanted)


def _context_tokens(frontier: Frontier) -> int:
    return frontier.points[0].predicted.context_tokens if frontier.points else 0


def _counts(point: FrontierPoint) -> str:
    window = f", window {point.window}" if point.window else ""
    return counted(point.layers) + window
