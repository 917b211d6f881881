"""Panels, and a page of them as self-contained HTML or as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from layerboost.artifacts import PlanFile, finite, json_text
from layerboost.reporting.text import strategy
from layerboost.strategies import StrategyName

# Nothing may be fetched: a browser enforces what the page promises.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


@dataclass(frozen=True)
class Table:
    """Cells as text, the same in HTML and Markdown. `text_columns` are set flush left; `folded`: closed on the page."""

    title: str
    header: list[str]
    rows: list[list[str]]
    text_columns: tuple[int, ...] = (0,)
    folded: bool = False


@dataclass(frozen=True)
class Chart:
    """A plotly figure (`data` and `layout`) whose colours are names of CSS variables, `var(--full)`."""

    name: str
    title: str
    figure: dict[str, Any]


@dataclass(frozen=True)
class Panel:
    """One section: where its numbers come from, what is missing, and what it shows, in this order.

    `layers`: lines that a layer of `plan` shows when it is pointed at.
    """

    name: str
    title: str
    sources: list[str]
    missing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    plan: PlanFile | None = None
    layers: dict[int, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    listing: tuple[str, str] | None = None


@dataclass(frozen=True)
class Finding:
    """One line of the verdict: a number, or None where it was not measured, and the sentence beside it."""

    value: str | None
    sentence: str
    sources: list[str]


@dataclass(frozen=True)
class Page:
    """A whole report."""

    title: str
    facts: str
    findings: list[Finding]
    panels: list[Panel]


def html_page(page: Page) -> str:
    """The page as one HTML file with plotly.js, styles and figures inside."""
    from plotly.offline import get_plotlyjs

    # A healing that diverged may have left numbers that are not finite.
    figures = finite({chart.name: chart.figure for panel in page.panels for chart in panel.charts})
    # "<" is written as an escape: a model's name must not end the script element.
    data = json_text(figures, "the report").replace("<", "\\u003c")
    findings = "".join(_html_finding(finding) for finding in page.findings)
    scripts = (
        f'<script type="application/json" id="figures">{data}</script>\n'
        f"<script>{get_plotlyjs()}</script>\n<script>{_asset('page.js')}</script>\n"
        if figures
        else ""
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(page.title)}</title>\n<style>\n{_asset('page.css')}</style>\n</head>\n<body>\n"
        f'<header>\n<h1>{escape(page.title)}</h1>\n<p class="facts">{escape(page.facts)}</p>\n</header>\n'
        f'<dl class="verdict" id="verdict">\n{findings}</dl>\n'
        + "".join(_html_panel(panel) for panel in page.panels)
        + scripts
        + "</body>\n</html>\n"
    )


def markdown_page(page: Page, images: Mapping[str, str] | None = None) -> str:
    """The page's text and tables as Markdown; `images`: files to show in place of charts, by the chart's name."""
    parts = [f"# {_plain(page.title)}", _plain(page.facts)]
    parts.append("\n".join(_markdown_finding(finding) for finding in page.findings))
    for panel in page.panels:
        parts += [f"## {panel.title}", f"Source: {', '.join(f'`{source}`' for source in panel.sources)}"]
        parts += [f"> {_plain(line)}" for line in (*panel.missing, *panel.warnings)]
        if panel.plan:
            parts.append(_markdown_layers(panel.plan))
        parts += [_plain(note) for note in panel.notes]
        for chart in panel.charts:
            if image := (images or {}).get(chart.name.removeprefix("chart-")):
                parts.append(f"![{chart.title}]({image})")
        for table in panel.tables:
            parts += [f"### {table.title}", markdown_table(table)]
        if panel.listing:
            parts += [f"### {panel.listing[0]}", f"```yaml\n{panel.listing[1].rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text()


def _html_finding(finding: Finding) -> str:
    value = f"<dt>{escape(finding.value)}</dt>" if finding.value else '<dt class="absent">not measured</dt>'
    sources = ", ".join(f"<code>{escape(source)}</code>" for source in finding.sources)
    return f'<div>{value}<dd>{_inline(finding.sentence)} <span class="source">{sources}</span></dd></div>\n'


def _html_panel(panel: Panel) -> str:
    sources = ", ".join(f"<code>{escape(source)}</code>" for source in panel.sources)
    parts = [
        f'<section id="{panel.name}">\n<div class="head"><h2>{escape(panel.title)}</h2>'
        f'<span class="source">{sources}</span></div>\n'
    ]
    parts += [f'<p class="missing">{_inline(line)}</p>\n' for line in panel.missing]
    parts += [f'<p class="warning">{_inline(line)}</p>\n' for line in panel.warnings]
    if panel.plan:
        parts.append(_html_layers(panel.plan, panel.layers))
    parts += [f"<p>{_inline(note)}</p>\n" for note in panel.notes]
    if panel.charts:
        charts = "".join(
            f'<div class="chart"><h3>{escape(chart.title)}</h3>'
            f'<div class="plot" id="{chart.name}" role="img" aria-label="{escape(chart.title)}"></div></div>\n'
            for chart in panel.charts
        )
        parts.append(
            f'<div class="charts">\n{charts}</div>\n<noscript><p class="missing">The charts need JavaScript; '
            "the tables hold their numbers.</p></noscript>\n"
        )
    parts += [_html_table(table) for table in panel.tables]
    if panel.listing:
        title, text = panel.listing
        parts.append(f"<details><summary>{escape(title)}</summary><pre><code>{escape(text)}</code></pre></details>\n")
    return "".join(parts) + "</section>\n"


def _html_layers(plan: PlanFile, lines: dict[int, list[str]]) -> str:
    """The layer map: a cell a layer, what the colours mean, how many layers have each; `lines` of a layer on hover."""
    cells = []
    for entry in plan.layers:
        label = f"{entry.window}{'•' if entry.sink else ''}" if entry.attention == "sliding" else entry.attention
        name = strategy(entry.attention, entry.window, entry.sink)
        cells.append(
            f'<li class="{entry.attention}" tabindex="0"><b>{entry.layer}</b><span>{label}</span>'
            f'<div class="values"><strong>layer {entry.layer}: {name}</strong>'
            f"{''.join(f'<span>{escape(line)}</span>' for line in lines.get(entry.layer, []))}</div></li>"
        )
    slide = len(plan.sliding_as_base)
    keys: dict[StrategyName, str] = {
        "full": "full attention" + (f" ({slide} of them slide as in the base)" if slide else ""),
        "sliding": f"sliding window of {plan.window} tokens" + (" (• with a learned sink)" if _has_sink(plan) else ""),
        "none": "no attention",
    }
    key = "".join(
        f'<li><i class="{name}"></i>{plan.count(name)} × {text}</li>' for name, text in keys.items() if plan.count(name)
    )
    return f'<ul class="key">{key}</ul>\n<ol class="layers" start="0">{"".join(cells)}</ol>\n'


def _has_sink(plan: PlanFile) -> bool:
    return any(entry.sink for entry in plan.layers)


def _html_table(table: Table) -> str:
    def row(cells: list[str], tag: str) -> str:
        inner = "".join(
            f"<{tag}{_cell_class(table, column, cell)}>{_inline(cell)}</{tag}>" for column, cell in enumerate(cells)
        )
        return f"<tr>{inner}</tr>\n"

    body = "".join(row(cells, "td") for cells in table.rows)
    inner = (
        f'<div class="wide"><table>\n<thead>{row(table.header, "th")}</thead>\n<tbody>\n{body}</tbody></table></div>\n'
    )
    title = escape(table.title)
    return f"<details><summary>{title}</summary>{inner}</details>\n" if table.folded else f"<h3>{title}</h3>\n{inner}"


def _cell_class(table: Table, column: int, cell: str) -> str:
    if column not in table.text_columns:
        return ""
    return ' class="text long"' if len(cell) > 40 else ' class="text"'


def _inline(text: str) -> str:
    """Escaped text in which `backquoted` pieces are code."""
    pieces = escape(text).split("`")
    if len(pieces) % 2 == 0:
        return "`".join(pieces)
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))


def _markdown_layers(plan: PlanFile) -> str:
    rows = [[str(entry.layer), strategy(entry.attention, entry.window, entry.sink)] for entry in plan.layers]
    return markdown_table(Table("", ["layer", "attention"], rows))


def markdown_table(table: Table) -> str:
    """A table in Markdown, without its title."""
    rule = [":--" if column in table.text_columns else "--:" for column in range(len(table.header))]
    rows = [table.header, rule, *table.rows]
    return "\n".join("| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


def _markdown_finding(finding: Finding) -> str:
    value = f"**{finding.value}** " if finding.value else ""
    return f"- {value}{_plain(finding.sentence)} ({', '.join(f'`{source}`' for source in finding.sources)})"


def _plain(text: str) -> str:
    """Text in which Markdown sees no HTML and no line break."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
