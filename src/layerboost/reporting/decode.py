"""The decoding panel: latency and memory against the length of the answers, from `bench/decode_sweep.json`."""

from __future__ import annotations

from layerboost.reporting.benchmark import (
    bench_warnings,
    benchmark_figure,
    environment,
    measured,
    metric_text,
    ratio_cell,
)
from layerboost.reporting.page import Chart, Panel, Table
from layerboost.reporting.sources import absent, model_order
from layerboost.serving.results import AtConcurrency, Comparison

FILE = "bench/decode_sweep.json"
LATENCY = "latency_ms_median"
# The first that was measured is drawn: what the model needs, else what the process holds.
MEMORY = {
    "kv_used_gib": "KV cache in use, GiB",
    "gpu_memory_gib": "GPU memory, GiB",
    "peak_rss_gib": "peak RSS, GiB",
}
COLUMNS = {
    LATENCY: "latency of an answer, median, ms",
    "latency_ms_p99": "p99, ms",
    "tpot_ms_median": "TPOT median, ms",
    **MEMORY,
}


def decode_panel(sweep: Comparison | None) -> Panel:
    """What one batch of answers takes and holds as they grow longer."""
    panel = ("decode", "Decoding against length", [FILE])
    if sweep is None:
        return Panel(*panel, [absent(FILE)])
    results = {result.output_tokens: result for result in sweep.results if result.output_tokens}
    if not results:
        return Panel(*panel, [f"{FILE} holds no measurement yet: run `layerboost bench --decode-sweep`"])
    batch = ", ".join(str(size) for size in sorted({result.concurrency for result in results.values()}))
    notes = [
        f"{batch} requests decode at once; latency is of a whole answer, first token included; values are medians over "
        f"the repeats, bars from the least to the greatest. {environment(sweep)}"
    ]
    charts = []
    if measured(sweep, {LATENCY: ""}):
        figure = benchmark_figure(sweep, LATENCY, results, "tokens in the answer", "latency, s", 1e-3)
        charts.append(Chart("chart-decode-latency", "Latency against length", figure))
    for metric, title in list(measured(sweep, MEMORY).items())[:1]:
        figure = benchmark_figure(sweep, metric, results, "tokens in the answer", title)
        charts.append(Chart("chart-decode-memory", "Memory against length", figure))
    tables = [_table(sweep, results)]
    return Panel(*panel, [], bench_warnings(sweep, FILE), notes=notes, charts=charts, tables=tables)


def _table(sweep: Comparison, results: dict[int, AtConcurrency]) -> Table:
    columns = measured(sweep, COLUMNS)

    rows = [
        [
            f"{length:,}",
            name,
            ratio_cell(sweep, result, name, LATENCY),
            *(metric_text(result, name, key) for key in columns),
        ]
        for length, result in results.items()
        for name in model_order(result.models)
    ]
    header = ["tokens", "model", f"latency, ratio to {sweep.reference}", *columns.values()]
    return Table("Decoding", header, rows, text_columns=(1,))
