"""The throughput panel, and the ratio the verdict states, from `bench/comparison.json`."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from layerboost.reporting.figures import layout, model_color
from layerboost.reporting.page import Chart, Panel, Table
from layerboost.reporting.sources import absent, model_order
from layerboost.reporting.text import ABSENT, number
from layerboost.serving.results import AtConcurrency, Comparison, Spread

FILE = "bench/comparison.json"
SPEED = "output_tokens_per_s"


@dataclass(frozen=True)
class Ratio:
    """One metric of one model against the reference at one concurrency; least and greatest over `rounds` rounds."""

    model: str
    reference: str
    concurrency: int
    rounds: int
    mean: float
    low: float
    high: float


def bench_ratio(bench: Comparison, metric: str = SPEED) -> Ratio | None:
    """The ratio at the highest concurrency that has one, of the healed model, or else the converted one."""
    for result in sorted(bench.results, key=lambda result: -result.concurrency):
        names = [name for name in model_order(result.ratios) if metric in result.ratios[name]]
        known = [name for name in names if name in ("converted", "healed")] or names
        if known:
            spread = result.ratios[known[-1]][metric]
            rounds = _rounds(bench, result.concurrency, known[-1])
            return Ratio(known[-1], bench.reference, result.concurrency, rounds, spread.mean, spread.min, spread.max)
    return None


def throughput_panel(bench: Comparison | None) -> Panel:
    """Output tokens per second against concurrency, and latencies."""
    if bench is None:
        return Panel("throughput", "Throughput", [FILE], [absent(FILE)])
    if not bench.results:
        return Panel("throughput", "Throughput", [FILE], [f"{FILE} holds no measurement yet: run `layerboost bench`"])
    warnings = []
    if not bench.complete:
        warnings.append(f"{FILE} is not complete ({len(bench.measurements)} runs): `layerboost bench` continues it")
    settings = bench.settings
    where = ", ".join(f"{key} {value}" for key, value in bench.environment.items())
    notes = [
        "One `vllm bench serve` a model, concurrency and round; values are means over the rounds, with the least and "
        f"the greatest in brackets; ratios are of the same round. Server: {where}."
    ]
    if {"requests_per_concurrency", "input_tokens", "output_tokens"} <= settings.keys():
        notes.append(
            f"{settings['requests_per_concurrency']:g} requests for each in flight, {settings['input_tokens']} tokens "
            f"in, {settings['output_tokens']} tokens out each."
        )
    chart = Chart("chart-throughput", "Output tokens per second", throughput_figure(bench))
    tables = [_speed_table(bench), _latency_table(bench)]
    return Panel("throughput", "Throughput", [FILE], [], warnings, None, notes, [chart], tables)


def throughput_figure(bench: Comparison) -> dict[str, Any]:
    """A line a model: output tokens per second against concurrency, bars from the least to the greatest round."""
    traces: list[dict[str, Any]] = []
    for name in model_order({name for result in bench.results for name in result.models}):
        found = [(result.concurrency, result.models[name][SPEED]) for result in bench.results if name in result.models]
        color = model_color(name)
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": escape(name),  # plotly reads tags in names
                "x": [concurrency for concurrency, _ in found],
                "y": [spread.mean for _, spread in found],
                "error_y": {
                    "type": "data",
                    "array": [spread.max - spread.mean for _, spread in found],
                    "arrayminus": [spread.mean - spread.min for _, spread in found],
                    "color": color,
                    "thickness": 1.5,
                    "width": 4,
                },
                "line": {"color": color, "width": 2},
                "marker": {"color": color, "size": 8},
                "customdata": [spread_text(spread) for _, spread in found],
                "hovertemplate": "concurrency %{x}: %{customdata} tokens/s<extra>%{fullData.name}</extra>",
            }
        )
    figure: dict[str, Any] = {"data": traces, "layout": layout("requests in flight", "output tokens/s")}
    figure["layout"]["xaxis"] |= {"tickvals": [result.concurrency for result in bench.results]}
    figure["layout"]["yaxis"] |= {"rangemode": "tozero"}
    return figure


def spread_text(spread: Spread, digits: int = 3) -> str:
    """A mean with the least and greatest of its rounds: 412 (405 to 420); alone where there was one round."""
    if spread.min == spread.max:
        return number(spread.mean, digits)
    return f"{number(spread.mean, digits)} ({number(spread.min, digits)} to {number(spread.max, digits)})"


def _rounds(bench: Comparison, concurrency: int, model: str) -> int:
    repeats = {
        name: {entry.repeat for entry in bench.measurements if (entry.model, entry.concurrency) == (name, concurrency)}
        for name in (model, bench.reference)
    }
    return len(repeats[model] & repeats[bench.reference])


def _speed_table(bench: Comparison) -> Table:
    def ratio(result: AtConcurrency, name: str) -> str:
        found = result.ratios.get(name, {}).get(SPEED)
        return "1" if name == bench.reference else ABSENT if found is None else spread_text(found)

    others = {"requests_per_s": "requests/s", "peak_rss_gib": "peak RSS, GiB", "kv_cache_tokens": "KV cache, tokens"}
    rows = [
        [
            str(result.concurrency),
            name,
            _metric(result, name, SPEED),
            ratio(result, name),
            *(_metric(result, name, key) for key in others),
        ]
        for result in bench.results
        for name in model_order(result.models)
    ]
    header = ["concurrency", "model", "output tokens/s", f"ratio to {bench.reference}", *others.values()]
    return Table("Throughput and memory", header, rows, text_columns=(1,))


def _latency_table(bench: Comparison) -> Table:
    keys = ("ttft_ms_median", "ttft_ms_p99", "tpot_ms_median", "tpot_ms_p99")
    rows = [
        [str(result.concurrency), name, *(_metric(result, name, key) for key in keys)]
        for result in bench.results
        for name in model_order(result.models)
    ]
    header = ["concurrency", "model", "TTFT median, ms", "TTFT p99, ms", "TPOT median, ms", "TPOT p99, ms"]
    return Table("Latency", header, rows, text_columns=(1,))


def _metric(result: AtConcurrency, name: str, key: str) -> str:
    spread = result.models[name].get(key)
    if spread is None:
        return ABSENT
    if key == "kv_cache_tokens":
        return f"{spread.mean:,.0f}"
    return spread_text(spread)
