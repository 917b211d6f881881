"""Throughput of models under vLLM in three workloads, each beside its roofline; KV capacity beside its arithmetic.

    python benchmarks/serving.py --run runs/serving --out docs/results/serving base=MODEL mild=runs/a/healed ...

`layerboost bench` once a workload, the first model being the reference: every concurrency once, the highest `--repeats`
times. The same command goes on where it stopped. The roofline takes the bytes a second and FLOP/s of this machine,
measured first, and the bytes and FLOPs that a model's plan needs. Writes OUT.json and OUT.md and prints both; a page
that is there keeps its other workloads, each with its own command and machine.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from layerboost.artifacts import LayerPlan, ModelInfo, write_json, write_text
from layerboost.engines.vllm import cache_defaults, flags_given, runs_on_cpu
from layerboost.model.checkpoint import Source, load_config, model_info, plan_in
from layerboost.model.linear import linear
from layerboost.model.memory import (
    CacheSettings,
    admission_bytes,
    block_bytes,
    resident_bytes,
)
from layerboost.recipe import Bench, Recipe
from layerboost.reporting.text import ABSENT, number, percent
from layerboost.runtime import GIB, machine, versions
from layerboost.search.costs import decode_work, prefill_work
from layerboost.serving.results import Comparison, Spread
from layerboost.stages.bench import BASE, run_bench

WORKLOADS: dict[str, dict[str, int]] = {
    "chat": {"input_tokens": 128, "output_tokens": 256},
    "shared": {"shared_prefix_tokens": 2048, "input_tokens": 128, "output_tokens": 128},
    "memory": {"input_tokens": 1024, "output_tokens": 128},
}
TITLES = {"chat": "Chat", "shared": "Shared context", "memory": "Memory-bound"}
# KV memory beyond what the reference holds at the highest concurrency, so that nothing is preempted.
ROOM = 1.25
VECTOR, MATRIX, ROUNDS = 8192, 2048, 7


@dataclass(frozen=True)
class Rates:
    """What this machine reads and multiplies in a second at its best."""

    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Model:
    """What the arithmetic needs of one."""

    info: ModelInfo
    layers: list[LayerPlan]
    quantised: str | None


def described(folder: Path) -> Model:
    """A checkpoint's plan, or every layer full; how its weights are quantised, if they are."""
    source = Source(folder.name, folder)
    config = load_config(source)
    quantised = (getattr(config, "quantization_config", None) or {}).get("format")
    plan = plan_in(folder)
    if plan is not None:
        return Model(plan.model, plan.layers, quantised)
    info = model_info(source, config, torch.float32 if runs_on_cpu() else torch.bfloat16)
    return Model(info, [LayerPlan(layer=layer, attention="full") for layer in range(info.layers)], quantised)


def measured_rates(file: Path) -> Rates:
    """Bytes and FLOPs a second of a matrix times a vector and of two matrices, measured once a run folder."""
    if file.is_file():
        return Rates(**json.loads(file.read_text()))
    device = "cpu" if runs_on_cpu() else "cuda"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    tall, vector = (
        torch.randn(VECTOR, VECTOR, device=device, dtype=dtype),
        torch.randn(VECTOR, device=device, dtype=dtype),
    )
    square = torch.randn(MATRIX, MATRIX, device=device, dtype=dtype)

    def seconds(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            work()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times)

    rates = Rates(
        bytes_per_s=tall.numel() * tall.element_size() / seconds(lambda: tall @ vector),
        flops_per_s=2 * MATRIX**3 / seconds(lambda: linear(square, square)),
    )
    write_json(file, asdict(rates))
    return rates


def ideal_tokens_per_s(
    model: Model, bench: Bench, concurrency: int, engine: CacheSettings, rates: Rates
) -> float | None:
    """Output tokens a second if nothing took time but this machine's reading and multiplying, all requests in step.

    Products with weights take the longer of the two, the KV cache its reading, prefill its FLOPs. As many requests
    decode at once as the KV memory holds. None for quantised weights: the rates are of other products.
    """
    if model.quantised:
        return None
    known = bench.shared_prefix_tokens
    prompt = known + bench.input_tokens
    held = resident_bytes(model.info, model.layers, prompt + bench.output_tokens, engine)
    held -= resident_bytes(model.info, model.layers, known, engine) if known else 0
    at_once = max(1, min(concurrency, int(bench.kv_cache_gib * GIB) // max(held, 1)))
    _, _, weights, flops, cache, _ = decode_work(model.info, model.layers, at_once, prompt + bench.output_tokens // 2)
    step_s = max(weights / rates.bytes_per_s, flops / rates.flops_per_s) + cache / rates.bytes_per_s
    read = prefill_work(model.info, model.layers, prompt, prompt)
    if known:
        read -= prefill_work(model.info, model.layers, known, known)
    prefill_s = (read[3] + read[5]) / rates.flops_per_s
    return bench.output_tokens / (prefill_s + bench.output_tokens * step_s / at_once)


def benches(asked: argparse.Namespace, reference: Model) -> dict[str, Bench]:
    """The settings of each workload."""
    engine, found = cache_defaults(), {}
    for name in asked.workloads:
        lengths = {key: max(1, tokens // asked.shorter) for key, tokens in WORKLOADS[name].items()}
        top = max(asked.concurrency)
        longest = lengths["input_tokens"] + lengths["output_tokens"]
        holds = asked.base_requests if name == "memory" else ROOM * top
        held = holds * resident_bytes(reference.info, reference.layers, longest, engine)
        if prefix := lengths.get("shared_prefix_tokens"):
            held += ROOM * resident_bytes(reference.info, reference.layers, prefix, engine)
        # On a CPU `bench` hands this on itself.
        memory = () if runs_on_cpu() else ("--kv-cache-memory-bytes", str(int(held)))
        found[name] = Bench(
            **lengths,
            concurrency=(top,) if name == "memory" else tuple(asked.concurrency),
            requests_per_concurrency=asked.requests_per_concurrency,
            repeats=1 if name == "memory" else asked.repeats,
            kv_cache_gib=held / GIB,
            port=asked.port,
            server_args=(*shlex.split(asked.server_args), *memory),
        )
    return found


def measure(bench: Bench, run: Path, folders: dict[str, Path]) -> Comparison:
    """Every concurrency once, then the highest until it has its repeats."""
    run_bench(Recipe(bench=bench.model_copy(update={"repeats": 1})), run, folders)
    last = bench.model_copy(update={"concurrency": (max(bench.concurrency),)})
    return Comparison.model_validate(run_bench(Recipe(bench=last), run, folders))


def used_engine(comparison: Comparison) -> CacheSettings:
    """The settings that the KV arithmetic depends on, as the servers had them."""
    default, given = cache_defaults(), flags_given(comparison.settings["server_args"])
    return CacheSettings(
        given.get("max_num_batched_tokens", default.max_batched_tokens),
        given.get("block_size", default.block_size),
        default.concurrent_batches,
    )


def speed_rows(bench: Bench, comparison: Comparison, models: dict[str, Model], rates: Rates) -> list[dict[str, Any]]:
    """A row a concurrency and model."""
    engine, rows = used_engine(comparison), []
    for at in comparison.results:
        ideals = {
            name: ideal_tokens_per_s(model, bench, at.concurrency, engine, rates) for name, model in models.items()
        }
        for name in models:
            found = at.models[name]
            ratio = at.ratios.get(name, {}).get("output_tokens_per_s")
            ideal, of_reference = ideals[name], ideals[comparison.reference]
            rows.append(
                {
                    "concurrency": at.concurrency,
                    "model": name,
                    "metrics": {key: spread.model_dump() for key, spread in found.items()},
                    "ratio": ratio.model_dump() if ratio else None,
                    "disturbed": at.warning(comparison.reference, name),
                    "ideal_tokens_per_s": ideal,
                    "ideal_ratio": ideal / of_reference if ideal and of_reference else None,
                    "share_of_ideal": found["output_tokens_per_s"].median / ideal if ideal else None,
                }
            )
    return rows


def capacity_rows(bench: Bench, comparison: Comparison, models: dict[str, Model]) -> list[dict[str, Any]]:
    """Requests of the longest context that vLLM says fit, and as many by the arithmetic."""
    engine, rows = used_engine(comparison), []
    for name, model in models.items():
        entry = next(entry for entry in comparison.measurements if entry.model == name)
        context = entry.kv_context_tokens
        if context is None or not runs_on_cpu():
            continue
        block = block_bytes(model.info, model.layers, engine)
        pool = int(bench.kv_cache_gib * GIB) // block * block
        predicted = pool / admission_bytes(model.info, model.layers, context, engine)
        reported = entry.metrics["kv_max_concurrency"]
        rows.append(
            {
                "model": name,
                "context_tokens": context,
                "requests": reported,
                "requests_predicted": predicted,
                "off": predicted / reported - 1,
            }
        )
    return rows


def spread(found: dict[str, Any] | None) -> str:
    """A median with its least and greatest, where there were several repeats."""
    return "1" if found is None else Spread(**found).text(number)


def words(model: Model) -> str:
    """A plan in a few words."""
    count = Counter(entry.attention for entry in model.layers)
    found = ", ".join(f"{count[kind]} {kind}" for kind in ("full", "sliding", "none") if count[kind])
    windows, sinks = {entry.window for entry in model.layers if entry.window}, sum(e.sink for e in model.layers)
    found += "".join(f"; window {window}, {sinks} sinks" for window in windows)
    return found + (f"; weights {model.quantised}" if model.quantised else "")


COLUMNS = {
    "ttft_ms_median": "TTFT, ms",
    "ttft_ms_p99": "p99",
    "tpot_ms_median": "TPOT, ms",
    "itl_ms_p99": "ITL p99, ms",
    "kv_usage_peak": "KV used",
    "preemptions": "preempted",
    "peak_rss_gib": "RSS, GiB",
}


def page(parts: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    lines = [
        "# Serving",
        "",
        "Ratios are of output tokens/s in the same repeat, the median with the least and the greatest; `ideal` is the "
        "roofline's ratio, `share` what is reached of a model's own roofline: bytes and FLOPs of its plan at the "
        "machine's rates. A share above 100 % is no error: a prefix that all requests read comes from the CPU's cache, "
        "faster than from memory. Quantised weights have no roofline here: the machine's rates are of unquantised "
        "products.",
        "",
    ]
    for name, part in parts.items():
        lengths = f"{part['settings']['input_tokens']} tokens in, {part['settings']['output_tokens']} out"
        if prefix := part["settings"]["shared_prefix_tokens"]:
            lengths = f"a prefix of {prefix:,} in the cache, {lengths}"
        lines += [f"## {TITLES[name]}: {lengths}", "", "```console", f"$ {part['command']}", "```", ""]
        rates, plans = part["rates"], " ".join(f"{model}: {plan}." for model, plan in part["plans"].items())
        speeds = f"{rates['bytes_per_s'] / 1e9:.1f} GB/s, {rates['flops_per_s'] / 1e9:.0f} GFLOP/s"
        lines += [f"{part['machine']}, {speeds}; vLLM {part['vllm']}. {plans}", ""]
        lines += [*speed_table(part), *capacity_table(part)]
    return "\n".join(lines)


def speed_table(part: dict[str, Any]) -> list[str]:
    """A row a concurrency and model."""
    settings = part["settings"]
    served = " ".join(settings["server_args"]) or "vLLM's own settings"
    lines = [
        f"{settings['requests_per_concurrency']:g} × as many requests as are in flight; "
        f"{settings['kv_cache_gib']:.2f} GiB of KV cache; all models with {served}.",
        "",
        "| in flight | model | output tokens/s | ratio | ideal | share | " + " | ".join(COLUMNS.values()) + " |",
        "|" + "---|" * (6 + len(COLUMNS)),
    ]
    for row in part["speed"]:
        cells = [spread(row["metrics"].get(key)) if key in row["metrics"] else "" for key in COLUMNS]
        speed, ratio = spread(row["metrics"]["output_tokens_per_s"]), f"{spread(row['ratio'])}{row['disturbed']}"
        ideal = ABSENT if row["ideal_ratio"] is None else f"{row['ideal_ratio']:.2f}"
        share = ABSENT if row["share_of_ideal"] is None else percent(row["share_of_ideal"], 0)
        lines.append(f"| {' | '.join([str(row['concurrency']), row['model'], speed, ratio, ideal, share, *cells])} |")
    return [*lines, ""]


def capacity_table(part: dict[str, Any]) -> list[str]:
    """Requests that fit, by vLLM and by arithmetic."""
    if not part["capacity"]:
        return []
    lines = ["| model | context | requests that fit, by vLLM | by arithmetic | off |", "|---|---|---|---|---|"]
    for row in part["capacity"]:
        cells = [row["model"], f"{row['context_tokens']:,}", f"{row['requests']:.2f}"]
        cells += [f"{row['requests_predicted']:.2f}", f"{row['off']:+.1%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def main() -> None:
    """Measure what is missing, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--run", type=Path, required=True, help="results are kept there; the same folder goes on")
    parser.add_argument("--out", type=Path, required=True, help="without suffix: OUT.json, OUT.md")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[50, 100, 200])
    parser.add_argument("--repeats", type=int, default=3, help="repeats of the highest concurrency, but for memory")
    parser.add_argument("--requests-per-concurrency", type=float, default=1.0)
    parser.add_argument("--base-requests", type=int, default=60, help="memory: requests that the reference holds")
    parser.add_argument("--shorter", type=int, default=1, help="divide every length by this, for a trial")
    parser.add_argument("--server-args", default="", help="for all models; needed where plans advise different flags")
    parser.add_argument("--port", type=int, default=8341)
    asked = parser.parse_args()
    folders = {name: Path(folder) for name, folder in (model.split("=", 1) for model in asked.models)}
    if next(iter(folders)) != BASE and BASE in folders:
        parser.error(f"{BASE} is the reference: name it first")
    models = {name: described(folder) for name, folder in folders.items()}
    about: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "versions": versions(),
        "rates": asdict(measured_rates(asked.run / "rates.json")),
    }
    rates, file = Rates(**about["rates"]), asked.out.with_suffix(".json")
    parts: dict[str, Any] = {}
    for workload, bench in benches(asked, next(iter(models.values()))).items():
        started = time.monotonic()
        comparison = measure(bench, asked.run / workload, folders)
        print(f"{workload}: {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        parts[workload] = about | {
            "vllm": comparison.environment["vllm"],
            "plans": {name: words(model) for name, model in models.items()},
            "settings": comparison.settings,
            "speed": speed_rows(bench, comparison, models, rates),
            "capacity": capacity_rows(bench, comparison, models),
        }
    before = json.loads(file.read_text()) if file.is_file() else {}
    parts = (before["parts"] if before.get("schema_version") == 2 else {}) | parts
    parts = {name: parts[name] for name in TITLES if name in parts}
    write_json(file, {"schema_version": 2, "parts": parts})
    write_text(asked.out.with_suffix(".md"), page(parts))
    print(page(parts))
    print(json.dumps(parts))


if __name__ == "__main__":
    main()
