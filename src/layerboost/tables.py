"""Results as the rows of terminal tables, header first."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from layerboost.exporting.stage import Exported
    from layerboost.reporting.page import Table as ReportTable
    from layerboost.schemas.plan import PlanFile
    from layerboost.schemas.sensitivity import Sensitivity

Rows = list[list[str]]
PIPED_COLUMNS = 200  # without a terminal: rich would assume 80 and truncate numbers


def show(result: Any, as_json: bool, table: Callable[[Any], Rows | ReportTable]) -> None:
    """Print a result on stdout: as JSON, or as a table: of the report, or of rows, header first."""
    from layerboost.runtime import is_main_process

    if not is_main_process():
        return
    if as_json:
        from pydantic_core import to_jsonable_python

        from layerboost.schemas.artifact import json_text

        click.echo(json_text(to_jsonable_python(result), "the result", indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    rows = table(result)
    head, *body = rows if isinstance(rows, list) else [rows.header, *rows.rows]
    printed = Table(*head)
    for row in body:
        printed.add_row(*row)
    width = shutil.get_terminal_size((PIPED_COLUMNS, 24)).columns
    Console(width=width, markup=False).print(printed)  # a path may hold [brackets]


def measured_rows(sensitivity: Sensitivity) -> Rows:
    """Return per layer the metrics that plans use, one per line; the file has all, with their standard errors."""
    variants = [{variant.label: variant.scores for variant in entry.variants} for entry in sensitivity.layers]
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
    from layerboost.schemas.plan import layer_rows

    rows = layer_rows(plan.layers)
    if predicted := plan.valid_prediction:
        metric, value = next(iter(predicted.quality_loss.items()), ("quality loss", 0.0))
        every = ["all", f"KV {predicted.kv_fraction:.1%}", f"{metric} {value:.3f}", "predicted"]
        of_mlps = [f"parameters {predicted.parameter_fraction:.1%}"] if "MLP" in rows[0] else []
        rows.append([*every, *[""] * (len(rows[0]) - len(every) - len(of_mlps)), *of_mlps])
    return rows


def written_rows(result: Any) -> Rows:
    """Return what a stage wrote."""
    return [["written"], [str(result)]]


def exported_rows(result: Exported) -> Rows:
    """Return what an export wrote, and what it costs."""
    extra = f"{result.extra_kv_bytes / (1 << 20):.2f} MiB per request" if result.extra_kv_bytes else "none"
    cells = {"target": result.target, "written": result.folder, "extra KV cache": extra}
    if result.base_type:
        cells["base's weights"] = result.base_type
    return [list(cells), list(cells.values())]


def summarized_rows(run: Path) -> Rows:
    """Return cost, throughput and quality of base, converted and healed, as far as the run folder has them."""
    from layerboost.reporting.sources import Sources
    from layerboost.reporting.verdict import summary, summary_table

    return summary_table(summary(Sources(run)))


def reported_rows(summary: dict[str, Any]) -> Rows:
    """Return the report's summary, and its path."""
    from layerboost.reporting.verdict import summary_table

    rows = summary_table(summary)
    return [*rows, ["report", str(summary["report"]), *[""] * (len(rows[0]) - 2)]]


def costs_rows(costs: dict[str, Any]) -> Rows:
    """Return times and concurrent requests of each plan, measured and predicted."""

    def row(plan: str, what: str, measured: float, predicted: float) -> list[str]:
        return [plan, what, f"{measured:.4g}", f"{predicted:.4g}", f"{predicted / measured - 1:+.1%}"]

    rows = [row(each["plan"], f"{each['what']}, ms", each["ms"], each["predicted_ms"]) for each in costs["timing"]]
    for plan in costs["plans"]:
        for fits in plan["memory"]:
            what = f"requests of {fits['context_tokens']:,} by {fits['max_batched_tokens']:,}"
            if "concurrency" in fits:
                rows.append(row(plan["plan"], what, fits["concurrency"], fits["concurrency_predicted"]))
            else:
                held = fits["kv_bytes"] / 2**20, fits["kv_bytes_predicted"] / 2**20
                rows.append(row(plan["plan"], f"{fits['slots']} {what}, MiB of KV", *held))
    return [["plan", "what", "measured", "predicted", "off"], *rows]
