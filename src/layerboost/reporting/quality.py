"""The quality panel: held-out text, tasks with their intervals, and the gate."""

from __future__ import annotations

from html import escape
from typing import Any

from layerboost.artifacts import Score
from layerboost.reporting.figures import layout, model_color
from layerboost.reporting.page import Chart, Panel, Table
from layerboost.reporting.sources import Sources, absent, model_order
from layerboost.reporting.text import ABSENT, interval, number, with_error
from layerboost.schemas.evaluation import Change, EvalComparison, Gate, Task

FILE = "eval/comparison.json"
VERDICTS = {True: "passed", False: "missed", None: "not judged"}


def quality_panel(sources: Sources) -> Panel:
    """Perplexity, KL and tasks of every model, each difference from the base with its 95 % interval."""
    quality = sources.quality
    if quality is None:
        return Panel("quality", "Quality", [FILE], [absent(FILE)])
    warnings, charts, tables = [], [], []
    made_from = sources.plan or sources.sensitivity
    if made_from and quality.models.get("base", made_from.model.fingerprint) != made_from.model.fingerprint:
        warnings.append(f"the base evaluated here is not the model of this run's other files, {made_from.model.name}")
    notes = [
        "Values are given with one standard error. Differences from the base are paired, over the same tokens or "
        "items, with a 95 % interval by bootstrap in brackets."
    ]
    if quality.gate:
        tables.append(_gate_table(quality.gate))
    if quality.perplexity:
        if quality.text:
            notes.append(f"Held-out text: {quality.text.tokens:,} tokens of {quality.text.source}.")
        tables.append(_perplexity_table(quality))
    if quality.tasks:
        notes += _task_notes(quality)
        tables.append(_task_table(quality))
        if any(task.difference for task in quality.tasks.values()):
            charts.append(Chart("chart-tasks", "Difference from the base by task", task_figure(quality)))
            tables.append(_difference_table(quality))
    return Panel("quality", "Quality", [FILE], [], warnings, notes=notes, charts=charts, tables=tables)


def task_figure(quality: EvalComparison) -> dict[str, Any]:
    """A row a task, a point a model: its difference from the base in points, bars over the 95 % interval."""
    entries = _entries(quality)
    names = list(entries)[::-1]
    models = model_order({model for task in entries.values() for model in task.difference})
    traces: list[dict[str, Any]] = []
    for index, model in enumerate(models):
        found = [(names.index(name), entries[name]) for name in names if model in entries[name].difference]
        changes = [task.difference[model] for _, task in found]
        color = model_color(model, models)
        offset = 0.5 * ((index + 0.5) / len(models) - 0.5)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": escape(model),
                "x": [100 * change.mean for change in changes],
                "y": [row - offset for row, _ in found],
                "error_x": {
                    "type": "data",
                    "array": [100 * (change.high - change.mean) for change in changes],
                    "arrayminus": [100 * (change.mean - change.low) for change in changes],
                    "color": color,
                    "thickness": 1.5,
                    "width": 0,
                },
                "marker": {"color": color, "size": 8},
                "customdata": [
                    f"{escape(names[row])}: {_points(task.difference[model])} points, {task.items:,} items"
                    for row, task in found
                ],
                "hovertemplate": "%{customdata}<extra>%{fullData.name}</extra>",
            }
        )
    figure: dict[str, Any] = {"data": traces, "layout": layout("points, against the base", "")}
    labels = [escape(name) + (" *" if entries[name].selection else "") for name in names]
    figure["layout"]["yaxis"] |= {"tickvals": list(range(len(names))), "ticktext": labels, "showgrid": False}
    figure["layout"]["xaxis"] |= {"zeroline": True, "zerolinecolor": "var(--soft)", "showgrid": True}
    return figure


def nll_difference(quality: EvalComparison, name: str) -> str | None:
    """NLL of a model less the base's, with its interval; None for the base."""
    found = quality.perplexity[name].nll_difference
    return None if found is None else interval(found.mean, found.low, found.high, signed=True)


def task_value(task: Task, model: str) -> str:
    """A model's value on a task in percent, with its standard error."""
    if model not in task.models:
        return ABSENT
    found = task.models[model]
    error = Score(mean=100 * found.value, standard_error=100 * found.standard_error)
    return with_error(error) if found.standard_error > 0 else number(error.mean)


def _entries(quality: EvalComparison) -> dict[str, Task]:
    """Every task, and the average over those that chose no layers."""
    return quality.tasks | ({"average": quality.average} if quality.average else {})


def _task_notes(quality: EvalComparison) -> list[str]:
    notes = [
        "«No worse» says whether a loss of one point is ruled out with 95 % probability; «not shown» proves no loss. "
        "The smallest detectable difference is what so many items show four times in five. The margin is the "
        "log-probability of the right answer less that of the best wrong one: it still moves where accuracy is near "
        "chance."
    ]
    chosen = [name for name, task in quality.tasks.items() if task.selection]
    if chosen:
        notes.append(f"Layers were chosen on {', '.join(chosen)} (*): in the tables, but not in the average.")
    return notes


def _perplexity_table(quality: EvalComparison) -> Table:
    rows = []
    for name in model_order(quality.perplexity):
        found = quality.perplexity[name]
        kl = ABSENT if name == "base" else interval(found.kl.mean, found.kl.low, found.kl.high)
        rows.append(
            [name, number(found.perplexity, 4), with_error(found.nll), nll_difference(quality, name) or ABSENT, kl]
        )
    header = [
        "model",
        "perplexity",
        "NLL, nats per token",
        "NLL − base, nats per token",
        "KL(base ‖ model), nats per token",
    ]
    return Table("Held-out text", header, rows)


def _task_table(quality: EvalComparison) -> Table:
    entries = _entries(quality)
    models = model_order({name for task in entries.values() for name in task.models})
    rows = [
        [
            name + (" *" if task.selection else ""),
            task.metric,
            f"{task.items:,}",
            *(task_value(task, model) for model in models),
        ]
        for name, task in entries.items()
    ]
    return Table("Tasks", ["task", "metric", "items", *(f"{model}, %" for model in models)], rows, (0, 1))


def _difference_table(quality: EvalComparison) -> Table:
    rows = []
    for name, task in _entries(quality).items():
        for model in model_order(task.difference):
            change = task.difference[model]
            rows.append(
                [
                    name + (" *" if task.selection else ""),
                    model,
                    _points(change),
                    change.no_worse,
                    number(100 * change.detectable, 2),
                    _margin(task, model),
                ]
            )
    header = [
        "task",
        "model",
        "difference, points",
        "no worse than 1 point",
        "detectable, points",
        "margin − base, nats",
    ]
    return Table("Differences from the base", header, rows, text_columns=(0, 1, 3))


def _points(change: Change) -> str:
    return interval(100 * change.mean, 100 * change.low, 100 * change.high, signed=True)


def _margin(task: Task, model: str) -> str:
    if task.margin is None:
        return ABSENT
    change = task.margin.difference[model]
    per = " a character" if task.margin.unit == "nats per character" else ""
    return interval(change.mean, change.low, change.high, signed=True) + per


def _gate_table(gate: Gate) -> Table:
    rows = [
        [
            check.what,
            ABSENT if check.found is None else interval(check.found, check.low or 0.0, check.high or 0.0),
            number(check.at_most),
            VERDICTS[check.passed],
        ]
        for check in gate.checks
    ]
    return Table(f"Quality gate of {gate.model}", ["check", "found", "at most", "verdict"], rows, (0, 3))
