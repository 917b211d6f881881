"""Panels, and a page of them as self-contained HTML or as Markdown."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup, escape

from layerboost.schemas.artifact import finite, json_text
from layerboost.schemas.plan import PlanFile
from layerboost.strategies import MLP_STRATEGIES, STRATEGIES


@dataclass(frozen=True)
class Table:
    """Cells as text, the same in HTML and Markdown. `text_columns` are left-aligned; `folded`: closed on the page."""

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


@dataclass
class Panel:
    """One section: the files that its numbers are from, what is missing, and what it shows, in this order."""

    name: str
    title: str
    sources: list[str]
    missing: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    plan: PlanFile | None = None
    notes: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    recipe: str | None = None

    def chart(self, name: str, title: str, figure: dict[str, Any]) -> None:
        """Add a chart."""
        self.charts.append(Chart(f"chart-{name}", title, figure))


@dataclass(frozen=True)
class Finding:
    """One line of the verdict: a number, or None where it was not measured, and the sentence that explains it."""

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
    """Return the page as one HTML file with plotly.js, styles and figures inside."""
    from plotly.offline import get_plotlyjs

    # Healing that diverged has written numbers that are not finite.
    figures = finite({chart.name: chart.figure for panel in page.panels for chart in panel.charts})
    # "<" is written as an escape: a model's name must not end the script element.
    data = Markup(json_text(figures, "the report").replace("<", "\\u003c")) if figures else ""
    return _templates().get_template("page.html").render(page=page, figures=data, plotly=Markup(get_plotlyjs()))


def markdown_page(page: Page) -> str:
    """Return text and tables as Markdown."""
    return _templates().get_template("page.md").render(page=page)


def markdown_table(table: Table) -> str:
    """Return a table in Markdown, without its title."""
    rule = [":--" if column in table.text_columns else "--:" for column in range(len(table.header))]
    rows = [table.header, rule, *table.rows]
    return "\n".join("| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("layerboost.reporting"),
        autoescape=select_autoescape(("html",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals["strategies"] = STRATEGIES.values()
    environment.globals["shaded"] = [*STRATEGIES.values(), MLP_STRATEGIES["thin"]]
    environment.filters |= {
        "code": _code,
        "plain": _plain,
        "markdown": markdown_table,
        "layer_table": _layer_table,
    }
    return environment


def _layer_table(plan: PlanFile) -> Table:
    return Table("", ["layer", "attention"], [[str(entry.layer), entry.label] for entry in plan.layers])


def _code(text: str) -> Markup:
    """Return escaped text in which `backquoted` pieces are code."""
    pieces = text.split("`")
    if len(pieces) % 2 == 0:
        return escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if index % 2 else escape(piece) for index, piece in enumerate(pieces)
    )


def _plain(text: str) -> str:
    """Return text in which Markdown sees no HTML and no line break."""
    return " ".join(text.replace("&", "&amp;").replace("<", "&lt;").split())
