"""Two plans side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerboost.costs.budget import base_kv_bytes, parameter_fraction, plan_kv_bytes
from layerboost.errors import ConfigError
from layerboost.reporting.text import ABSENT, number
from layerboost.schemas.plan import PlanFile, counts, read_plan
from layerboost.schemas.run import PLAN
from layerboost.strategies import label


def plan_difference(first: Path, second: Path) -> dict[str, Any]:
    """Return two plans, files or run folders, by layer, with counts of each strategy, KV bytes and predicted loss.

    KV bytes are per request, at the first plan's context. Raise ConfigError for models of different depth.
    """
    a, b = (read_plan(path / PLAN if path.is_dir() else path) for path in (first, second))
    if a.model.layers != b.model.layers:
        raise ConfigError(
            "the plans are of models of different depth",
            found=f"{a.model.name}: {a.model.layers} layers, {b.model.name}: {b.model.layers}",
        )
    predicted = a.predicted or b.predicted
    context = predicted.context_tokens if predicted else a.model.max_context_tokens
    return {
        "plans": [str(first), str(second)],
        "context_tokens": context,
        "totals": [_totals(plan, context) for plan in (a, b)],
        "layers": [
            {"layer": one.layer, "first": label(one), "second": label(other), "differs": one != other}
            for one, other in zip(a.layers, b.layers, strict=True)
        ],
    }


def difference_table(difference: dict[str, Any]) -> list[list[str]]:
    """Return rows for a terminal, header first; layers that differ are marked."""

    def cell(value: Any) -> str:
        return number(value) if isinstance(value, float) else str(value)

    layers = [
        [str(row["layer"]), row["first"], row["second"], "≠" if row["differs"] else ""] for row in difference["layers"]
    ]
    names = dict.fromkeys(name for total in difference["totals"] for name in total)
    totals = [[name, *(cell(total.get(name, ABSENT)) for total in difference["totals"]), ""] for name in names]
    return [["layer", *difference["plans"], ""], *layers, *totals]


def _totals(plan: PlanFile, context: int) -> dict[str, Any]:
    fraction = plan_kv_bytes(plan.model, plan.layers, context) / base_kv_bytes(plan.model, context)
    kept = parameter_fraction(plan.model, plan.layers)
    parameters = {} if kept is None else {"parameters of base": kept}
    losses = plan.valid_prediction.quality_loss if plan.valid_prediction else {}
    predicted = {f"{metric}, predicted": value for metric, value in losses.items()}
    return {"method": plan.method, **counts(plan.layers), "KV of base": fraction, **parameters, **predicted}
