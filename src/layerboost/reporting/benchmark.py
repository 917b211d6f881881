"""The panels of `bench/comparison.json` and `bench/decode_sweep.json`, and the ratio the verdict states."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from layerboost.files import file_hash
from layerboost.reporting.figures import Figure, figure, model_color, scatter
from layerboost.reporting.page import Panel, Table
from layerboost.reporting.sources import MADE_BY, Sources, model_order
from layerboost.reporting.text import ABSENT, number, percent
from layerboost.schemas.benchmark import SPEED, AtConcurrency, Comparison, Spread
from layerboost.schemas.evaluation import EvalComparison
from layerboost.schemas.run import last_made

FILE, SWEEP = "bench/comparison.json", "bench/decode_sweep.json"
LATENCY, RATIO = "latency_ms_median", "ratio of "
# Columns of the table of throughput and memory, if they were measured.
MEASURED = {
    "requests_per_s": "requests/s",
    "peak_rss_gib": "peak RSS, GiB",
    "gpu_memory_gib": "GPU memory, GiB",
    "kv_cache_tokens": "KV cache, tokens",
    "kv_usage_peak": "KV cache, peak use",
    "preemptions": "preemptions",
    "prefix_hit_share": "prompt tokens from the prefix cache",
    "other_cores": "cores used by other processes",
}
LATENCIES = {
    f"{kind}_ms_{statistic}": f"{kind.upper()} {statistic}, ms"
    for kind in ("ttft", "tpot", "itl")
    for statistic in ("median", "p99")
}
# The first that was measured is drawn: the memory that the model needs, or else that of the process.
MEMORY = {
    "kv_used_gib": "KV cache in use, GiB",
    "gpu_memory_gib": "GPU memory, GiB",
    "peak_rss_gib": "peak RSS, GiB",
}
DECODING = {
    LATENCY: "latency of an answer, median, ms",
    "latency_ms_p99": "p99, ms",
    "tpot_ms_median": "TPOT median, ms",
    **MEMORY,
}
# How a metric is written, if not as a number with its range.
WRITTEN: dict[str, Callable[[float], str]] = {
    "kv_cache_tokens": "{:,.0f}".format,
    "kv_usage_peak": partial(percent, digits=0),
    "prefix_hit_share": partial(percent, digits=0),
}


@dataclass(frozen=True)
class Ratio:
    """One metric of one model against the reference at one concurrency. `warning`: what disturbed either model."""

    model: str
    reference: str
    concurrency: int
    spread: Spread
    warning: str


def bench_ratio(bench: Comparison, metric: str = SPEED) -> Ratio | None:
    """Return the ratio at the highest concurrency that has one: of the healed model, or else the converted one."""
    for result in sorted(bench.results, key=lambda result: -result.concurrency):
        names = [name for name in model_order(result.ratios) if metric in result.ratios[name]]
        if names:
            name = last_made(names)
            warning = result.warning(bench.reference, name)
            return Ratio(name, bench.reference, result.concurrency, result.ratios[name][metric], warning)
    return None


def throughput_panel(sources: Sources) -> Panel:
    """Return output tokens per second against concurrency, accuracy against them, and latencies."""
    bench, quality = sources.bench, sources.quality
    panel = sources.panel("throughput", "Throughput", FILE, "eval/comparison.json")
    if bench is None:
        return panel
    panel.notes.append(
        "One run of the load generator per model, concurrency and repeat; values are medians over the repeats, with "
        "minimum and maximum in brackets if there are several; ratios are computed within a repeat. "
        f"{_environment(bench)}"
    )
    settings, shared = bench.settings, bench.settings.get("shared_prefix_tokens")
    prefix = f"all with one prefix of {shared:,} tokens that is in the cache, " if shared else ""
    panel.notes.append(
        f"{settings['requests_per_concurrency']:g} times as many requests as are concurrent, {prefix}"
        f"{settings['input_tokens']:,} tokens in, {settings['output_tokens']:,} tokens out each."
    )
    panel.chart("throughput", "Output tokens per second", throughput_figure(bench))
    if quality and (drawn := accuracy_figure(bench, quality)):
        panel.chart("accuracy", "Accuracy against throughput", drawn)
        panel.notes.append(
            "Accuracy is the average over tasks that chose no layers; its bars are the 95 % interval of the paired "
            "difference from the base, those of throughput minimum and maximum over the repeats. Numbers at the points "
            "are concurrent requests."
        )
    elif quality:
        panel.missing.append("accuracy against throughput: no model has both; run `layerboost evaluate` with tasks")
    panel.warnings.extend(_warnings(bench, FILE))
    configs = {name: sources.run / name / "config.json" for name in bench.models}
    changed = [name for name, file in configs.items() if file.is_file() and file_hash(file) != bench.models[name]]
    if changed:
        panel.warnings.append(
            f"{', '.join(changed)} changed after the benchmark: delete bench/ and run `layerboost bench`"
        )
    results = {str(result.concurrency): result for result in bench.results}
    speed = {SPEED: "output tokens/s", RATIO + SPEED: f"ratio to {bench.reference}"}
    panel.tables.append(_table("Throughput and memory", bench, "concurrency", results, speed | MEASURED))
    panel.tables.append(_table("Latency", bench, "concurrency", results, LATENCIES))
    return panel


def decode_panel(sources: Sources) -> Panel:
    """Return latency and memory of one batch of answers against their length."""
    panel, sweep = sources.panel("decode", "Decoding against length", SWEEP), sources.sweep
    if sweep is None:
        return panel
    results = {result.output_tokens: result for result in sweep.results if result.output_tokens}
    batch = ", ".join(str(size) for size in sorted({result.concurrency for result in results.values()}))
    panel.notes.append(
        f"{batch} requests decode at once; latency is of a whole answer, first token included; values are medians over "
        f"the repeats, bars go from minimum to maximum. {_environment(sweep)}"
    )
    latency = _lines(LATENCY, results, "tokens in the answer", "latency, s", 1e-3)
    panel.chart("decode-latency", "Latency against length", latency)
    metric = _measured(sweep, MEMORY)[0]
    memory = _lines(metric, results, "tokens in the answer", MEMORY[metric])
    panel.chart("decode-memory", "Memory against length", memory)
    panel.warnings.extend(_warnings(sweep, SWEEP))
    panel.tables.append(decode_table(sweep))
    return panel


def decode_table(sweep: Comparison) -> Table:
    """Return latency, its ratio to the reference, and memory, per length of the answers and model."""
    results = {f"{result.output_tokens:,}": result for result in sweep.results if result.output_tokens}
    ratio = {RATIO + LATENCY: f"latency, ratio to {sweep.reference}"}
    return _table("Decoding", sweep, "tokens", results, ratio | DECODING)


def throughput_figure(bench: Comparison) -> Figure:
    """Return output tokens per second against concurrency."""
    results = {result.concurrency: result for result in bench.results}
    return _lines(SPEED, results, "concurrent requests", "output tokens/s")


def accuracy_figure(bench: Comparison, quality: EvalComparison) -> Figure | None:
    """Return average accuracy against output tokens per second, per model and concurrency; None without both."""
    average = quality.average
    names = [name for name in model_order(bench.models) if average and name in average.models]
    if average is None or not names:
        return None
    traces = []
    for name in names:
        spreads = {at.concurrency: at.models[name][SPEED] for at in bench.results if name in at.models}
        value, change, ends = 100 * average.models[name].value, average.difference.get(name), None
        if change:
            end = value + 100 * (change.low - change.mean), value + 100 * (change.high - change.mean)
            ends = [end] * len(spreads)
        color = model_color(name, names)
        traces.append(
            scatter(
                name,
                [spread.median for spread in spreads.values()],
                [value] * len(spreads),
                color,
                "lines+markers+text",
                x_ends=[(spread.min, spread.max) for spread in spreads.values()],
                y_ends=ends,
                text=[str(concurrency) for concurrency in spreads],
                # Alternately above and below: near a machine's limit the points of two concurrencies are close.
                textposition=[("top center", "bottom center")[index % 2] for index in range(len(spreads))],
                textfont={"size": 11, "color": "var(--soft)"},
                line={"color": color, "width": 1, "dash": "dot"},
            )
        )
    return figure(traces, "output tokens/s", "average accuracy, %")


def _lines(metric: str, results: Mapping[int, AtConcurrency], x_title: str, y_title: str, scale: float = 1.0) -> Figure:
    """Return one metric, times `scale`, against the keys of `results`, per model; bars over the repeats."""
    names = model_order({name for result in results.values() for name in result.models})
    traces = []
    for name in names:
        spreads = {x: at.models[name][metric] for x, at in results.items() if metric in at.models.get(name, {})}
        traces.append(
            scatter(
                name,
                spreads,
                [scale * spread.median for spread in spreads.values()],
                model_color(name, names),
                y_ends=[(scale * spread.min, scale * spread.max) for spread in spreads.values()],
            )
        )
    return figure(traces, x_title, y_title, {"tickvals": list(results)}, {"rangemode": "tozero"})


def _table(
    title: str, bench: Comparison, at: str, results: Mapping[str, AtConcurrency], titles: Mapping[str, str]
) -> Table:
    """Return a row per model and point, a key of `results`, whose column is `at`; `titles`: by metric, if measured.

    A metric that begins with RATIO is the ratio of another one to the reference.
    """
    shown = [key for key in titles if key.startswith(RATIO) or _measured(bench, [key])]
    rows = [
        [point, name, *(_cell(bench, result, name, key) for key in shown)]
        for point, result in results.items()
        for name in model_order(result.models)
    ]
    return Table(title, [at, "model", *(titles[key] for key in shown)], rows, text_columns=(1,))


def _cell(bench: Comparison, result: AtConcurrency, name: str, metric: str) -> str:
    """Return a model's metric, or its ratio to the reference and whether something disturbed either of them."""
    if metric.startswith(RATIO):
        if name == bench.reference:
            return "1"
        ratio = result.ratios.get(name, {}).get(metric.removeprefix(RATIO))
        disturbed = {name, bench.reference} & result.disturbed.keys()
        return ABSENT if ratio is None else f"{ratio.as_ratio}{', disturbed' if disturbed else ''}"
    spread = result.models[name].get(metric)
    if spread is None:
        return ABSENT
    return WRITTEN[metric](spread.median) if metric in WRITTEN else spread.text(number)


def _measured(bench: Comparison, metrics: Iterable[str]) -> list[str]:
    """Return those of `metrics` that any model has."""
    measured = {key for result in bench.results for values in result.models.values() for key in values}
    return [metric for metric in metrics if metric in measured]


def _environment(bench: Comparison) -> str:
    return f"Measured on: {', '.join(f'{key} {value}' for key, value in bench.environment.items())}."


def _warnings(bench: Comparison, file: str) -> list[str]:
    """Return a line per point whose numbers show more than the models, and one if measurements are missing."""
    warnings = [
        f"concurrency {result.concurrency}{f', {result.output_tokens:,} tokens out' if result.output_tokens else ''}"
        f"{result.warning(*model_order(result.disturbed))}"
        for result in bench.results
        if result.disturbed
    ]
    if not bench.complete:
        warnings.append(f"{file} is not complete ({len(bench.measurements)} runs): `{MADE_BY[file]}` continues it")
    return warnings
