"""The quality panel: held-out text, tasks with their intervals, and the gate."""

from __future__ import annotations

from html import escape

from layerboost.reporting.figures import Figure, figure, model_color, scatter
from layerboost.reporting.page import Panel, Table
from layerboost.reporting.sources import Sources, model_order
from layerboost.reporting.text import ABSENT, interval, number, with_error, with_interval
from layerboost.schemas.evaluation import EvalComparison, Gate, Perplexity, Task
from layerboost.schemas.sensitivity import Score

VERDICTS = {True: "passed", False: "missed", None: "not judged"}


def quality_panel(sources: Sources) -> Panel:
    """Return perplexity, KL and tasks of every model, each difference from the base with its 95 % interval."""
    panel, quality = sources.panel("quality", "Quality", "eval/comparison.json"), sources.quality
    if quality is None:
        return panel
    model = sources.model
    if model and quality.models.get("base", model.fingerprint) != model.fingerprint:
        panel.warnings.append(f"the base evaluated here is not the model of this run's other files, {model.name}")
    panel.notes.append(
        "Values are given with one standard error. Differences from the base are paired, over the same tokens or "
        "items, with a 95 % interval by bootstrap in brackets."
    )
    if quality.gate:
        panel.tables.append(_gate_table(quality.gate))
    if quality.perplexity:
        if quality.text:
            panel.notes.append(f"Held-out text: {quality.text.tokens:,} tokens of {quality.text.source}.")
        panel.tables.append(_perplexity_table(quality))
    if quality.tasks:
        panel.notes.append(
            "«No worse» says whether a loss of one point is ruled out with 95 % probability; «not shown» does not "
            "prove a loss. The smallest detectable difference is what a sample of this size shows four times in five. "
            "The margin is the log-probability of the right answer minus that of the best wrong one: it shows changes "
            "also where accuracy is near chance."
        )
        if chosen := ", ".join(name for name, task in quality.tasks.items() if task.selection):
            panel.notes.append(f"Layers were chosen on {chosen} (*): in the tables, but not in the average.")
        panel.tables.append(_task_table(quality))
        if any(task.difference for task in quality.tasks.values()):
            panel.chart("tasks", "Difference from the base by task", task_figure(quality))
            panel.tables.append(_difference_table(quality))
    return panel


def task_figure(quality: EvalComparison) -> Figure:
    """Return a row per task, a point per model: its difference from the base in points, bars over the 95 % interval."""
    entries = quality.scores
    names = list(entries)[::-1]
    models = model_order({model for task in entries.values() for model in task.difference})
    traces = []
    for index, model in enumerate(models):
        tasks = {row: entries[name] for row, name in enumerate(names) if model in entries[name].difference}
        changes = [task.difference[model] for task in tasks.values()]
        offset = 0.5 * ((index + 0.5) / len(models) - 0.5)
        traces.append(
            scatter(
                model,
                [100 * change.mean for change in changes],
                [row - offset for row in tasks],
                model_color(model, models),
                "markers",
                x_ends=[(100 * change.low, 100 * change.high) for change in changes],
                hoverinfo="x+name",
            )
        )
    labels = [escape(name) + (" *" if entries[name].selection else "") for name in names]
    x = {"zeroline": True, "zerolinecolor": "var(--soft)", "showgrid": True}
    y = {"tickvals": list(range(len(names))), "ticktext": labels, "showgrid": False}
    return figure(traces, "points, against the base", "", x, y)


def _value(task: Task, model: str) -> str:
    """Return a model's value on a task in percent, with its standard error."""
    value = task.models.get(model)
    if value is None:
        return ABSENT
    error = Score(mean=100 * value.value, standard_error=100 * value.standard_error)
    return with_error(error) if value.standard_error > 0 else number(error.mean)


def _perplexity_table(quality: EvalComparison) -> Table:
    def cells(name: str, losses: Perplexity) -> list[str]:
        kl = with_interval(None if name == "base" else losses.kl, signed=False)
        return [name, number(losses.perplexity, 4), with_error(losses.nll), with_interval(losses.nll_difference), kl]

    header = ["model", "perplexity", "NLL, nats per token", "NLL − base, nats per token"]
    rows = [cells(name, quality.perplexity[name]) for name in model_order(quality.perplexity)]
    return Table("Held-out text", [*header, "KL(base ‖ model), nats per token"], rows)


def _task_table(quality: EvalComparison) -> Table:
    entries = quality.scores
    models = model_order({name for task in entries.values() for name in task.models})
    rows = [
        [_starred(name, task), task.metric, f"{task.items:,}", *(_value(task, model) for model in models)]
        for name, task in entries.items()
    ]
    return Table("Tasks", ["task", "metric", "items", *(f"{model}, %" for model in models)], rows, (0, 1))


def _difference_table(quality: EvalComparison) -> Table:
    rows = [
        [
            _starred(name, task),
            model,
            with_interval(task.difference[model], scale=100),
            task.difference[model].no_worse,
            number(100 * task.difference[model].minimum_detectable, 2),
            _margin(task, model),
        ]
        for name, task in quality.scores.items()
        for model in model_order(task.difference)
    ]
    header = ["task", "model", "difference, points", "no worse than 1 point", "detectable, points"]
    return Table("Differences from the base", [*header, "margin − base, nats"], rows, text_columns=(0, 1, 3))


def _starred(name: str, task: Task) -> str:
    return name + (" *" if task.selection else "")


def _margin(task: Task, model: str) -> str:
    if task.margin is None:
        return ABSENT
    per = " per character" if task.margin.unit == "nats per character" else ""
    return with_interval(task.margin.difference[model]) + per


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
