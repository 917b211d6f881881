"""The throughput panel, accuracy against it, and the ratio the verdict states, from `bench/comparison.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from layerboost.reporting.figures import layout, model_color
from layerboost.reporting.page import Chart, Panel, Table
from layerboost.reporting.sources import MADE_BY, Sources, absent, model_order
from layerboost.reporting.text import ABSENT, interval, number, percent
from layerboost.schemas.evaluation import EvalComparison
from layerboost.serving.results import SPEED, AtConcurrency, Comparison, Spread

FILE = "bench/comparison.json"
# What the tables show of what was measured, with its title.
FURTHER = {
    "requests_per_s": "requests/s",
    "peak_rss_gib": "peak RSS, GiB",
    "gpu_memory_gib": "GPU memory, GiB",
    "kv_cache_tokens": "KV cache, tokens",
    "kv_usage_peak": "used at most",
    "preemptions": "preemptions",
    "prefix_hit_share": "prompt tokens from the prefix cache",
    "other_cores": "cores used by other processes",
}
SHARES = ("kv_usage_peak", "prefix_hit_share")
LATENCIES = {
    f"{kind}_ms_{statistic}": f"{kind.upper()} {statistic}, ms"
    for kind in ("ttft", "tpot", "itl")
    for statistic in ("median", "p99")
}


@dataclass(frozen=True)
class Ratio:
    """One metric of one model against the reference at one concurrency, and what disturbed either of them."""

    model: str
    reference: str
    concurrency: int
    spread: Spread
    warning: str


def bench_ratio(bench: Comparison, metric: str = SPEED) -> Ratio | None:
    """The ratio at the highest concurrency that has one, of the healed model, or else the converted one."""
    for result in sorted(bench.results, key=lambda result: -result.concurrency):
        names = [name for name in model_order(result.ratios) if metric in result.ratios[name]]
        known = [name for name in names if name in ("converted", "healed")] or names
        if known:
            spread, warning = result.ratios[known[-1]][metric], result.warning(bench.reference, known[-1])
            return Ratio(known[-1], bench.reference, result.concurrency, spread, warning)
    return None


def throughput_panel(sources: Sources) -> Panel:
    """Output tokens per second against concurrency, what accuracy goes with them, and latencies."""
    bench, quality = sources.bench, sources.quality
    files = [FILE, "eval/comparison.json"]
    if bench is None:
        return Panel("throughput", "Throughput", files, [absent(FILE)])
    if not bench.results:
        return Panel("throughput", "Throughput", files, [f"{FILE} holds no measurement yet: run `layerboost bench`"])
    missing = [] if quality else [f"accuracy against throughput: {absent('eval/comparison.json')}"]
    notes = [
        "One run of the load generator per model, concurrency and repeat; values are medians over the repeats, with "
        "the least and the greatest in brackets where there are several; ratios are taken within a repeat. "
        f"{environment(bench)}"
    ]
    settings = bench.settings
    if {"requests_per_concurrency", "input_tokens", "output_tokens"} <= settings.keys():
        shared = settings.get("shared_prefix_tokens")
        prefix = f"all behind one prefix of {shared:,} tokens that is in the cache, " if shared else ""
        notes.append(
            f"{settings['requests_per_concurrency']:g} requests for each in flight, {prefix}"
            f"{settings['input_tokens']:,} tokens in, {settings['output_tokens']:,} tokens out each."
        )
    charts = [Chart("chart-throughput", "Output tokens per second", throughput_figure(bench))]
    if quality and (figure := accuracy_figure(bench, quality)):
        charts.append(Chart("chart-accuracy", "Accuracy against throughput", figure))
        notes.append(
            "Accuracy is the average over tasks that chose no layers; its bars are the 95 % interval of the paired "
            "difference from the base, those of throughput the least and the greatest repeat. Numbers at the points "
            "are requests in flight."
        )
    elif quality:
        missing.append("accuracy against throughput: no model has both; run `layerboost evaluate` with tasks")
    warnings = bench_warnings(bench, FILE)
    if changed := sources.changed_since_bench:
        warnings.append(f"{', '.join(changed)} changed after the benchmark: delete bench/ and run `layerboost bench`")
    tables = [_speed_table(bench), _latency_table(bench)]
    return Panel("throughput", "Throughput", files, missing, warnings, notes=notes, charts=charts, tables=tables)


def environment(bench: Comparison) -> str:
    """What the numbers were measured on."""
    return f"Measured on: {', '.join(f'{key} {value}' for key, value in bench.environment.items())}."


def bench_warnings(bench: Comparison, file: str) -> list[str]:
    """Where measurements are still to come, and per point what else than the models its numbers show."""
    found = [
        f"concurrency {result.concurrency}{f', {result.output_tokens:,} tokens out' if result.output_tokens else ''}"
        f"{result.warning(*model_order(result.disturbed))}"
        for result in bench.results
        if result.disturbed
    ]
    if not bench.complete:
        found.append(f"{file} is not complete ({len(bench.measurements)} runs): `{MADE_BY[file]}` continues it")
    return found


def throughput_figure(bench: Comparison) -> dict[str, Any]:
    """A line a model: output tokens per second against concurrency, bars from the least to the greatest repeat."""
    return benchmark_figure(
        bench, SPEED, {result.concurrency: result for result in bench.results}, "requests in flight", "output tokens/s"
    )


def benchmark_figure(
    bench: Comparison, metric: str, results: Mapping[int, AtConcurrency], x_title: str, y_title: str, scale: float = 1.0
) -> dict[str, Any]:
    """A line a model: one metric, times `scale`, against what `results` are keyed by; bars over the repeats."""
    traces: list[dict[str, Any]] = []
    names = model_order({name for result in bench.results for name in result.models})
    for name in names:
        found = [
            (x, result.models[name][metric]) for x, result in results.items() if metric in result.models.get(name, {})
        ]
        color = model_color(name, names)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(name),  # plotly reads tags in names
                "x": [x for x, _ in found],
                "y": [scale * spread.median for _, spread in found],
                "error_y": _bars([spread for _, spread in found], color, scale),
                "line": {"color": color, "width": 2},
                "marker": {"color": color, "size": 8},
                "customdata": [spread.text(lambda value: number(scale * value)) for _, spread in found],
                "hovertemplate": f"{x_title} %{{x:,}}: %{{customdata}} {y_title}<extra>%{{fullData.name}}</extra>",
            }
        )
    figure: dict[str, Any] = {"data": traces, "layout": layout(x_title, y_title)}
    figure["layout"]["xaxis"] |= {"tickvals": list(results)}
    figure["layout"]["yaxis"] |= {"rangemode": "tozero"}
    return figure


def accuracy_figure(bench: Comparison, quality: EvalComparison) -> dict[str, Any] | None:
    """A point a model and concurrency: average accuracy against output tokens per second; None without both."""
    average = quality.average
    names = [name for name in model_order(bench.models) if average and name in average.models]
    if average is None or not names:
        return None
    traces: list[dict[str, Any]] = []
    for name in names:
        found = [(result.concurrency, result.models[name][SPEED]) for result in bench.results if name in result.models]
        value, color, change = 100 * average.models[name].value, model_color(name, names), average.difference.get(name)
        text = f"{number(value)} %"
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": "lines+markers+text",
            "name": escape(name),
            "x": [spread.median for _, spread in found],
            "y": [value] * len(found),
            "text": [str(concurrency) for concurrency, _ in found],
            # In turn above and below: near a machine's limit the points of two concurrencies lie close.
            "textposition": [("top center", "bottom center")[index % 2] for index in range(len(found))],
            "textfont": {"size": 11, "color": "var(--soft)"},
            "error_x": _bars([spread for _, spread in found], color),
            "line": {"color": color, "width": 1, "dash": "dot"},
            "marker": {"color": color, "size": 9},
        }
        if change:
            text += f", − base: {interval(100 * change.mean, 100 * change.low, 100 * change.high, signed=True)} points"
            low, high = (100 * (bound - change.mean) for bound in (change.low, change.high))
            sizes = {"array": [high] * len(found), "arrayminus": [-low] * len(found)}
            trace["error_y"] = {"type": "data", **sizes, "color": color, "thickness": 1.2, "width": 3}
        trace["customdata"] = [f"{spread.text(number)} tokens/s<br>{text}" for _, spread in found]
        trace["hovertemplate"] = "%{text} requests in flight: %{customdata}<extra>%{fullData.name}</extra>"
        traces.append(trace)
    return {"data": traces, "layout": layout("output tokens/s", "average accuracy, %")}


def _bars(spreads: list[Spread], color: str, scale: float = 1.0) -> dict[str, Any]:
    """Error bars from the least to the greatest repeat."""
    return {
        "type": "data",
        "array": [scale * (spread.max - spread.median) for spread in spreads],
        "arrayminus": [scale * (spread.median - spread.min) for spread in spreads],
        "color": color,
        "thickness": 1.5,
        "width": 4,
    }


def ratio_cell(bench: Comparison, result: AtConcurrency, name: str, metric: str) -> str:
    """A model's ratio to the reference, as a cell of a table."""
    found = result.ratios.get(name, {}).get(metric)
    if name == bench.reference:
        return "1"
    disturbed = {name, bench.reference} & result.disturbed.keys()
    return ABSENT if found is None else f"{found.as_ratio}{', disturbed' if disturbed else ''}"


def _speed_table(bench: Comparison) -> Table:
    others = measured(bench, FURTHER)
    rows = [
        [
            str(result.concurrency),
            name,
            metric_text(result, name, SPEED),
            ratio_cell(bench, result, name, SPEED),
            *(metric_text(result, name, key) for key in others),
        ]
        for result in bench.results
        for name in model_order(result.models)
    ]
    header = ["concurrency", "model", "output tokens/s", f"ratio to {bench.reference}", *others.values()]
    return Table("Throughput and memory", header, rows, text_columns=(1,))


def measured(bench: Comparison, metrics: Mapping[str, str]) -> dict[str, str]:
    """Those of `metrics` (titles by name) that any model has."""
    found = {key for result in bench.results for values in result.models.values() for key in values}
    return {key: title for key, title in metrics.items() if key in found}


def _latency_table(bench: Comparison) -> Table:
    keys = measured(bench, LATENCIES)
    rows = [
        [str(result.concurrency), name, *(metric_text(result, name, key) for key in keys)]
        for result in bench.results
        for name in model_order(result.models)
    ]
    return Table("Latency", ["concurrency", "model", *keys.values()], rows, text_columns=(1,))


def metric_text(result: AtConcurrency, name: str, key: str) -> str:
    """One metric of one model with its spread."""
    spread = result.models[name].get(key)
    if spread is None:
        return ABSENT
    if key == "kv_cache_tokens":
        return f"{spread.median:,.0f}"
    return percent(spread.median, 0) if key in SHARES else spread.text(number)
