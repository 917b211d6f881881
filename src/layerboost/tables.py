"""Results as the rows of a table for the terminal, header first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerboost.artifacts import PlanFile, Score, Sensitivity, Variant

Rows = list[list[str]]


def measured_rows(sensitivity: Sensitivity) -> Rows:
    """The KL of every layer under every replacement."""
    names = list(dict.fromkeys(_name(variant) for entry in sensitivity.layers for variant in entry.variants))
    body = []
    for entry in sensitivity.layers:
        found = {_name(variant): _with_error(variant.scores["kl"]) for variant in entry.variants}
        body.append([str(entry.layer), *(found.get(name, "") for name in names)])
    return [["layer", *names], *body]


def planned_rows(plan: PlanFile) -> Rows:
    """One row a layer, and what is foretold of all."""
    body = [
        [str(entry.layer), entry.attention, str(entry.window or ""), "yes" if entry.sink else ""]
        for entry in plan.layers
    ]
    if plan.foretold:
        metric, value = next(iter(plan.foretold.damage.items()), ("damage", 0.0))
        body.append(["all", f"KV {plan.foretold.kv_fraction:.1%}", f"{metric} {value:.3f}", "predicted"])
    return [["layer", "attention", "window", "sink"], *body]


def written_rows(result: Any) -> Rows:
    """What a stage wrote."""
    return [["written"], [str(result)]]


def summarized_rows(run: Path) -> Rows:
    """What the run folder says so far: cost, throughput and quality of base, converted and healed."""
    from layerboost.reporting.sources import read_sources
    from layerboost.reporting.verdict import summary, summary_table

    return summary_table(summary(read_sources(run)))


def reported_rows(run: Path) -> Rows:
    """The summary, and where the report lies."""
    rows = summarized_rows(run)
    return [*rows, ["report", str(run / "report.html"), *[""] * (len(rows[0]) - 2)]]


def _name(variant: Variant) -> str:
    name = variant.attention + (f" {variant.window}" if variant.window else "")
    return f"KL, {name}" + (" + sink" if variant.sink else "")


def _with_error(score: Score) -> str:
    return f"{score.mean:.4f} ± {score.standard_error:.4f}"
