"""The panels of eval/comparison.json: held-out text, tasks with their intervals, the gate; and long contexts."""

from __future__ import annotations

from html import escape
from itertools import pairwise

from layerboost.reporting.figures import Figure, figure, model_color, scatter
from layerboost.reporting.page import Panel, Table
from layerboost.reporting.sources import Sources, model_order
from layerboost.reporting.text import ABSENT, interval, number, percent, with_error, with_interval
from layerboost.schemas.evaluation import (
    Depth,
    EvalComparison,
    Gate,
    Perplexity,
    Positions,
    Retrieval,
    RetrievalGroup,
    Task,
    perplexity,
)
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
        if len(quality.models) > 1:
            panel.chart("tasks", "Difference from the base by task", task_figure(quality))
            panel.tables.append(_difference_table(quality))
    return panel


def task_figure(quality: EvalComparison) -> Figure:
    """Return a row per task, a point per model: its difference from the base in points, bars over the 95 % interval."""
    entries = quality.scores
    names = list(entries)[::-1]
    models = [model for model in model_order(quality.models) if model != "base"]
    traces = []
    for index, model in enumerate(models):
        changes = [entries[name].difference[model] for name in names]
        offset = 0.5 * ((index + 0.5) / len(models) - 0.5)
        traces.append(
            scatter(
                model,
                [100 * change.mean for change in changes],
                [row - offset for row in range(len(names))],
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
    value = task.models[model]
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
    models = model_order(quality.models)
    rows = [
        [_starred(name, task), task.metric, f"{task.items:,}", *(_value(task, model) for model in models)]
        for name, task in quality.scores.items()
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


# The forms of retrieval prompts: name and line.
FORMS = {
    "passkey": ("passkey", "solid"),
    "key_value": ("key-value", "dot"),
    "prose": ("fact in prose", "dash"),
    "json": ("JSON", "longdash"),
    "code": ("code", "dashdot"),
    "copy": ("copying", "longdashdot"),
}


def long_context_panel(sources: Sources) -> Panel:
    """Return what a window loses and short tasks do not show."""
    panel, quality = sources.panel("long-context", "Long context", "eval/comparison.json"), sources.quality
    if quality is None:
        return panel
    if quality.positions is None:
        panel.missing.append("no perplexity by position: run `layerboost evaluate --set evaluate.position_tokens=2048`")
    else:
        panel.notes.append(
            f"Perplexity by position in {quality.positions.sequences} texts of {quality.positions.edges[-1]:,} tokens: "
            "a window loses quality beyond its own length. Brackets and bars are 95 % intervals over the texts."
        )
        panel.chart("positions", "Perplexity by position", position_figure(quality.positions))
        panel.tables.append(_position_table(quality.positions))
    if quality.retrieval is None:
        panel.missing.append(
            "no retrieval test: run `layerboost evaluate --set 'evaluate.retrieval_tokens=[256, 2048]'`"
        )
    else:
        panel.notes.append(
            "Retrieval: the text states a fact, and the prompt ends by asking for it, or by repeating a passage to "
            "copy. Plans are chosen on passkeys and key-value pairs alone. Exact match is the fraction of prompts that "
            "greedy decoding answers; the log-probability of the right answer is the finer measure."
        )
        if unable := ", ".join(_name(group) for group in quality.retrieval.groups if not group.able):
            panel.notes.append(
                f"The base itself answers fewer than half of {unable}: compare only the log-probability there."
            )
        panel.chart("retrieval", "Retrieval by length", retrieval_figure(quality.retrieval))
        panel.tables.extend([_retrieval_table(quality.retrieval), _depth_table(quality.retrieval)])
    return panel


def position_figure(positions: Positions) -> Figure:
    """Return a line per model: perplexity in each bucket of positions."""
    traces, names = [], _buckets(positions)
    base = [score.mean for score in positions.models["base"]]
    for model in model_order(positions.models):
        values = [perplexity(score.mean) for score in positions.models[model]]
        ends = None
        if changes := positions.difference.get(model):
            pairs = list(zip(base, changes, strict=True))
            # The paired interval, around the base's own value.
            ends = [(perplexity(origin + change.low), perplexity(origin + change.high)) for origin, change in pairs]
        traces.append(scatter(model, names, values, model_color(model, positions.models), y_ends=ends))
    return figure(traces, "position, tokens", "perplexity", {"type": "category"})


def retrieval_figure(retrieval: Retrieval) -> Figure:
    """Return a line per model and kind: exact match against the length of the prompts."""
    traces = []
    for kind, (title, dash) in FORMS.items():
        groups = [group for group in retrieval.groups if group.kind == kind]
        models = model_order({model for group in groups for model in group.models})
        for model in models:
            color = model_color(model, models)
            traces.append(
                scatter(
                    f"{model}, {title}",
                    [_length(group) for group in groups],
                    [100 * group.models[model].value for group in groups],
                    color,
                    line={"color": color, "width": 2, "dash": dash},
                )
            )
    lengths = [_length(group) for group in sorted(retrieval.groups, key=lambda group: group.length_tokens)]
    x = {"type": "category", "categoryorder": "array", "categoryarray": list(dict.fromkeys(lengths))}
    return figure(traces, "prompt, tokens", "exact match, %", x, {"range": [-4, 104]})


def _length(group: RetrievalGroup) -> str:
    return f"{group.length_tokens:,}"


def _name(group: RetrievalGroup) -> str:
    return f"{FORMS[group.kind][0] if group.kind in FORMS else group.kind} at {_length(group)} tokens"


def _buckets(positions: Positions) -> list[str]:
    return [f"{low:,} to {high:,}" for low, high in pairwise(positions.edges)]


def _position_table(positions: Positions) -> Table:
    models = model_order(positions.models)
    changed = [model for model in models if model in positions.difference]
    rows = [
        [
            name,
            *(number(perplexity(positions.models[model][index].mean), 4) for model in models),
            *(with_interval(positions.difference[model][index]) for model in changed),
        ]
        for index, name in enumerate(_buckets(positions))
    ]
    header = ["tokens", *models, *(f"{model} − base, nats per token" for model in changed)]
    return Table("Perplexity by position", header, rows)


def _retrieval_table(retrieval: Retrieval) -> Table:
    def cells(group: RetrievalGroup, model: str) -> list[str]:
        exact = percent(group.models[model].value, 0) + ("" if group.able else " (base cannot)")
        change = group.log_probability_difference.get(model)
        nats = [with_error(group.log_probability[model]), with_interval(change)]
        return [_name(group), model, str(group.prompts), exact, *nats]

    header = ["task", "model", "prompts", "exact match", "log-probability, nats", "− base, nats"]
    rows = [cells(group, model) for group in retrieval.groups for model in model_order(group.models)]
    return Table("Retrieval", header, rows, text_columns=(0, 1))


def _depth_table(retrieval: Retrieval) -> Table:
    models = model_order(retrieval.groups[0].models)

    def cells(group: RetrievalGroup, depth: Depth) -> list[str]:
        values = [f"{percent(depth.exact[model], 0)}, {number(depth.log_probability[model])}" for model in models]
        return [_name(group), f"{100 * depth.low:.0f} to {100 * depth.high:.0f} %", str(depth.prompts), *values]

    rows = [cells(group, depth) for group in retrieval.groups for depth in group.depths]
    header = ["task", "depth of the fact", "prompts", *(f"{model}: exact match, nats" for model in models)]
    return Table("Retrieval by depth", header, rows, text_columns=(0, 1), folded=True)
