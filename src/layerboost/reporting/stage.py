"""The report stage: RUN/report.html and RUN/report.md, derived from the run folder's files and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerboost.files import write_text
from layerboost.reporting.benchmark import decode_panel, throughput_panel
from layerboost.reporting.page import Page, html_page, markdown_page
from layerboost.reporting.panels import healing_panel, layers_panel, provenance_panel
from layerboost.reporting.quality import long_context_panel, quality_panel
from layerboost.reporting.search import search_panel
from layerboost.reporting.sources import Sources
from layerboost.reporting.verdict import findings, summary

# In the order of the page.
PANELS = (
    layers_panel,
    search_panel,
    quality_panel,
    long_context_panel,
    healing_panel,
    throughput_panel,
    decode_panel,
    provenance_panel,
)


def run_report(run: Path) -> dict[str, Any]:
    """Write `report.html` (one file, works offline) and `report.md` to the run folder; return a summary.

    The panel of a missing file names the command that makes it. The summary has `kv_fraction` (of the base's KV bytes,
    None without a plan), `throughput_ratio` (a `benchmark.Ratio`, or None), `perplexity` by model, `tasks`
    by task and model, `average` by model or None (fractions), and `report`, the HTML.
    Raise ConfigError if the folder is missing or one of its files is truncated, foreign or of another model, and
    LayerboostError if the reports cannot be written.
    """
    sources = Sources(run)
    page = report_page(sources)
    write_text(run / "report.html", html_page(page))
    write_text(run / "report.md", markdown_page(page))
    return {**summary(sources), "report": run / "report.html"}


def report_page(sources: Sources) -> Page:
    """Return the verdict and every panel of a run."""
    return Page(*_heading(sources), findings(sources), [panel(sources) for panel in PANELS])


def _heading(sources: Sources) -> tuple[str, str]:
    """Return the model's name, and a line of facts about it and the run."""
    model, recipe, run = sources.model, sources.recipe, sources.run.resolve().name
    if model is None:
        return (recipe.model if recipe and recipe.model else run), f"run {run}"
    active = f" ({model.active_parameters / 1e6:,.0f} M active)" if model.expert_parameters else ""
    facts = [
        f"{model.model_type}, {model.parameters / 1e6:,.0f} M parameters{active}, {model.layers} layers",
        f"{model.kv_heads} KV heads of {model.head_dim}",
        f"run {run}",
    ]
    if sources.history and sources.history.stages:
        facts.append(f"last stage {sources.history.stages[-1].started[:10]}")
    return model.name, " · ".join(facts)
