"""The quality gate: the boosted model's losses on held-out data against the limits of the recipe."""

from __future__ import annotations

from layerboost.errors import ConfigError, GateMissed
from layerboost.recipe import Evaluate
from layerboost.schemas.evaluation import Check, EvalComparison, Gate, RetrievalScores, Task
from layerboost.schemas.run import BASE, last_made


def validate_gate(settings: Evaluate) -> None:
    """Raise ConfigError for a threshold on a metric that the recipe does not measure."""
    needs = {
        "max_kl": "perplexity_tokens",
        "max_average_drop": "tasks",
        "max_task_drop": "tasks",
        "max_retrieval_drop": "retrieval_tokens",
    }
    for gate, key in needs.items():
        if getattr(settings, gate) is not None and not getattr(settings, key):
            raise ConfigError(f"evaluate.{gate} is set, but nothing is measured for it", do=f"set evaluate.{key}")


def gate_checks(comparison: EvalComparison, settings: Evaluate) -> Gate | None:
    """Return the gate of one model, with a check per threshold of the recipe; None without a model or a threshold.

    The model is the healed one, else the converted one, else the last. A check compares the mean; `low` and `high` are
    the 95 % interval, which shows whether the sample can detect the loss. `passed` is None if there is nothing to
    judge: the base cannot do the task, or every task chose layers.
    """
    changed = [name for name in comparison.models if name != BASE]
    if not changed:
        return None
    model, checks = last_made(changed), []
    if settings.max_kl is not None:
        kl = comparison.perplexity[model].kl
        checks.append(_check("KL to the base", kl.mean, settings.max_kl, kl.low, kl.high))
    if settings.max_average_drop is not None:
        checks.append(_drop("average accuracy, drop", comparison.average, model, settings.max_average_drop))
    if settings.max_task_drop is not None:
        checks += [
            _drop(f"{name}, drop", task, model, settings.max_task_drop)
            for name, task in comparison.tasks.items()
            if not task.selection
        ]
    if settings.max_retrieval_drop is not None:
        able = comparison.retrieval.able if comparison.retrieval else None
        checks.append(_drop("retrieval, drop of exact match", able, model, settings.max_retrieval_drop))
    return Gate(model=model, checks=checks) if checks else None


def check_gate(gate: Gate | None) -> None:
    """Raise GateMissed, with a table of every check, if one of them was missed."""
    if gate is None or not gate.missed:
        return
    rows = [("check", "found", "95 % interval", "at most", "")]
    for check in gate.checks:
        verdict = {True: "passed", False: "MISSED", None: "not judged"}[check.passed]
        found = "–" if check.found is None else f"{check.found:.4f}"
        interval = "–" if check.found is None else f"{check.low:.4f} to {check.high:.4f}"
        rows.append((check.what, found, interval, f"{check.at_most:g}", verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    raise GateMissed(
        f"the quality gate was missed by {gate.model}",
        found="\n  " + "\n  ".join(lines),
        do="heal longer or plan a larger budget",
    )


def _drop(what: str, part: Task | RetrievalScores | None, model: str, at_most: float) -> Check:
    if part is None:
        return Check(what=what, found=None, low=None, high=None, at_most=at_most, passed=None)
    change = part.difference[model]
    return _check(what, 0.0 - change.mean, at_most, 0.0 - change.high, 0.0 - change.low)  # never -0.0


def _check(what: str, found: float, at_most: float, low: float, high: float) -> Check:
    return Check(what=what, found=found, low=low, high=high, at_most=at_most, passed=found <= at_most)
