"""Sliding attention against masked and full SDPA on this CPU, and prefill of a model with 22 layers sliding.

    python benchmarks/sliding.py --model DIR > sliding.json

Operation: float32, nine query heads on three key heads of size 64, window 256, forward and forward + backward. The
forms take turns in one process, the median of the rounds counts (SDPA beyond 8k: one round); the SDPA mask is made
beforehand, outside the clock.
Peak memory is of a process of its own, above what it held with its inputs made. Prefill: each measurement is a process
of its own, base and boosted taking turns; peak RSS is the whole process's.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig
from transformers.masking_utils import create_sliding_window_causal_mask

from layerboost.artifacts import LayerPlan
from layerboost.model.attention import sliding_attention, window_mask
from layerboost.model.checkpoint import find_model, load_model
from layerboost.model.surgery import apply_plan
from layerboost.runtime import Runtime

LENGTHS = (1024, 2048, 4096, 8192, 16384)
PREFILLS = (4096, 8192)
FORMS = ("sliding", "masked_sdpa", "full_sdpa")
HEADS, KEY_HEADS, SIZE, WINDOW = 9, 3, 64, 256
LONGEST_ROUNDS = 8192
SLIDING_LAYERS = 22


def make(form: str, tokens: int, backward: bool) -> Callable[[], Any]:
    """The operation on random inputs, ready to be called."""
    query, key, value = (
        torch.randn(1, heads, tokens, SIZE, requires_grad=backward) for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    mask = window_mask(tokens, tokens, WINDOW, query.device) if form == "masked_sdpa" else None
    gradient = torch.randn_like(query)

    def call() -> None:
        if form == "sliding":
            out = sliding_attention(query, key, value, WINDOW)
        else:
            out = scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        if backward:
            torch.autograd.grad(out, (query, key, value), gradient)

    return call


def operation_times(rounds: int) -> list[dict[str, Any]]:
    """Microseconds a token of every form, length and direction."""
    rows = []
    for tokens in LENGTHS:
        for backward in (False, True):
            calls = {form: make(form, tokens, backward) for form in FORMS}
            times: dict[str, list[float]] = {form: [] for form in FORMS}
            for turn in range(rounds + 1):
                for form, call in calls.items():
                    if form != "sliding" and tokens > LONGEST_ROUNDS and turn != 1:
                        continue  # minutes each; once is enough
                    repeats = max(1, 8192 // tokens) if form == "sliding" else 1
                    started = time.perf_counter()
                    for _ in range(repeats):
                        call()
                    if turn:  # the first round warms up
                        times[form].append((time.perf_counter() - started) / repeats / tokens * 1e6)
            row = {"tokens": tokens, "direction": "forward + backward" if backward else "forward"}
            row |= {f"{form}_us_per_token": round(statistics.median(values), 2) for form, values in times.items()}
            row["speedup_over_masked"] = round(row["masked_sdpa_us_per_token"] / row["sliding_us_per_token"], 2)
            row["speedup_over_full"] = round(row["full_sdpa_us_per_token"] / row["sliding_us_per_token"], 2)
            print(row, file=sys.stderr, flush=True)
            rows.append(row)
    return rows


def peak_mib() -> float:
    """Peak RSS of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure_memory(form: str, tokens: int) -> dict[str, Any]:
    """Peak RSS of forward and backward above what was held before, in MiB."""
    make("sliding", 512, True)()  # what the libraries take once
    call = make(form, tokens, True)
    before = psutil.Process().memory_info().rss / 2**20
    call()
    return {"form": form, "tokens": tokens, "peak_mib": round(max(peak_mib() - before, 0), 1)}


def measure_mask(tokens: int) -> dict[str, Any]:
    """What Transformers' own mask of a sliding layer costs, which boosted models do without."""
    config = LlamaConfig(sliding_window=WINDOW, attn_implementation="sdpa")
    nothing, mask = torch.empty(1, tokens, 0), torch.ones(1, tokens, dtype=torch.long)
    before, started = psutil.Process().memory_info().rss / 2**20, time.perf_counter()
    create_sliding_window_causal_mask(config, nothing, mask, None)
    return {"tokens": tokens, "seconds": time.perf_counter() - started, "peak_mib": round(peak_mib() - before, 1)}


def measure_prefill(folder: str, boosted: bool, tokens: int) -> dict[str, Any]:
    """Seconds and peak RSS of reading one prompt into a cache."""
    model = load_model(find_model(folder), Runtime(torch.device("cpu"), torch.float32))
    layers = model.config.num_hidden_layers
    if boosted:
        full = {int((index + 0.5) * layers / (layers - SLIDING_LAYERS)) for index in range(layers - SLIDING_LAYERS)}
        plans = [
            LayerPlan(layer=layer, attention="full")
            if layer in full
            else LayerPlan(layer=layer, attention="sliding", window=WINDOW, sink=True)
            for layer in range(layers)
        ]
        apply_plan(model, plans)
    ids = torch.randint(100, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids[:, :64], logits_to_keep=1)
        started = time.perf_counter()
        model(ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - started
    return {"model": "boosted" if boosted else "base", "tokens": tokens, "seconds": seconds, "peak_mib": peak_mib()}


def alone(**job: Any) -> dict[str, Any]:
    """One measurement in a process of its own."""
    argv = [sys.executable, __file__, "--alone", json.dumps(job)]
    found: dict[str, Any] = json.loads(subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout)
    print(found, file=sys.stderr, flush=True)
    return found


def prefill(folder: str, rounds: int) -> list[dict[str, Any]]:
    """Base and boosted at each length, in pairs."""
    rows = []
    for tokens in PREFILLS:
        pairs = [
            [alone(kind="prefill", folder=folder, boosted=boosted, tokens=tokens) for boosted in (False, True)]
            for _ in range(rounds)
        ]
        ratios = [base["seconds"] / boosted["seconds"] for base, boosted in pairs]
        row: dict[str, Any] = {"tokens": tokens, "speedup": round(statistics.median(ratios), 2)}
        row["speedup_of_each_round"] = [round(ratio, 2) for ratio in ratios]
        for index, name in enumerate(("base", "boosted")):
            row[f"{name}_seconds"] = round(statistics.median(pair[index]["seconds"] for pair in pairs), 2)
            row[f"{name}_peak_rss_mib"] = round(max(pair[index]["peak_mib"] for pair in pairs))
        rows.append(row)
    return rows


def summary(times: list[dict[str, Any]], memory: list[dict[str, Any]]) -> dict[str, Any]:
    """What is aimed at: flat time from 2k on, five times masked SDPA at 8k, memory linear in T."""
    found: dict[str, Any] = {}
    for direction in ("forward", "forward + backward"):
        rows = {row["tokens"]: row for row in times if row["direction"] == direction}
        flat = [row["sliding_us_per_token"] for tokens, row in rows.items() if tokens >= 2048]
        found[direction] = {
            "slowest_over_fastest_per_token_2k_to_16k": round(max(flat) / min(flat), 3),
            "speedup_over_masked_at_8k": rows[8192]["speedup_over_masked"],
        }
    peak = {row["tokens"]: row["peak_mib"] for row in memory if row["form"] == "sliding"}
    found["peak_mib_at_16k_over_4_times_that_at_4k"] = round(peak[16384] / peak[4096] / 4, 3)
    return found


def main() -> None:
    """Measure, and print what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a model; without it, the operation alone is measured")
    parser.add_argument("--only-model", action="store_true", help="leave the operation out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        job = json.loads(options.alone)
        measure: Any = {"memory": measure_memory, "mask": measure_mask, "prefill": measure_prefill}[job.pop("kind")]
        print(json.dumps(measure(**job)))
        return
    result: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "window": WINDOW}
    if not options.only_model:
        times = operation_times(options.rounds)
        memory = [alone(kind="memory", form=form, tokens=tokens) for tokens in LENGTHS for form in FORMS]
        result |= {"summary": summary(times, memory), "operation": times, "memory": memory}
        result["transformers_mask"] = [alone(kind="mask", tokens=tokens) for tokens in LENGTHS]
    if options.model:
        result["prefill"] = prefill(options.model, options.rounds)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
