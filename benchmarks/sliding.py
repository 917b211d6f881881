"""Sliding attention against masked and full SDPA on this CPU, and prefill of a model with 22 layers sliding.

    python benchmarks/sliding.py --model DIR > sliding.json

Every measurement is a process of its own, rivals taking turns. Times are CPU time on one thread, so that other work
on the machine hardly counts. Operation: float32, nine query heads on three key heads of size 64, window 256; the SDPA
mask is made beforehand, outside the clock; memory is the peak above what was held with the inputs made. Prefill: one
prompt into a cache; memory is the process's peak RSS.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from layerboost.model.attention import sliding_attention, window_mask
from layerboost.runtime import peak_rss_bytes

LENGTHS = (1024, 2048, 4096, 8192, 16384)
PREFILLS = (4096, 8192)
FORMS = ("sliding", "masked_sdpa", "full_sdpa")
DIRECTIONS = {"forward": False, "forward + backward": True}
HEADS, KEY_HEADS, SIZE, WINDOW = 9, 3, 64, 256
SLIDING_LAYERS = 22
CALLS_S = 1.0  # a call is repeated for so long, and the median counts; the first, which meets fresh memory, does not


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


def measure_operation(form: str, tokens: int, backward: bool) -> dict[str, Any]:
    """CPU microseconds a token and peak memory of one form."""
    make(form, 512, True)()  # what the libraries take once
    call = make(form, tokens, backward)
    before = start_peak()
    times = [timed(call)]
    peak = peak_mib() - before
    while sum(times) < CALLS_S:
        times.append(timed(call))
    return {"us_per_token": statistics.median(times[1:] or times) / tokens * 1e6, "peak_mib": peak}


def measure_mask(tokens: int) -> dict[str, Any]:
    """What Transformers' own mask of a sliding layer costs, which boosted models do without."""
    from transformers import LlamaConfig
    from transformers.masking_utils import create_sliding_window_causal_mask

    config = LlamaConfig(sliding_window=WINDOW, attn_implementation="sdpa")
    nothing, mask = torch.empty(1, tokens, 0), torch.ones(1, tokens, dtype=torch.long)
    before = start_peak()
    seconds = timed(lambda: create_sliding_window_causal_mask(config, nothing, mask, None))
    return {"tokens": tokens, "seconds": round(seconds, 3), "peak_mib": round(peak_mib() - before)}


def measure_prefill(folder: str, boosted: bool, tokens: int) -> dict[str, Any]:
    """CPU seconds and peak RSS of reading one prompt into a cache."""
    from layerboost.artifacts import LayerPlan
    from layerboost.model.checkpoint import find_model, load_model
    from layerboost.model.surgery import apply_plan
    from layerboost.runtime import Runtime

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
        seconds = timed(lambda: model(ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1))
    return {"seconds": seconds, "peak_mib": peak_mib()}


def timed(call: Callable[[], Any]) -> float:
    """CPU seconds of this process."""
    started = time.process_time()
    call()
    return time.process_time() - started


def start_peak() -> float:
    """What this process holds now, in MiB; `peak_mib` counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


def peak_mib() -> float:
    """The most this process has held, in MiB."""
    return peak_rss_bytes() / 2**20


def alone(kind: str, **job: Any) -> dict[str, Any]:
    """One measurement in a process of its own."""
    argv = [sys.executable, __file__, "--alone", json.dumps({"kind": kind, **job})]
    found: dict[str, Any] = json.loads(subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout)
    print(job, found, file=sys.stderr, flush=True)
    return found


def operation(lengths: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Every length and direction, the forms in turns."""
    rows = []
    for tokens in lengths:
        for direction, backward in DIRECTIONS.items():
            found: dict[str, list[dict[str, Any]]] = {form: [] for form in FORMS}
            for _ in range(rounds):
                for form in FORMS:
                    found[form].append(alone("operation", form=form, tokens=tokens, backward=backward))
            row: dict[str, Any] = {"tokens": tokens, "direction": direction}
            for form, runs in found.items():
                row[f"{form}_us_per_token"] = round(statistics.median(run["us_per_token"] for run in runs), 1)
                row[f"{form}_peak_mib"] = round(max(run["peak_mib"] for run in runs))
            row["speedup_over_masked"] = round(row["masked_sdpa_us_per_token"] / row["sliding_us_per_token"], 2)
            row["speedup_over_full"] = round(row["full_sdpa_us_per_token"] / row["sliding_us_per_token"], 2)
            rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is aimed at: flat time from 2k on, five times masked SDPA at 8k, memory linear in T."""
    found = {}
    for direction in DIRECTIONS:
        of = {row["tokens"]: row for row in rows if row["direction"] == direction}
        flat = [row["sliding_us_per_token"] for tokens, row in of.items() if tokens >= 2048]
        found[direction] = {
            "slowest_over_fastest_us_per_token_2k_to_16k": round(max(flat) / min(flat), 3),
            "speedup_over_masked_at_8k": of[8192]["speedup_over_masked"],
            "peak_at_16k_over_4_times_peak_at_4k": round(
                of[16384]["sliding_peak_mib"] / of[4096]["sliding_peak_mib"] / 4, 3
            ),
        }
    return found


def prefill(folder: str, rounds: int) -> list[dict[str, Any]]:
    """Base and boosted at each length, in turns."""
    rows = []
    for tokens in PREFILLS:
        pairs = [
            [alone("prefill", folder=folder, boosted=boosted, tokens=tokens) for boosted in (False, True)]
            for _ in range(rounds)
        ]
        ratios = [base["seconds"] / boosted["seconds"] for base, boosted in pairs]
        row: dict[str, Any] = {"tokens": tokens, "speedup": round(statistics.median(ratios), 2)}
        row["speedup_of_each_round"] = [round(ratio, 2) for ratio in ratios]
        for index, name in enumerate(("base", "boosted")):
            row[f"{name}_cpu_seconds"] = round(statistics.median(pair[index]["seconds"] for pair in pairs), 2)
            row[f"{name}_peak_rss_mib"] = round(max(pair[index]["peak_mib"] for pair in pairs))
        rows.append(row)
    return rows


def main() -> None:
    """Measure, and print what was found as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="directory of a model for the prefill")
    parser.add_argument("--parts", nargs="+", default=["operation", "mask", "prefill"])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="texts of the operation, in tokens")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.alone:
        job = json.loads(options.alone)
        measure: Any = {"operation": measure_operation, "mask": measure_mask, "prefill": measure_prefill}
        print(json.dumps(measure[job.pop("kind")](**job)))
        return
    result: dict[str, Any] = {"torch": torch.__version__, "threads": 1, "rounds": options.rounds, "window": WINDOW}
    if "operation" in options.parts:
        rows = operation(options.lengths, options.rounds)
        result["operation"] = rows
        if tuple(options.lengths) == LENGTHS:
            result["summary"] = summary(rows)
    if "mask" in options.parts:
        result["mask"] = [alone("mask", tokens=tokens) for tokens in LENGTHS]
    if "prefill" in options.parts and options.model:
        result["prefill"] = prefill(options.model, options.rounds)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
