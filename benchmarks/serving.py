"""Throughput of models under vLLM in three workloads, each with its roofline; KV capacity with its arithmetic.

    python benchmarks/serving.py --run runs/serving --out docs/results/serving base=MODEL mild=runs/a/healed ...

`layerboost bench` once per workload, the first model being the reference: every concurrency once, the highest
`--repeats` times. The same command goes on where it stopped. The roofline takes the bytes and FLOPs per second of this
machine, measured first, and the bytes and FLOPs that a model's plan needs. Writes OUT.json and OUT.md; a page that is
there keeps its other workloads, each with its own command and machine.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timing
import torch

from layerboost.benching.stage import run_bench
from layerboost.costs.budget import decode_work, prefill_work
from layerboost.costs.memory import CacheSettings, admission_bytes, block_bytes, resident_bytes
from layerboost.engines.vllm import cache_defaults, flags_given, runs_on_cpu
from layerboost.files import write_text
from layerboost.model.base import find_model
from layerboost.model.checkpoint import plan_in
from layerboost.model.linear import linear
from layerboost.recipe import Bench, Recipe
from layerboost.reporting.page import Table, markdown_table
from layerboost.reporting.text import ABSENT, number, percent
from layerboost.runtime import GIB, Runtime, machine, versions
from layerboost.schemas.artifact import write_json
from layerboost.schemas.benchmark import Comparison, Spread
from layerboost.schemas.model import ModelInfo
from layerboost.schemas.plan import LayerPlan, all_full, counted, window_of
from layerboost.schemas.run import BASE

WORKLOADS: dict[str, dict[str, int]] = {
    "chat": {"input_tokens": 128, "output_tokens": 256},
    "shared": {"shared_prefix_tokens": 2048, "input_tokens": 128, "output_tokens": 128},
    "memory": {"input_tokens": 1024, "output_tokens": 128},
}
TITLES = {"chat": "Chat", "shared": "Shared context", "memory": "Memory-bound"}
# KV memory beyond what the reference holds at the highest concurrency, so that nothing is preempted.
ROOM = 1.25
VECTOR, MATRIX, TRIES = 8192, 2048, 7
COLUMNS = {
    "ttft_ms_median": "TTFT, ms",
    "ttft_ms_p99": "p99",
    "tpot_ms_median": "TPOT, ms",
    "itl_ms_p99": "ITL p99, ms",
    "kv_usage_peak": "KV used",
    "preemptions": "preempted",
    "peak_rss_gib": "RSS, GiB",
}
INTRODUCTION = """# Serving

Ratios are of output tokens/s in the same repeat, the median with the least and the greatest; `ideal` is the roofline's
ratio, `share` what is reached of a model's own roofline: bytes and FLOPs of its plan at the machine's rates. A share
above 100 % is no error: a prefix that all requests read comes from the CPU's cache, faster than from memory. Quantised
weights have no roofline here: the machine's rates are of unquantised products."""


@dataclass(frozen=True)
class Model:
    """What the arithmetic needs of a checkpoint."""

    info: ModelInfo
    layers: list[LayerPlan]
    quantised: str | None

    @staticmethod
    def read(folder: Path) -> Model:
        """The checkpoint's plan, or every layer full; how its weights are quantised, if they are."""
        dtype = torch.float32 if runs_on_cpu() else torch.bfloat16
        found = find_model(str(folder), Runtime(torch.device("cpu"), dtype))
        quantised = (getattr(found.config, "quantization_config", None) or {}).get("format")
        if plan := plan_in(folder):
            return Model(plan.model, plan.layers, quantised)
        return Model(found.info, all_full(found.info), quantised)

    @property
    def words(self) -> str:
        """The plan in a few words."""
        found = counted(self.layers)
        if window := window_of(self.layers):
            found += f"; window {window}, {sum(entry.sink for entry in self.layers)} sinks"
        return found + (f"; weights {self.quantised}" if self.quantised else "")


def rates() -> dict[str, float]:
    """Bytes and FLOPs per second of a matrix times a vector and of two matrices, at this machine's best."""
    on_cpu = runs_on_cpu()
    place: dict[str, Any] = {
        "device": "cpu" if on_cpu else "cuda",
        "dtype": torch.float32 if on_cpu else torch.bfloat16,
    }
    tall, vector = torch.randn(VECTOR, VECTOR, **place), torch.randn(VECTOR, **place)
    square = torch.randn(MATRIX, MATRIX, **place)

    def least(call: Callable[[], float]) -> float:
        return min(timing.seconds(call) for _ in range(TRIES))

    # float() waits for a GPU.
    return {
        "bytes_per_s": tall.numel() * tall.element_size() / least(lambda: float((tall @ vector)[0])),
        "flops_per_s": 2 * MATRIX**3 / least(lambda: float(linear(square, square)[0, 0])),
    }


def ideal_tokens_per_s(
    model: Model, bench: Bench, concurrency: int, engine: CacheSettings, rates: dict[str, float]
) -> float:
    """Output tokens per second if nothing took time but this machine's reading and multiplying, all requests in step.

    Products with weights take the longer of the two, the KV cache its reading, prefill its FLOPs. As many requests
    decode at once as the KV memory holds.
    """
    known = bench.shared_prefix_tokens
    prompt = known + bench.input_tokens
    held = resident_bytes(model.info, model.layers, prompt + bench.output_tokens, engine)
    held -= resident_bytes(model.info, model.layers, known, engine) if known else 0
    at_once = max(1, min(concurrency, int(bench.kv_cache_gib * GIB) // max(held, 1)))
    _, _, weights, flops, cache, *_ = decode_work(model.info, model.layers, at_once, prompt + bench.output_tokens // 2)
    step_s = max(weights / rates["bytes_per_s"], flops / rates["flops_per_s"]) + cache / rates["bytes_per_s"]
    read = prefill_work(model.info, model.layers, prompt, prompt)
    if known:
        read -= prefill_work(model.info, model.layers, known, known)
    prefill_s = (read[3] + read[5]) / rates["flops_per_s"]
    return float(bench.output_tokens / (prefill_s + bench.output_tokens * step_s / at_once))


def settings(name: str, asked: argparse.Namespace, reference: Model) -> Bench:
    """The settings of a workload."""
    lengths = {key: max(1, tokens // asked.shorter) for key, tokens in WORKLOADS[name].items()}
    engine, top = cache_defaults(), max(asked.concurrency)
    longest = lengths["input_tokens"] + lengths["output_tokens"]
    holds = asked.base_requests if name == "memory" else ROOM * top
    held = holds * resident_bytes(reference.info, reference.layers, longest, engine)
    if prefix := lengths.get("shared_prefix_tokens"):
        held += ROOM * resident_bytes(reference.info, reference.layers, prefix, engine)
    # On a CPU `bench` hands this on itself.
    memory = () if runs_on_cpu() else ("--kv-cache-memory-bytes", str(int(held)))
    return Bench(
        **lengths,
        concurrency=(top,) if name == "memory" else tuple(asked.concurrency),
        requests_per_concurrency=asked.requests_per_concurrency,
        repeats=1 if name == "memory" else asked.repeats,
        kv_cache_gib=held / GIB,
        port=asked.port,
        server_args=(*shlex.split(asked.server_args), *memory),
    )


def measure(bench: Bench, run: Path, folders: dict[str, Path]) -> Comparison:
    """Every concurrency once, then the highest until it has its repeats."""
    run_bench(Recipe(bench=bench.model_copy(update={"repeats": 1})), run, folders)
    last = bench.model_copy(update={"concurrency": (max(bench.concurrency),)})
    return run_bench(Recipe(bench=last), run, folders)


def used_engine(comparison: Comparison) -> CacheSettings:
    """The settings that the KV arithmetic depends on, as the servers had them."""
    default, given = cache_defaults(), flags_given(comparison.settings["server_args"])
    return CacheSettings(
        given.get("max_num_batched_tokens", default.max_batched_tokens),
        given.get("block_size", default.block_size),
        default.concurrent_batches,
    )


def speed_rows(
    bench: Bench, found: Comparison, models: dict[str, Model], rates: dict[str, float]
) -> list[dict[str, Any]]:
    """A row for each concurrency and model."""
    rows = []
    for at in found.results:
        ideals = {
            name: None if m.quantised else ideal_tokens_per_s(m, bench, at.concurrency, used_engine(found), rates)
            for name, m in models.items()
        }
        of_reference = ideals[found.reference]
        for name, ideal in ideals.items():
            ratio = at.ratios.get(name, {}).get("output_tokens_per_s")
            rows.append(
                {
                    "concurrency": at.concurrency,
                    "model": name,
                    "metrics": {key: spread.model_dump() for key, spread in at.models[name].items()},
                    "ratio": ratio.model_dump() if ratio else None,
                    "disturbed": at.warning(found.reference, name),
                    "ideal_tokens_per_s": ideal,
                    "ideal_ratio": ideal / of_reference if ideal and of_reference else None,
                    "share_of_ideal": at.models[name]["output_tokens_per_s"].median / ideal if ideal else None,
                }
            )
    return rows


def capacity_rows(bench: Bench, found: Comparison, models: dict[str, Model]) -> list[dict[str, Any]]:
    """Requests of the longest context that vLLM says fit, and as many by the arithmetic."""
    engine, rows = used_engine(found), []
    for name, model in models.items():
        entry = next(entry for entry in found.measurements if entry.model == name)
        context = entry.kv_context_tokens
        if context is None or not runs_on_cpu():
            continue
        block = block_bytes(model.info, model.layers, engine)
        pool = int(bench.kv_cache_gib * GIB) // block * block
        predicted = pool / admission_bytes(model.info, model.layers, context, engine)
        said = entry.metrics["kv_max_concurrency"]
        row = {"model": name, "context_tokens": context, "requests": said, "requests_predicted": predicted}
        rows.append(row | {"off": predicted / said - 1})
    return rows


def page(parts: dict[str, dict[str, Any]]) -> str:
    """The results as Markdown."""
    blocks = [INTRODUCTION]
    for name, part in parts.items():
        bench, rates = part["settings"], part["rates"]
        lengths = f"{bench['input_tokens']} tokens in, {bench['output_tokens']} out"
        if prefix := bench["shared_prefix_tokens"]:
            lengths = f"a prefix of {prefix:,} in the cache, {lengths}"
        speeds = f"{rates['bytes_per_s'] / 1e9:.1f} GB/s, {rates['flops_per_s'] / 1e9:.0f} GFLOP/s"
        plans = " ".join(f"{model}: {plan}." for model, plan in part["plans"].items())
        served = " ".join(bench["server_args"]) or "vLLM's own settings"
        blocks += [
            f"## {TITLES[name]}: {lengths}",
            f"```console\n$ {part['command']}\n```",
            f"{part['machine']}, {speeds}; vLLM {part['vllm']}. {plans}",
            f"{bench['requests_per_concurrency']:g} times as many requests as are concurrent; "
            f"{bench['kv_cache_gib']:.2f} GiB of KV cache; all models with {served}.",
            speed_table(part["speed"]),
        ]
        if part["capacity"]:
            blocks.append(capacity_table(part["capacity"]))
    return "\n\n".join(blocks) + "\n"


def speed_table(rows: list[dict[str, Any]]) -> str:
    """A row for each concurrency and model."""

    def spread(found: dict[str, Any] | None) -> str:
        return "1" if found is None else Spread(**found).text(number)

    lines = []
    for row in rows:
        ideal, share, metrics = row["ideal_ratio"], row["share_of_ideal"], row["metrics"]
        cells = [str(row["concurrency"]), row["model"], spread(metrics["output_tokens_per_s"])]
        cells += [spread(row["ratio"]) + row["disturbed"], ABSENT if ideal is None else f"{ideal:.2f}"]
        cells += [ABSENT if share is None else percent(share, 0)]
        lines.append([*cells, *(spread(metrics[key]) if key in metrics else "" for key in COLUMNS)])
    header = ["concurrency", "model", "output tokens/s", "ratio", "ideal", "share", *COLUMNS.values()]
    return markdown_table(Table("", header, lines, text_columns=(1,)))


def capacity_table(rows: list[dict[str, Any]]) -> str:
    """Requests that fit, by vLLM and by arithmetic."""
    formats = {"model": "", "context_tokens": ",", "requests": ".2f", "requests_predicted": ".2f", "off": "+.1%"}
    header = ["model", "context", "requests that fit, by vLLM", "by arithmetic", "off"]
    return markdown_table(Table("", header, [[format(row[key], how) for key, how in formats.items()] for row in rows]))


def main() -> None:
    """Measure what is missing, write, print."""
    parser = timing.parser(__doc__, repeats=3)
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--run", type=Path, required=True, help="results are kept there; the same folder goes on")
    parser.add_argument("--out", type=Path, required=True, help="without suffix: OUT.json, OUT.md")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--concurrency", nargs="+", type=int, default=[50, 100, 200])
    parser.add_argument("--requests-per-concurrency", type=float, default=1.0)
    parser.add_argument("--base-requests", type=int, default=60, help="memory: requests that the reference holds")
    parser.add_argument("--shorter", type=int, default=1, help="divide every length by this, for a trial")
    parser.add_argument("--server-args", default="", help="for all models; needed where plans advise different flags")
    parser.add_argument("--port", type=int, default=8341)
    asked = parser.parse_args()
    folders = timing.folders(asked.models)
    if next(iter(folders)) != BASE and BASE in folders:
        parser.error(f"{BASE} is the reference: name it first")
    models = {name: Model.read(folder) for name, folder in folders.items()}
    known = asked.run / "rates.json"
    if not known.is_file():
        write_json(known, rates())
    about: dict[str, Any] = {"command": shlex.join(["python", *sys.argv]), "machine": machine(), "versions": versions()}
    about["rates"] = json.loads(known.read_text())
    file, parts = asked.out.with_suffix(".json"), {}
    for workload in asked.workloads:
        bench = settings(workload, asked, next(iter(models.values())))
        found = measure(bench, asked.run / workload, folders)
        parts[workload] = about | {
            "vllm": found.environment["vllm"],
            "plans": {name: model.words for name, model in models.items()},
            "settings": found.settings,
            "speed": speed_rows(bench, found, models, about["rates"]),
            "capacity": capacity_rows(bench, found, models),
        }
    before = json.loads(file.read_text()) if file.is_file() else {}
    parts = (before["parts"] if before.get("schema_version") == 2 else {}) | parts
    parts = {name: parts[name] for name in TITLES if name in parts}
    write_json(file, {"schema_version": 2, "parts": parts})
    write_text(asked.out.with_suffix(".md"), page(parts))
    print(page(parts))


if __name__ == "__main__":
    main()
