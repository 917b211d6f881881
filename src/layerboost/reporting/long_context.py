"""The long-context panel: loss by position, and retrieval by length and depth."""

from __future__ import annotations

import math
from html import escape
from itertools import pairwise
from typing import Any

from layerboost.reporting.figures import layout, model_color
from layerboost.reporting.page import Chart, Panel, Table
from layerboost.reporting.sources import Sources, absent, model_order
from layerboost.reporting.text import ABSENT, interval, number, percent, with_error
from layerboost.schemas.evaluation import Positions, Retrieval, RetrievalGroup

FILE = "eval/comparison.json"
KINDS = {"passkey": "passkey", "key_value": "key-value"}
DASHES = {"passkey": "solid", "key_value": "dot"}


def long_context_panel(sources: Sources) -> Panel:
    """What a window breaks and short tasks cannot see."""
    panel = ("long-context", "Long context", [FILE])
    quality = sources.quality
    if quality is None:
        return Panel(*panel, [absent(FILE)])
    missing, notes, charts, tables = [], [], [], []
    if quality.positions is None:
        missing.append("no perplexity by position: run `layerboost evaluate --set evaluate.position_tokens=2048`")
    else:
        notes.append(
            f"Perplexity by position in {quality.positions.sequences} texts of {quality.positions.edges[-1]:,} tokens: "
            "a window that hurts does so beyond its own length. Brackets and bars are 95 % intervals over the texts."
        )
        charts.append(Chart("chart-positions", "Perplexity by position", position_figure(quality.positions)))
        tables.append(_position_table(quality.positions))
    if quality.retrieval is None:
        missing.append("no retrieval test: run `layerboost evaluate --set 'evaluate.retrieval_tokens=[256, 2048]'`")
    else:
        notes.append(
            "Retrieval: a fact told somewhere in the text, asked for at its end. Exact match is the share of prompts "
            "whose answer greedy decoding gives; the log-probability of the right answer is the finer measure."
        )
        notes += _unable(quality.retrieval)
        charts.append(Chart("chart-retrieval", "Retrieval by length", retrieval_figure(quality.retrieval)))
        tables += [_retrieval_table(quality.retrieval), _depth_table(quality.retrieval)]
    return Panel(*panel, missing, notes=notes, charts=charts, tables=tables)


def position_figure(positions: Positions) -> dict[str, Any]:
    """A line a model: perplexity in each bucket of positions."""
    names = _buckets(positions.edges)
    traces: list[dict[str, Any]] = []
    for model in model_order(positions.models):
        color = model_color(model, positions.models)
        values = [math.exp(score.mean) for score in positions.models[model]]
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": "lines+markers",
            "name": escape(model),
            "x": names,
            "y": values,
            "line": {"color": color, "width": 2},
            "marker": {"color": color, "size": 7},
            "customdata": [number(value, 4) for value in values],
            "hovertemplate": "tokens %{x}: %{customdata}<extra>%{fullData.name}</extra>",
        }
        if model in positions.difference:
            changes = positions.difference[model]
            base = [math.exp(score.mean) for score in positions.models["base"]]
            # The paired interval, laid upon the base's own value.
            bounds = [
                (start * math.exp(change.low), start * math.exp(change.high))
                for start, change in zip(base, changes, strict=True)
            ]
            trace["error_y"] = {
                "type": "data",
                "array": [high - value for (_, high), value in zip(bounds, values, strict=True)],
                "arrayminus": [value - low for (low, _), value in zip(bounds, values, strict=True)],
                "color": color,
                "thickness": 1.5,
                "width": 4,
            }
            trace["customdata"] = [
                f"{number(value, 4)}, NLL {interval(change.mean, change.low, change.high, signed=True)} nats per token"
                for value, change in zip(values, changes, strict=True)
            ]
        traces.append(trace)
    figure: dict[str, Any] = {"data": traces, "layout": layout("position, tokens", "perplexity")}
    figure["layout"]["xaxis"] |= {"type": "category"}
    return figure


def retrieval_figure(retrieval: Retrieval) -> dict[str, Any]:
    """A line a model and kind: share of prompts answered against their length."""
    traces: list[dict[str, Any]] = []
    for kind, title in KINDS.items():
        groups = [group for group in retrieval.groups if group.kind == kind]
        models = model_order({model for group in groups for model in group.models})
        for model in models:
            color = model_color(model, models)
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines+markers",
                    "name": f"{escape(model)}, {title}",
                    "x": [f"{group.length_tokens:,}" for group in groups],
                    "y": [100 * group.models[model].value for group in groups],
                    "line": {"color": color, "width": 2, "dash": DASHES[kind]},
                    "marker": {"color": color, "size": 8},
                    "customdata": [
                        f"log-probability {with_error(group.log_probability[model])} nats, {group.prompts} prompts"
                        for group in groups
                    ],
                    "hovertemplate": "%{x} tokens: %{y:.0f} %<br>%{customdata}<extra>%{fullData.name}</extra>",
                }
            )
    figure: dict[str, Any] = {"data": traces, "layout": layout("prompt, tokens", "exact match, %")}
    lengths = [f"{length:,}" for length in sorted({group.length_tokens for group in retrieval.groups})]
    figure["layout"]["xaxis"] |= {"type": "category", "categoryorder": "array", "categoryarray": lengths}
    figure["layout"]["yaxis"] |= {"range": [-4, 104]}
    return figure


def _unable(retrieval: Retrieval) -> list[str]:
    groups = [_name(group) for group in retrieval.groups if not group.able]
    if not groups:
        return []
    return [
        f"The base itself answers fewer than half of {', '.join(groups)}: there, look at the log-probability alone."
    ]


def _name(group: RetrievalGroup) -> str:
    return f"{KINDS.get(group.kind, group.kind)} at {group.length_tokens:,} tokens"


def _buckets(edges: list[int]) -> list[str]:
    return [f"{low:,} to {high:,}" for low, high in pairwise(edges)]


def _position_table(positions: Positions) -> Table:
    models = model_order(positions.models)
    changed = [model for model in models if model in positions.difference]
    rows = []
    for index, name in enumerate(_buckets(positions.edges)):
        values = [number(math.exp(positions.models[model][index].mean), 4) for model in models]
        changes = [positions.difference[model][index] for model in changed]
        rows.append([name, *values, *(interval(each.mean, each.low, each.high, signed=True) for each in changes)])
    header = ["tokens", *models, *(f"{model} − base, nats per token" for model in changed)]
    return Table("Perplexity by position", header, rows)


def _retrieval_table(retrieval: Retrieval) -> Table:
    rows = []
    for group in retrieval.groups:
        for model in model_order(group.models):
            change = group.log_probability_difference.get(model)
            rows.append(
                [
                    _name(group),
                    model,
                    str(group.prompts),
                    percent(group.models[model].value, 0) + ("" if group.able else " (base cannot)"),
                    with_error(group.log_probability[model]),
                    interval(change.mean, change.low, change.high, signed=True) if change else ABSENT,
                ]
            )
    header = ["task", "model", "prompts", "exact match", "log-probability, nats", "− base, nats"]
    return Table("Retrieval", header, rows, text_columns=(0, 1))


def _depth_table(retrieval: Retrieval) -> Table:
    models = model_order({model for group in retrieval.groups for model in group.models})
    rows = [
        [
            _name(group),
            f"{100 * depth.low:.0f} to {100 * depth.high:.0f} %",
            str(depth.prompts),
            *(f"{percent(depth.exact[model], 0)}, {number(depth.log_probability[model])}" for model in models),
        ]
        for group in retrieval.groups
        for depth in group.depths
    ]
    header = ["task", "depth of the fact", "prompts", *(f"{model}: exact match, nats" for model in models)]
    return Table("Retrieval by depth", header, rows, text_columns=(0, 1), folded=True)
