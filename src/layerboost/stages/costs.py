"""costs: this machine's rates, from vLLM's own times of four plans of one model → costs.json, for `plan.costs`.

Each plan is served by the real engine. What vLLM reports of its KV cache is set beside `model/memory.py`, what requests
hold while they decode beside its residency, and the times of prefill and decoding steps beside the linear model of
`search/costs.py`, fitted to the other plans only. `costs.json` holds the rates fitted to all.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from layerboost.artifacts import LayerPlan, ModelInfo, write_json
from layerboost.errors import ConfigError, LayerboostError
from layerboost.model.checkpoint import Source, find_model, load_config, load_model, model_info, plan_in
from layerboost.model.files import first_line
from layerboost.model.memory import Engine, admission_bytes, block_bytes, resident_bytes
from layerboost.model.surgery import apply_plan, check_plan, family_of
from layerboost.runtime import Runtime, log, machine
from layerboost.search.costs import Costs, Rates, decode_work, prefill_work
from layerboost.serving.command import GIB, check_vllm, cores, engine_here, runs_on_cpu, vllm_environment
from layerboost.serving.processors import Processors
from layerboost.serving.results import disturbance

CONTEXTS = (1024, 2048)
# Of --max-num-batched-tokens; decoding is timed at one of them.
BATCHES = (64, 256, 1024)
DECODE_BATCH = 256
PROMPT_TOKENS = 1024
REPEATS, DECODE_STEPS = 3, 12
# Requests that decode at once, tokens of each.
LOADS = ((1, 64), (1, 1000), (32, 120), (12, 800))


def run_costs(model: str, out: Path, cache_gib: float) -> dict[str, Any]:
    """Measure the rates with MODEL, a base, and write them to `out`; returns what they were fitted to.

    Raises ConfigError before anything is served where vLLM is missing or the model cannot be used, LayerboostError when
    the engine fails.
    """
    version = check_vllm()
    source = find_model(model)
    config = load_config(source)
    if source.gguf or plan_in(source.folder):
        raise ConfigError(
            "rates are measured with a base in Hugging Face's format",
            found="a GGUF file" if source.gguf else "a boosted checkpoint",
            do="give the base that the run folder has: RUN/base",
        )
    info = model_info(source, config, torch.float32 if runs_on_cpu() else torch.bfloat16)
    if info.max_context_tokens < max(CONTEXTS):
        raise ConfigError(
            f"rates are measured at a context of {max(CONTEXTS)} tokens",
            found=f"{source.name} has one of {info.max_context_tokens}",
            do="measure with a larger model, or write the rates down yourself: docs/reference/plan.md",
        )
    chosen = plans(info.layers, sink="sink" in family_of(config).supports)
    for layers in chosen.values():
        check_plan(config, layers)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"} | vllm_environment()
    processors = Processors()
    with tempfile.TemporaryDirectory(prefix="layerboost-costs-") as root:
        measured = measure(source, info, chosen, Path(root), int(cache_gib * GIB))
    if why := disturbance([processors.used()], {"cores": len(cores()), "device": "cpu" if runs_on_cpu() else "cuda"}):
        log.warning("disturbed (%s): the rates may be too low; measure again on a free machine", why)
    names, work, times, kinds = work_rows(info, measured)
    rates, timing = fit(work, times), []
    for name, row, taken, kind in zip(names, work, times, kinds, strict=True):
        others = np.array([other != name for other in names])
        predicted = fit(work[others], times[others]).milliseconds(row)
        timing.append({"plan": name, "what": kind, "ms": round(float(taken), 2), "predicted_ms": round(predicted, 2)})
    write_json(out, Costs(machine=machine(), model=info.fingerprint, rates=rates))
    log.info("wrote %s", out)
    for entry in measured:
        entry["layers"] = dict(Counter(layer.attention for layer in entry["layers"]))
    return {"machine": machine(), "vllm": version, "rates": rates.model_dump(), "timing": timing, "plans": measured}


def plans(layers: int, sink: bool) -> dict[str, list[LayerPlan]]:
    """Four plans of every kind, by shares of the layers; full layers evenly spaced."""
    return {
        "base": _plan(layers, layers, 0, 64, sink),
        "sliding 64": _plan(layers, round(layers * 8 / 30), 0, 64, sink),
        "all three, 128": _plan(layers, layers // 3, layers // 3, 128, sink),
        "cheapest": _plan(layers, 0, layers * 2 // 3, 64, sink),
    }


def _plan(layers: int, full: int, none: int, window: int, sink: bool) -> list[LayerPlan]:
    kept = {int((index + 0.5) * layers / full) for index in range(full)}
    others = [layer for layer in range(layers) if layer not in kept]
    removed = {others[int((index + 0.5) * len(others) / none)] for index in range(none)}
    kinds = [("full" if layer in kept else "none" if layer in removed else "sliding") for layer in range(layers)]
    return [
        LayerPlan(layer=layer, attention="sliding", window=window, sink=sink)
        if kind == "sliding"
        else LayerPlan(layer=layer, attention="full" if kind == "full" else "none")
        for layer, kind in enumerate(kinds)
    ]


def boost(source: Source, layers: list[LayerPlan], folder: Path) -> None:
    """Save a model with a plan applied; its sinks are zero, which costs the same."""
    loaded = load_model(source, Runtime(torch.device("cpu"), torch.float32))
    apply_plan(loaded, layers)
    loaded.save_pretrained(folder)


def start(folder: Path, engine: Engine, context: int, cache_bytes: int) -> Any:
    """A vLLM engine in this process."""
    from vllm import LLM

    try:
        return LLM(
            str(folder),
            dtype="float32" if runs_on_cpu() else "bfloat16",
            enforce_eager=runs_on_cpu(),
            skip_tokenizer_init=True,
            max_model_len=context,
            max_num_batched_tokens=engine.max_batched_tokens,
            max_num_seqs=min(128, engine.max_batched_tokens),
            block_size=engine.block_size,
            kv_cache_memory_bytes=cache_bytes,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
    except Exception as error:  # vLLM raises whatever its parts do
        raise LayerboostError("vLLM could not start", found=first_line(error), do="change --cache-gib?") from error


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
    times: list[float] = []
    held: list[int] = []
    lengths: list[float] = []
    while len(times) < DECODE_STEPS:
        decoding = len(answers) == requests
        if decoding and len(engine.engine_core.engine_core.scheduler.running) < requests:
            raise LayerboostError(
                f"{requests} requests of {tokens:,} tokens do not fit into the KV cache together",
                do="raise --cache-gib",
            )
        clock = time.perf_counter()
        for output in engine.step():
            answers[output.request_id] = len(output.outputs[0].token_ids)
        if decoding:
            times.append(time.perf_counter() - clock)
            held.append(free - pool.get_num_free_blocks())
            lengths.append(tokens + float(np.mean(list(answers.values()))))
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


def measure(
    source: Source, info: ModelInfo, chosen: dict[str, list[LayerPlan]], root: Path, cache_bytes: int
) -> list[dict[str, Any]]:
    """A dictionary per plan: `memory`, `prefill` and `decode` rows."""
    default = engine_here()
    settings = [(default, CONTEXTS[0]), (default, CONTEXTS[1])]
    settings += [(replace(default, max_batched_tokens=size, block_size=32), CONTEXTS[1]) for size in BATCHES]
    found, clock = [], time.monotonic()
    for number, (name, layers) in enumerate(chosen.items()):
        folder = root / str(number)
        boost(source, layers, folder)
        entry: dict[str, Any] = {"plan": name, "layers": layers, "memory": [], "prefill": [], "decode": []}
        for engine, context in settings:
            llm = start(folder, engine, context, cache_bytes)
            entry["memory"].append(memory_row(llm, info, layers, engine, cache_bytes))
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
            log.info("%s, %d batched tokens: %.0f s", name, engine.max_batched_tokens, time.monotonic() - clock)
        found.append(entry)
    return found


def work_rows(info: ModelInfo, measured: list[dict[str, Any]]) -> tuple[list[str], np.ndarray, np.ndarray, list[str]]:
    """Per timed row: its plan, its work `[N, 6]`, its milliseconds `[N]`, what it was."""
    names: list[str] = []
    work, times, kinds = [], [], []
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
