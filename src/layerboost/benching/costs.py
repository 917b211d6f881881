"""costs: this machine's rates, from an engine's own times of several plans of one model → costs.json, for `plan.costs`.

Each plan is served by the real engine. Its KV cache as the engine reports it, and in vLLM the memory that requests hold
while they decode, are compared with what is computed; the times of prefill and decoding steps with the linear model of
`costs/budget.py`, fitted to the other plans only. `costs.json` holds the rates fitted to all plans.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls

from layerboost.benching.processors import Processors
from layerboost.costs.budget import Costs, Rates, decode_work, prefill_work
from layerboost.costs.memory import admission_bytes, block_bytes, resident_bytes
from layerboost.engines import llama_cpp, open_engine
from layerboost.engines.protocol import Load
from layerboost.engines.vllm import cache_defaults, check_vllm, runs_on_cpu
from layerboost.engines.vllm_timing import TimedVllm
from layerboost.errors import ConfigError
from layerboost.exporting.stage import check_type
from layerboost.exporting.targets import find_target
from layerboost.files import new_folder
from layerboost.model.base import Base, find_model
from layerboost.model.checkpoint import plan_in, save_boosted
from layerboost.model.surgery import apply_plan, boosted_config, check_plan, family_of
from layerboost.recipe import Bench, Recipe
from layerboost.runtime import GIB, Runtime, clean_environment, cores, log, machine
from layerboost.schemas.artifact import write_json
from layerboost.schemas.benchmark import disturbance
from layerboost.schemas.model import ModelInfo
from layerboost.schemas.plan import LayerPlan, PlanFile

CONTEXTS = (1024, 2048)
# Of --max-num-batched-tokens; decoding is timed at one of them.
BATCHES = (64, 256, 1024)
DECODE_BATCH = 256
PROMPT_TOKENS = 1024
# Concurrent requests, and tokens per request: on a server, and on a laptop.
LOADS = ((1, 64), (1, 1000), (32, 120), (12, 800))
LLAMA_LOADS = ((1, 64), (1, 1000), (1, 4000), (4, 500))
LLAMA_STEPS, LLAMA_REPEATS = 24, 3


@dataclass(frozen=True)
class Timed:
    """One time of one plan, in ms: the step that took it, and its work `[7]` (columns of `decode_work`)."""

    plan: str
    what: str
    work: np.ndarray
    ms: float


def run_costs(model: str, out: Path, cache_gib: float, engine: str = "auto", kind: str = "f16") -> dict[str, Any]:
    """Measure the rates with MODEL, a base, and write them to `out`; return the measurements that they are fitted to.

    `engine`: vllm, llama.cpp, or the first installed; `kind`: the GGUF type for llama.cpp. Raise ConfigError before
    anything is served if the engine is missing or the model cannot be used, LayerboostError if the engine fails.
    """
    clean_environment()
    if not 0 < cache_gib < math.inf:
        raise ConfigError(f"--cache-gib {cache_gib} is not a valid size", do="give a positive number of GiB")
    name = open_engine(engine).NAME
    if name == "transformers":
        raise ConfigError("rates are of a server", found="--engine transformers", do="install vLLM or xllamacpp")
    on_llama = name == "llama.cpp"
    version = llama_cpp.version() if on_llama else check_vllm()
    on_cpu = on_llama or runs_on_cpu()
    base = find_model(model, Runtime(torch.device("cpu"), torch.float32 if on_cpu else torch.bfloat16))
    config, info = base.config, base.info
    base.check()
    _check_form(base, on_llama)
    _check_writable(out)
    longest = max(tokens for _, tokens in LLAMA_LOADS) + LLAMA_STEPS if on_llama else max(CONTEXTS)
    if info.max_context_tokens < longest:
        raise ConfigError(
            f"rates are measured at a context of {longest} tokens",
            found=f"{base.name} has one of {info.max_context_tokens}",
            do="measure with a larger model, or write the rates yourself: docs/reference/plan.md",
        )
    chosen = plans(info)
    if on_llama:
        # A layer without attention is a sliding one in llama.cpp, and takes its time.
        chosen = {
            name: layers
            for name, layers in chosen.items()
            if all(e.strategy.keeps_weights and not e.full_kv_heads for e in layers)
        }
        chosen["sliding 128"] = _plan(info.layers, 0, 0, 128)
        # Sinks change no time there, and some of its architectures have none.
        chosen = {name: [e.model_copy(update={"sink": False}) for e in layers] for name, layers in chosen.items()}
        check_type(base.folder, kind)
    for layers in chosen.values():
        check_plan(config, layers)
        if on_llama:
            find_target("gguf", boosted_config(config, layers), layers)
    processors = Processors()
    measured, timed = measure_llama(base, chosen, kind) if on_llama else measure(base, chosen, int(cache_gib * GIB))
    if disturbed := disturbance([processors.used()], {"cores": len(cores()), "device": "cpu" if on_cpu else "cuda"}):
        log.warning("disturbed (%s): the rates may be too low; measure again on a free machine", disturbed)
    rates, timing = fit(timed), []
    for row in timed:
        predicted = fit([other for other in timed if other.plan != row.plan]).milliseconds(row.work)
        timing.append({"plan": row.plan, "what": row.what, "ms": round(row.ms, 2), "predicted_ms": round(predicted, 2)})
    rates = rates.model_copy(update={"removed_saves": not on_llama})
    write_json(out, Costs(machine=machine(), model=info.fingerprint, disturbed=disturbed or None, rates=rates))
    log.info("wrote %s", out)
    return {"machine": machine(), name: version, "rates": rates.model_dump(), "timing": timing, "plans": measured}


def _check_form(base: Base, on_llama: bool) -> None:
    """Raise ConfigError for a model that the engine does not serve as it is and boosted by `plans`."""
    if base.packed or plan_in(base.folder):
        raise ConfigError(
            "rates are measured with a base in Hugging Face's format",
            found="a GGUF file, or a quantised model" if base.packed else "a boosted checkpoint",
            do="give the base in the run folder: RUN/base",
        )
    reason = ""
    if base.config is not base.model_config:
        reason = f"{base.name} is a wrapper, {base.model_config.model_type}"
    elif base.info.sliding_layers:
        reason = f"layers of {base.name} slide already, and a model has one window"
    elif not on_llama and not family_of(base.config).vllm:
        reason = f"family {base.config.model_type}: {family_of(base.config).vllm_lacks}"
    elif base.info.other_layers:
        reason = f"{base.name} is a hybrid, {base.config.model_type}"
    if reason:
        raise ConfigError(
            "rates are of an engine that serves the model with windows of 64 and 128 tokens",
            found=reason,
            do="measure with a language model of its sizes, or write the rates down yourself: docs/reference/plan.md",
        )


def _check_writable(out: Path) -> None:
    """Raise ConfigError for a file that could not be written after the measurement."""
    place = out.absolute().parent
    if out.is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
        found = "a directory" if out.is_dir() else str(place)
        raise ConfigError(f"{out} cannot be written", found=found, do="name a file in an existing directory")


def plans(model: ModelInfo) -> dict[str, list[LayerPlan]]:
    """Return plans that together have every strategy, two of them with full KV heads in sliding layers; full layers are
    evenly spaced."""
    layers = model.layers
    found = {
        "base": _plan(layers, layers, 0, 64),
        "sliding 64": _plan(layers, round(layers * 8 / 30), 0, 64),
        "all three, 128": _plan(layers, layers // 3, layers // 3, 128),
        "cheapest": _plan(layers, 0, layers * 2 // 3, 64),
    }
    if model.kv_heads > 1:
        for name, none, window in (("heads, 64", 0, 64), ("heads, a third none, 128", layers // 3, 128)):
            found[name] = [
                entry.model_copy(update={"full_kv_heads": (0,)}) if entry.window else entry
                for entry in _plan(layers, 0, none, window)
            ]
    return found


def _plan(layers: int, full: int, none: int, window: int) -> list[LayerPlan]:
    cached = {int((index + 0.5) * layers / full) for index in range(full)}
    others = [layer for layer in range(layers) if layer not in cached]
    removed = {others[int((index + 0.5) * len(others) / none)] for index in range(none)}
    return [
        LayerPlan(layer=layer, attention="full" if layer in cached else "none")
        if layer in cached | removed
        else LayerPlan(layer=layer, attention="sliding", window=window, sink=True)
        for layer in range(layers)
    ]


def measure(
    base: Base, chosen: dict[str, list[LayerPlan]], cache_bytes: int
) -> tuple[list[dict[str, Any]], list[Timed]]:
    """Serve every plan with several settings; return measurements per plan, and all times.

    Of a plan: its layers by strategy, the KV cache (`memory`) and the bytes that requests hold while they decode
    (`decode`), each measured and predicted.
    """
    info, default = base.info, cache_defaults()
    settings = [(default, context) for context in CONTEXTS]
    settings += [(replace(default, max_batched_tokens=size, block_size=32), max(CONTEXTS)) for size in BATCHES]
    measured, timed, clock = [], [], time.monotonic()
    for name, layers in chosen.items():
        kinds = dict(Counter(entry.attention for entry in layers))
        entry: dict[str, Any] = {"plan": name, "layers": kinds, "memory": [], "decode": []}
        with tempfile.TemporaryDirectory(prefix="layerboost-costs-") as scratch:
            folder = Path(scratch) / "model"
            with new_folder(folder) as new:
                # The sinks are zero, which does not change the time.
                apply_plan(base.load(), layers).save_pretrained(new)
            for own, context in settings:
                engine = TimedVllm(folder, own, context, cache_bytes)
                size = own.max_batched_tokens
                entry["memory"].append(memory_row(engine, info, layers))
                if own is not default:
                    work = prefill_work(info, layers, PROMPT_TOKENS, size)
                    what = f"prefill of {PROMPT_TOKENS} by {size}"
                    timed.append(Timed(name, what, work, engine.prefill_ms(PROMPT_TOKENS)))
                for requests, tokens in LOADS if size == DECODE_BATCH else ():
                    row = {"requests": requests, **engine.decode(requests, tokens)}
                    length = int(row["tokens"])
                    work = decode_work(info, layers, requests, length)
                    timed.append(Timed(name, f"decode, {requests} x {length}", work, row["ms"]))
                    row["held_bytes"] = row.pop("held_blocks") * block_bytes(info, layers, own)
                    row["held_predicted"] = requests * resident_bytes(info, layers, length, own)
                    entry["decode"].append(row)
                del engine
                log.info("%s, %d batched tokens: %.0f s", name, size, time.monotonic() - clock)
        measured.append(entry)
    return measured, timed


def measure_llama(
    base: Base, chosen: dict[str, list[LayerPlan]], kind: str
) -> tuple[list[dict[str, Any]], list[Timed]]:
    """Serve every plan with llama.cpp at several loads, as `measure` does with vLLM."""
    info = base.info
    measured, timed = [], []
    for name, layers in chosen.items():
        plan = PlanFile(model=info, method="by hand", layers=layers)
        flags = llama_cpp.serving_flags(plan, ())
        ubatch = int(flags[1]) if flags else llama_cpp.UBATCH_DEFAULT
        entry: dict[str, Any] = {"plan": name, "layers": dict(Counter(e.attention for e in layers)), "memory": []}
        with tempfile.TemporaryDirectory(prefix="layerboost-costs-") as scratch:
            folder = Path(scratch) / "model"
            save_boosted(apply_plan(base.load(), layers), base.tokenizer, plan, folder, recipe_yaml="")
            for requests, tokens in LLAMA_LOADS:
                bench = Bench(
                    concurrency=(requests,),
                    input_tokens=tokens,
                    output_tokens=LLAMA_STEPS,
                    gguf_type=kind,
                    server_args=flags,
                )
                log_file = Path(scratch) / "bench" / "logs" / "server.log"
                with llama_cpp.launch(name, folder, Recipe(bench=bench), log_file) as running:
                    loads = [Load(requests, requests, 0, tokens, LLAMA_STEPS, seed) for seed in range(LLAMA_REPEATS)]
                    answers = [running.answer(load, lambda _: None) for load in loads]
                _, slot = llama_cpp.slots_of(bench)
                predicted = llama_cpp.kv_bytes(plan, slot, requests, ubatch)
                row = {"context_tokens": slot, "max_batched_tokens": ubatch, "slots": requests}
                row["kv_bytes"] = round(answers[0].metrics["kv_used_gib"] * GIB)
                entry["memory"].append(row | {"kv_bytes_predicted": predicted})
                length = tokens + LLAMA_STEPS // 2
                ms = min(answer.raw["median_itl_ms"] for answer in answers)
                work = decode_work(info, layers, requests, length)
                timed.append(Timed(name, f"decode, {requests} x {length}", work, ms))
                if requests == 1:
                    ms = min(answer.raw["median_ttft_ms"] for answer in answers)
                    work = prefill_work(info, layers, tokens, ubatch)
                    timed.append(Timed(name, f"prefill of {tokens} by {ubatch}", work, ms))
        log.info("timed %s", name)
        measured.append(entry)
    return measured, timed


def memory_row(engine: TimedVllm, info: ModelInfo, layers: list[LayerPlan]) -> dict[str, Any]:
    """Return blocks and concurrency as vLLM reports them, and as `costs/memory.py` predicts them."""
    settings, context = engine.settings, engine.context_tokens
    block = block_bytes(info, layers, settings)
    predicted = engine.cache_bytes // block
    blocks, concurrency = engine.kv_cache()
    return {
        "context_tokens": context,
        "max_batched_tokens": settings.max_batched_tokens,
        "block_size": settings.block_size,
        "blocks": blocks,
        "blocks_predicted": predicted,
        "concurrency": round(concurrency, 3),
        "concurrency_predicted": round(predicted * block / admission_bytes(info, layers, context, settings), 3),
    }


def fit(timed: Sequence[Timed]) -> Rates:
    """Return the rates fitted to the times: non-negative least squares of relative errors."""
    work, times = np.array([row.work for row in timed]), np.array([row.ms for row in timed])
    scale = work.max(0)
    scale[scale == 0] = 1.0
    prices = nnls(work / scale / times[:, None], np.ones(len(times)))[0] / scale
    names = ("weight_bytes_per_s", "flops_per_s", "kv_bytes_per_s", "attention_flops_per_s")
    rates = {name: 1e3 / price if price else None for name, price in zip(names, prices[2:6], strict=True)}
    return Rates(step_ms=prices[0], layer_ms=prices[1], call_ms=prices[6], **rates)
