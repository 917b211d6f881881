"""The cost model against vLLM on this machine: KV memory of several plans, time of prefill and decoding; writes rates.

    python benchmarks/costs.py MODEL --out costs.json [--page docs/results/costs]

Every plan is served by the real engine: what vLLM reports of its KV cache stands beside `search/memory.py`, what
requests hold while they decode beside its residency, and the times of prefill and decoding steps beside the linear
model of `search/costs.py`, fitted to the other plans only. `costs.json` holds the rates fitted to all, which
`layerboost plan` takes as `plan.costs`.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))

import numpy as np
import torch
from scipy.optimize import nnls

from layerboost.artifacts import LayerPlan, ModelInfo, write_json, write_text
from layerboost.model.checkpoint import find_model, load_config, load_model, model_info
from layerboost.model.memory import CPU_ENGINE, GPU_ENGINE, Engine, admission_bytes, block_bytes, resident_bytes
from layerboost.model.surgery import apply_plan
from layerboost.runtime import Runtime, machine
from layerboost.search.costs import Costs, Rates, decode_work, prefill_work
from layerboost.serving.command import vllm_version

MIB = 1 << 20
CONTEXTS = (1024, 2048)
# Of --max-num-batched-tokens; decoding is timed at one of them.
BATCHES = (64, 256, 1024)
DECODE_BATCH = 256
PROMPT_TOKENS = 1024
REPEATS, DECODE_STEPS = 3, 12
# Requests that decode at once, tokens of each.
LOADS = ((1, 64), (1, 1000), (32, 120), (12, 800))


def plans(layers: int) -> dict[str, list[LayerPlan]]:
    """Four plans of every kind, by shares of the layers; full layers evenly spaced."""
    return {
        "base": _plan(layers, layers, 0, 64),
        "sliding 64": _plan(layers, round(layers * 8 / 30), 0, 64),
        "all three, 128": _plan(layers, layers // 3, layers // 3, 128),
        "cheapest": _plan(layers, 0, layers * 2 // 3, 64),
    }


def _plan(layers: int, full: int, none: int, window: int) -> list[LayerPlan]:
    kept = {int((index + 0.5) * layers / full) for index in range(full)}
    others = [layer for layer in range(layers) if layer not in kept]
    removed = {others[int((index + 0.5) * len(others) / none)] for index in range(none)}
    kinds = [("full" if layer in kept else "none" if layer in removed else "sliding") for layer in range(layers)]
    return [
        LayerPlan(layer=layer, attention="sliding", window=window, sink=True)
        if kind == "sliding"
        else LayerPlan(layer=layer, attention="full" if kind == "full" else "none")
        for layer, kind in enumerate(kinds)
    ]


def boost(model: str, layers: list[LayerPlan], folder: Path) -> None:
    """Save a model with a plan applied; its sinks are zero, which costs the same."""
    runtime = Runtime(torch.device("cpu"), torch.float32)
    loaded = load_model(find_model(model), runtime)
    heads = loaded.config.num_attention_heads
    apply_plan(loaded, layers, {entry.layer: torch.zeros(heads) for entry in layers if entry.sink})
    loaded.save_pretrained(folder)


def start(folder: Path, engine: Engine, context: int, cache_bytes: int, **options: Any) -> Any:
    """A vLLM engine in this process, with further `options` of vLLM."""
    from vllm import LLM

    return LLM(
        str(folder),
        dtype="float32" if not torch.cuda.is_available() else "bfloat16",
        enforce_eager=not torch.cuda.is_available(),
        skip_tokenizer_init=True,
        max_model_len=context,
        max_num_batched_tokens=engine.max_batched_tokens,
        max_num_seqs=min(128, engine.max_batched_tokens),
        block_size=engine.block_size,
        kv_cache_memory_bytes=cache_bytes,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **options,
    )


def memory_row(llm: Any, info: ModelInfo, layers: list[LayerPlan], engine: Engine, cache_bytes: int) -> dict[str, Any]:
    """Blocks and concurrency, as vLLM reports them and as the model has them."""
    config = llm.llm_engine.vllm_config
    context = config.model_config.max_model_len
    blocks = cache_bytes // block_bytes(info, layers, engine)
    admitted = blocks * block_bytes(info, layers, engine) / admission_bytes(info, layers, context, engine)
    return {
        "context_tokens": context,
        "max_batched_tokens": engine.max_batched_tokens,
        "block_size": engine.block_size,
        "blocks": config.cache_config.num_gpu_blocks,
        "blocks_predicted": blocks,
        "concurrency": round(config.cache_config.kv_cache_max_concurrency, 3),
        "concurrency_predicted": round(admitted, 3),
    }


def timed_prefill(llm: Any, info: ModelInfo) -> float:
    """Milliseconds to read a prompt: the sum over its steps of the least time of each in a few repeats."""
    engine = llm.llm_engine
    best: dict[int, float] = {}
    for repeat in range(REPEATS + 1):
        add_requests(engine, info, f"prefill-{repeat}", 1, PROMPT_TOKENS, 1)
        step = 0
        while engine.has_unfinished_requests():
            clock = time.perf_counter()
            engine.step()
            if repeat:  # the first is a warm-up
                best[step] = min(best.get(step, np.inf), time.perf_counter() - clock)
            step += 1
    return 1e3 * sum(best.values())


def timed_decode(llm: Any, info: ModelInfo, requests: int, tokens: int) -> dict[str, float]:
    """The least time of a step in which all requests decode, and the blocks they then hold."""
    engine = llm.llm_engine
    pool = engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    free = pool.get_num_free_blocks()
    # Who is read first decodes while the others are read, so answers are as long as that takes.
    name = f"decode-{requests}-{tokens}"
    longest = requests * tokens // DECODE_BATCH + requests + 2 * DECODE_STEPS
    names = add_requests(engine, info, name, requests, tokens, longest)
    answers: dict[str, int] = {}
    times, held, lengths = [], [], []
    while len(times) < DECODE_STEPS:
        decoding = len(answers) == requests
        if decoding and len(engine.engine_core.engine_core.scheduler.running) < requests:
            sys.exit(f"{requests} requests of {tokens:,} tokens do not fit into the cache together: raise --cache-gib")
        clock = time.perf_counter()
        for output in engine.step():
            answers[output.request_id] = len(output.outputs[0].token_ids)
        if decoding:
            times.append(time.perf_counter() - clock)
            held.append(free - pool.get_num_free_blocks())
            lengths.append(tokens + np.mean(list(answers.values())))
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return {
        "requests": requests,
        "tokens": round(float(np.mean(lengths))),
        "ms": 1e3 * min(times),
        "held_blocks": float(np.mean(held)),
    }


def add_requests(engine: Any, info: ModelInfo, name: str, requests: int, tokens: int, answer: int) -> list[str]:
    """Random prompts of one length; returns the requests' names."""
    from vllm import SamplingParams

    draw = np.random.default_rng(0)
    sampling = SamplingParams(max_tokens=answer, ignore_eos=True, temperature=0, detokenize=False)
    names = [f"{name}-{index}" for index in range(requests)]
    for request in names:
        prompt = draw.integers(100, info.vocabulary, tokens).tolist()
        engine.add_request(request, {"prompt_token_ids": prompt}, sampling)
    return names


def measure(model: str, info: ModelInfo, root: Path, cache_gib: float) -> list[dict[str, Any]]:
    """A dictionary a plan: `memory`, `prefill` and `decode` rows."""
    default = GPU_ENGINE if torch.cuda.is_available() else CPU_ENGINE
    cache = int(cache_gib * (1 << 30))
    settings = [(default, CONTEXTS[0]), (default, CONTEXTS[1])]
    settings += [(replace(default, max_batched_tokens=size, block_size=32), CONTEXTS[1]) for size in BATCHES]
    found, clock = [], time.monotonic()
    for name, layers in plans(info.layers).items():
        folder = root / name.replace(" ", "-").replace(",", "")
        boost(model, layers, folder)
        entry: dict[str, Any] = {"plan": name, "layers": layers, "memory": [], "prefill": [], "decode": []}
        for engine, context in settings:
            llm = start(folder, engine, context, cache)
            entry["memory"].append(memory_row(llm, info, layers, engine, cache))
            if engine is not default:
                size = engine.max_batched_tokens
                entry["prefill"].append({"max_batched_tokens": size, "ms": timed_prefill(llm, info)})
            if engine.max_batched_tokens == DECODE_BATCH:
                for requests, tokens in LOADS:
                    row = timed_decode(llm, info, requests, tokens)
                    row["held_bytes"] = row.pop("held_blocks") * block_bytes(info, layers, engine)
                    row["held_predicted"] = requests * resident_bytes(info, layers, int(row["tokens"]), engine)
                    entry["decode"].append(row)
            del llm
            print(f"{name}, {engine}: {time.monotonic() - clock:.0f} s", file=sys.stderr, flush=True)
        found.append(entry)
    return found


def work_rows(info: ModelInfo, measured: list[dict[str, Any]]) -> tuple[list[str], np.ndarray, np.ndarray, list[str]]:
    """Per timed row: its plan, its work `[N, 6]`, its milliseconds `[N]`, what it was."""
    names, work, times, kinds = [], [], [], []
    for entry in measured:
        for row in entry["prefill"]:
            size = row["max_batched_tokens"]
            work.append(prefill_work(info, entry["layers"], PROMPT_TOKENS, size))
            kinds.append(f"prefill of {PROMPT_TOKENS} by {size}")
            times.append(row["ms"])
        for row in entry["decode"]:
            work.append(decode_work(info, entry["layers"], row["requests"], row["tokens"]))
            kinds.append(f"decode, {row['requests']} x {row['tokens']}")
            times.append(row["ms"])
        names += [entry["plan"]] * (len(times) - len(names))
    return names, np.array(work), np.array(times), kinds


def fit(work: np.ndarray, times: np.ndarray) -> Rates:
    """Rates that explain the times, least squares of relative errors, none negative."""
    scale = work.max(0)
    scale[scale == 0] = 1.0
    prices = nnls(work / scale / times[:, None], np.ones(len(times)))[0] / scale
    rates = [1e3 / price if price else None for price in prices[2:]]
    return Rates(
        step_ms=prices[0],
        layer_ms=prices[1],
        weight_bytes_per_s=rates[0],
        flops_per_s=rates[1],
        kv_bytes_per_s=rates[2],
        attention_flops_per_s=rates[3],
    )


def page(summary: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    rates = ", ".join(f"{name} {value:.3g}" for name, value in summary["rates"].items() if value is not None)
    lines = [
        "# The cost model against vLLM",
        "",
        *("```console", f"$ {summary['command']}", "```", ""),
        f"{summary['machine']}; vLLM {summary['vllm']}. Plans: "
        + "; ".join(f"{entry['plan']}: {entry['words']}" for entry in summary["plans"])
        + ".",
        "",
        "## Requests that fit",
        "",
        "| plan | context | batched tokens | block | vLLM | predicted | off |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in summary["plans"]:
        for row in entry["memory"]:
            cells = [entry["plan"], f"{row['context_tokens']:,}", f"{row['max_batched_tokens']:,}", row["block_size"]]
            cells += [f"{row['concurrency']:.2f}", f"{row['concurrency_predicted']:.2f}"]
            cells.append(f"{row['concurrency_predicted'] / row['concurrency'] - 1:+.1%}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", "## Bytes held while decoding", ""]
    lines += ["| plan | requests | tokens each | MiB | predicted | off |", "|---|---|---|---|---|---|"]
    for entry in summary["plans"]:
        for row in entry["decode"]:
            cells = [entry["plan"], row["requests"], row["tokens"], f"{row['held_bytes'] / MIB:.1f}"]
            cells += [f"{row['held_predicted'] / MIB:.1f}", f"{row['held_predicted'] / row['held_bytes'] - 1:+.1%}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    errors = [abs(row["predicted_ms"] / row["ms"] - 1) for row in summary["timing"]]
    lines += [
        "",
        "## Time",
        "",
        "Each plan predicted from the rates fitted to the others: median error "
        f"{np.median(errors):.0%}, greatest {max(errors):.0%}. Fitted to all: {rates}.",
        "",
        "| plan | what | ms | predicted | off |",
        "|---|---|---|---|---|",
    ]
    for row in summary["timing"]:
        cells = [row["plan"], row["what"], f"{row['ms']:.1f}", f"{row['predicted_ms']:.1f}"]
        cells.append(f"{row['predicted_ms'] / row['ms'] - 1:+.0%}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Measure, fit, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, default=Path("costs.json"))
    parser.add_argument("--page", type=Path, help="without suffix: the comparison as PAGE.md and PAGE.json")
    parser.add_argument("--cache-gib", type=float, default=1.5)
    arguments = parser.parse_args()
    if arguments.page and arguments.page.with_suffix(".json").absolute() == arguments.out.absolute():
        parser.error("--page would overwrite --out: name it otherwise")
    source = find_model(arguments.model)
    info = model_info(source, load_config(source), torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    with tempfile.TemporaryDirectory() as root:
        measured = measure(arguments.model, info, Path(root), arguments.cache_gib)
    names, work, times, kinds = work_rows(info, measured)
    rates = fit(work, times)
    timing, errors = [], []
    for name, row, taken, kind in zip(names, work, times, kinds, strict=True):
        others = np.array([other != name for other in names])
        predicted = fit(work[others], times[others]).milliseconds(row)
        errors.append(abs(predicted / taken - 1))
        timing.append({"plan": name, "what": kind, "ms": round(float(taken), 2), "predicted_ms": round(predicted, 2)})
        print(f"{name:16} {kind:20} {taken:10.1f} ms, predicted {predicted:10.1f} ms, {predicted / taken - 1:+.0%}")
    print(f"least squares over plans left out: median error {np.median(errors):.0%}, greatest {max(errors):.0%}")
    for entry in measured:
        for row in entry["memory"]:
            print(f"{entry['plan']:16} {row}")
        for row in entry["decode"]:
            what = f"held while decoding {row['requests']} x {row['tokens']}"
            print(f"{entry['plan']:16} {what}: predicted / real {row['held_predicted'] / row['held_bytes']:.3f}")
    write_json(arguments.out, Costs(machine=machine(), model=info.fingerprint, rates=rates))
    for entry in measured:
        entry["words"] = ", ".join(
            f"{n} {kind}" for kind, n in Counter(e.attention for e in entry.pop("layers")).items()
        )
    summary = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "vllm": vllm_version(),
        "rates": rates.model_dump(),
        "timing": timing,
        "plans": measured,
    }
    if arguments.page:
        write_json(arguments.page.with_suffix(".json"), summary)
        write_text(arguments.page.with_suffix(".md"), page(summary))
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
