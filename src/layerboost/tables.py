"""Results as the rows of terminal tables, header first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from layerboost.strategies import label

if TYPE_CHECKING:
    from layerboost.schemas.plan import Frontier, LayerPlan, PlanFile
    from layerboost.schemas.sensitivity import Sensitivity, Stability

Rows = list[list[str]]
PIPED_COLUMNS = 200  # without a terminal: rich would assume 80 and truncate numbers


def show(result: Any, as_json: bool, rows: Callable[[Any], Rows]) -> None:
    """Print a result on stdout: as JSON, or as a table of rows, header first."""
    from layerboost.runtime import is_main_process

    if not is_main_process():
        return
    if as_json:
        from layerboost.schemas.artifact import json_text

        click.echo(json_text(to_jsonable(result), "the result", indent=1, default=str))
        return
    from rich.console import Console
    from rich.table import Table

    head, *body = rows(result)
    table = Table(*head)
    for row in body:
        table.add_row(*row)
    width = shutil.get_terminal_size((PIPED_COLUMNS, 24)).columns
    Console(width=width, markup=False).print(table)  # a path may hold [brackets]


def to_jsonable(result: Any) -> Any:
    """Return a stage's result as JSON values."""
    from layerboost.schemas.artifact import Artifact

    if isinstance(result, Artifact):
        return result.model_dump(mode="json")
    return asdict(result) if is_dataclass(result) and not isinstance(result, type) else result


def measured_rows(sensitivity: Sensitivity) -> Rows:
    """Return per layer the metrics that plans use, one per line; the file has all, with their standard errors."""
    variants = [{label(variant): variant.scores for variant in entry.variants} for entry in sensitivity.layers]
    names = list(dict.fromkeys(name for layer in variants for name in layer))
    measured = {metric for layer in variants for scores in layer.values() for metric in scores}
    metrics = [metric for metric in ("kl", "retrieval", "benchmark") if metric in measured]

    def row(name: str, cells: list[list[float]]) -> list[str]:
        return [name, "\n".join(metrics), *("\n".join(f"{value:.3g}" for value in cell) for cell in cells)]

    body = [
        row(str(entry.layer), [[layer[name][m].mean for m in metrics] if name in layer else [] for name in names])
        for entry, layer in zip(sensitivity.layers, variants, strict=True)
    ]
    errors = [
        [median(layer[name][metric].standard_error for layer in variants if name in layer) for metric in metrics]
        for name in names
    ]
    return [["layer", "metric", *names], *body, row("median ±", errors)]


def planned_rows(plan: PlanFile) -> Rows:
    """Return one row per layer, and the prediction for all."""
    columns: dict[str, Callable[[LayerPlan], str]] = {
        "layer": lambda entry: str(entry.layer),
        "attention": lambda entry: entry.attention,
        "window": lambda entry: str(entry.window or ""),
        "sink": lambda entry: "yes" if entry.sink else "",
    }
    if any(entry.full_kv_heads for entry in plan.layers):
        columns["full KV heads"] = lambda entry: " ".join(map(str, entry.full_kv_heads))
    body = [[text(entry) for text in columns.values()] for entry in plan.layers]
    if predicted := plan.valid_prediction:
        metric, value = next(iter(predicted.damage.items()), ("quality loss", 0.0))
        body.append(
            ["all", f"KV {predicted.kv_fraction:.1%}", f"{metric} {value:.3f}", "predicted", ""][: len(columns)]
        )
    return [[*columns], *body]


def frontier_rows(frontier: Frontier) -> Rows:
    """Return the plans of every budget, as in the report's table."""
    from layerboost.reporting.search import frontier_table

    return frontier_table(frontier).lines


def stability_rows(stability: Stability) -> Rows:
    """Return the agreement of two measurements, as in the report's table."""
    from layerboost.reporting.search import stability_table

    return stability_table(stability).lines


def written_rows(result: Any) -> Rows:
    """Return what a stage wrote."""
    return [["written"], [str(result)]]


def summarized_rows(run: Path) -> Rows:
    """Return cost, throughput and quality of base, converted and healed, as far as the run folder has them."""
    from layerboost.reporting.sources import read_sources
    from layerboost.reporting.verdict import summary, summary_table

    return summary_table(summary(read_sources(run)))


def reported_rows(run: Path) -> Rows:
    """Return the summary, and the report's path."""
    rows = summarized_rows(run)
    return [*rows, ["report", str(run / "report.html"), *[""] * (len(rows[0]) - 2)]]


def decoded_rows(sweep: dict[str, Any]) -> Rows:
    """Return a decode sweep, as in the report's table."""
    from layerboost.reporting.benchmark import decode_table
    from layerboost.schemas.benchmark import Comparison

    return decode_table(Comparison.model_validate(sweep)).lines


def costs_rows(costs: dict[str, Any]) -> Rows:
    """Return times measured and predicted from the other plans, then requests that fit by vLLM and by arithmetic."""

    def row(plan: str, what: str, measured: float, predicted: float) -> list[str]:
        return [plan, what, f"{measured:.4g}", f"{predicted:.4g}", f"{predicted / measured - 1:+.1%}"]

    times = [row(t["plan"], f"{t['what']}, ms", t["ms"], t["predicted_ms"]) for t in costs["timing"]]
    fits = [
        row(
            entry["plan"],
            f"requests of {m['context_tokens']:,} by {m['max_batched_tokens']:,}",
            m["concurrency"],
            m["concurrency_predicted"],
        )
        for entry in costs["plans"]
        for m in entry["memory"]
    ]
    return [["plan", "what", "measured", "predicted", "off"], *times, *fits]


def recipe_rows(recipes: dict[str, str]) -> list[list[str]]:
    """Return one row per recipe that comes with layerboost, with its file."""
    return [["recipe", "file"], *map(list, recipes.items())]


def supported_rows(families: dict[str, dict[str, Any]]) -> Rows:
    """Return one row per family with the vLLM classes that serve it."""
    return [["family", "vLLM"], *([name, row["vllm"] or "not served"] for name, row in families.items())]
