"""The long-context panel: loss by position, and retrieval by length and depth."""

from __future__ import annotations

import math
from itertools import pairwise

from layerboost.reporting.figures import Figure, figure, model_color, scatter
from layerboost.reporting.page import Panel, Table
from layerboost.reporting.sources import Sources, model_order
from layerboost.reporting.text import number, percent, with_error, with_interval
from layerboost.schemas.evaluation import Depth, Positions, Retrieval, RetrievalGroup

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
        values = [math.exp(score.mean) for score in positions.models[model]]
        ends = None
        if changes := positions.difference.get(model):
            pairs = list(zip(base, changes, strict=True))
            # The paired interval, around the base's own value.
            ends = [(math.exp(origin + change.low), math.exp(origin + change.high)) for origin, change in pairs]
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
            *(number(math.exp(positions.models[model][index].mean), 4) for model in models),
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
    models = model_order({model for group in retrieval.groups for model in group.models})

    def cells(group: RetrievalGroup, depth: Depth) -> list[str]:
        values = [f"{percent(depth.exact[model], 0)}, {number(depth.log_probability[model])}" for model in models]
        return [_name(group), f"{100 * depth.low:.0f} to {100 * depth.high:.0f} %", str(depth.prompts), *values]

    rows = [cells(group, depth) for group in retrieval.groups for depth in group.depths]
    header = ["task", "depth of the fact", "prompts", *(f"{model}: exact match, nats" for model in models)]
    return Table("Retrieval by depth", header, rows, text_columns=(0, 1), folded=True)
