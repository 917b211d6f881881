"""The table and figure of `layerboost compare`, as one HTML page and as Markdown."""

from __future__ import annotations

from html import escape
from typing import Any

from layerboost.reporting.figures import figure, scatter
from layerboost.reporting.page import Chart, Page, Panel, Table, html_page, markdown_page
from layerboost.reporting.text import ABSENT, interval, number, percent, with_interval
from layerboost.schemas.evaluation import Change, EvalComparison, Perplexity

STAGES = {"converted": "var(--converted)", "healed": "var(--healed)"}


def compared_page(compared: dict[str, Any], quality: EvalComparison) -> tuple[str, str]:
    """HTML and Markdown of `compare/comparison.json` and the evaluation beside it."""
    notes = [
        f"Every plan's KV bytes at {compared['context_tokens']:,} tokens of context; every row was healed with "
        f"{compared['healing_tokens']:,} tokens at most and evaluated on the same tokens and items. In brackets: 95 % "
        "intervals, differences paired. «Ours leads» compares the healed models; KL is better below 0, accuracy above.",
    ]
    notes += [f"`{row}` is left out: {why}." for row, why in compared["left_out"].items()]
    charts = [Chart("chart-kl", "KL to the base", kl_figure(compared, quality))] if quality.perplexity else []
    tables = [_table(compared, quality), _lead_table(compared)]
    sources = ["comparison.json", compared["evaluation"]]
    panel = Panel("comparison", "Comparison", sources, notes=notes, charts=charts, tables=tables)
    page = Page("Plans at equal cost", "layerboost compare", [], [panel])
    return html_page(page), markdown_page(page)


def kl_figure(compared: dict[str, Any], quality: EvalComparison) -> dict[str, Any]:
    """A row a plan: KL to the base before and after healing, bars over the 95 % interval, log axis."""
    names = [row["name"] for row in compared["rows"]][::-1]
    traces = []
    for stage, color in STAGES.items():
        found = [quality.perplexity[f"{name}-{stage}"].kl for name in names]
        means, hover = (
            [kl.mean for kl in found],
            [f"{escape(n)}: {with_interval(kl, signed=False)}" for n, kl in zip(names, found, strict=True)],
        )
        ends = [(kl.low, kl.high) for kl in found]
        traces.append(scatter(stage, means, map(escape, names), color, hover, "markers", x_ends=ends))
    return figure(traces, "KL, nats per token", "", {"type": "log", "showgrid": True})


def _table(compared: dict[str, Any], quality: EvalComparison) -> Table:
    rows = []
    for row in compared["rows"]:
        counts, window = row["layers"], row["window"]
        layers = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
        layers += f"; window {window}, {row['sinks']} sinks" if window else ""
        for stage in STAGES:
            name = f"{row['name']}-{stage}"
            text = quality.perplexity.get(name)
            rows.append(
                [
                    row["name"],
                    stage,
                    layers,
                    percent(row["kv_fraction"]),
                    *_text_cells(text),
                    _points(quality.average.difference[name]) if quality.average else ABSENT,
                    *_retrieval_cells(quality, name),
                ]
            )
    header = ["plan", "model", "layers", "KV bytes", "KL, nats per token", "perplexity", "average − base, points"]
    return Table("Before and after healing", [*header, *_retrieval_header(quality)], rows, text_columns=(0, 1, 2))


def _text_cells(text: Perplexity | None) -> list[str]:
    if text is None:
        return [ABSENT, ABSENT]
    return [interval(text.kl.mean, text.kl.low, text.kl.high), number(text.perplexity, 4)]


def _retrieval_header(quality: EvalComparison) -> list[str]:
    groups = quality.retrieval.groups if quality.retrieval else []
    return [f"{group.kind} at {group.length_tokens:,}: exact, nats" for group in groups]


def _retrieval_cells(quality: EvalComparison, name: str) -> list[str]:
    groups = quality.retrieval.groups if quality.retrieval else []
    return [f"{percent(group.models[name].value, 0)}, {number(group.log_probability[name].mean)}" for group in groups]


def _lead_table(compared: dict[str, Any]) -> Table:
    rows = []
    for row in compared["rows"]:
        if row["lead"] is None:
            continue
        kl, average = (
            Change.model_validate(row["lead"][key]) if row["lead"][key] else None for key in ("kl", "average")
        )
        rows.append(
            [
                row["name"],
                interval(kl.mean, kl.low, kl.high, signed=True) if kl else ABSENT,
                ABSENT if kl is None else "ours" if kl.high < 0 else row["name"] if kl.low > 0 else "not shown",
                _points(average) if average else ABSENT,
                ABSENT if average is None else _ahead(average, row["name"]),
            ]
        )
    header = ["against", "KL, ours − it", "ahead", "average, ours − it, points", "ahead"]
    return Table("Ours leads by", header, rows, text_columns=(0, 2, 4))


def _ahead(change: Change, other: str) -> str:
    return "ours" if change.low > 0 else other if change.high < 0 else "not shown"


def _points(change: Change) -> str:
    return interval(100 * change.mean, 100 * change.low, 100 * change.high, signed=True)
