"""Sliding attention against masked and full SDPA on this CPU, and prefill of a model with 22 layers sliding.

    python benchmarks/sliding.py --model DIR

Every measurement is a process of its own. Times are CPU time on one thread, so that other work on the machine counts
little. Operation: float32, nine query heads on three key heads of size 64, window 256; the SDPA mask is made outside
the clock; memory is the peak above what was held with the inputs made. Mask: Transformers' own for a sliding layer,
which boosted models do without. Prefill: one prompt into a cache; memory is the process's peak RSS. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timing
import torch
from torch.nn.functional import scaled_dot_product_attention

from layerboost.model.attention import sliding_attention, window_mask
from layerboost.runtime import Runtime, peak_rss_bytes

LENGTHS, PREFILLS = (1024, 2048, 4096, 8192, 16384), (4096, 8192)
FORMS = ("sliding", "masked_sdpa", "full_sdpa")
HEADS, KEY_HEADS, SIZE, WINDOW, SLIDING_LAYERS = 9, 3, 64, 256, 22
CALLS_S = 1.0  # a call is repeated for so long, and the median counts; the first, which meets fresh memory, does not


def make(form: str, tokens: int, backward: bool) -> Callable[[], Any]:
    """The operation on random inputs, ready to be called."""
    query, key, value = (
        torch.randn(1, heads, tokens, SIZE, requires_grad=backward) for heads in (HEADS, KEY_HEADS, KEY_HEADS)
    )
    mask = window_mask(tokens, tokens, WINDOW, query.device) if form == "masked_sdpa" else None
    gradient = torch.randn_like(query)
    sdpa = partial(scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None, enable_gqa=True)

    def call() -> None:
        out = sliding_attention(query, key, value, WINDOW) if form == "sliding" else sdpa(query, key, value)
        if backward:
            torch.autograd.grad(out, (query, key, value), gradient)

    return call


def measure_operation(form: str, tokens: int, backward: bool) -> dict[str, float]:
    """CPU seconds and peak memory of one form."""
    make(form, 512, True)()  # what the libraries take once
    call = make(form, tokens, backward)
    before = start_peak()
    times = [cpu_seconds(call)]
    peak = peak_mib() - before
    while sum(times) < CALLS_S:
        times.append(cpu_seconds(call))
    return {"seconds": statistics.median(times[1:] or times), "peak_mib": peak}


def measure_mask(tokens: int) -> dict[str, float]:
    """CPU seconds and memory of Transformers' mask."""
    from transformers import LlamaConfig
    from transformers.masking_utils import create_sliding_window_causal_mask

    config = LlamaConfig(sliding_window=WINDOW, attn_implementation="sdpa")
    nothing, mask = torch.empty(1, tokens, 0), torch.ones(1, tokens, dtype=torch.long)
    before = start_peak()
    seconds = cpu_seconds(lambda: create_sliding_window_causal_mask(config, nothing, mask, None))
    return {"seconds": seconds, "peak_mib": peak_mib() - before}


def measure_prefill(folder: str, boosted: bool, tokens: int) -> dict[str, float]:
    """CPU seconds and peak RSS of reading one prompt into a cache."""
    from layerboost.model.base import find_model
    from layerboost.model.surgery import apply_plan

    model = find_model(folder, Runtime(torch.device("cpu"), torch.float32)).load()
    if boosted:
        layers = model.config.num_hidden_layers
        apply_plan(model, timing.evenly(layers, max(1, layers - SLIDING_LAYERS), WINDOW))
    ids = torch.randint(100, model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model(ids[:, :64], logits_to_keep=1)
        seconds = cpu_seconds(lambda: model(ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1))
    return {"seconds": seconds, "peak_mib": peak_mib()}


MEASURES: dict[str, Callable[..., dict[str, float]]] = {
    "operation": measure_operation,
    "mask": measure_mask,
    "prefill": measure_prefill,
}
cpu_seconds = partial(timing.seconds, clock=time.process_time)


def start_peak() -> float:
    """What this process holds now, in MiB; `peak_mib` counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


def peak_mib() -> float:
    """The most this process has held, in MiB."""
    return peak_rss_bytes() / 2**20


def compare(part: str, tokens: int, rivals: dict[str, dict[str, Any]], repeats: int) -> dict[str, Any]:
    """The rivals in turn: CPU time per token, peak memory, and the ratios of the others' time to the last one's."""

    def one(job: dict[str, Any]) -> dict[str, float]:
        return timing.alone(__file__, "--alone", json.dumps({"part": part, "tokens": tokens, **job}))

    found = timing.in_turn({name: partial(one, job) for name, job in rivals.items()}, repeats, warm_up=0)
    spent = {name: [run["seconds"] for run in runs] for name, runs in found.items()}
    *others, last = rivals
    return {
        "tokens": tokens,
        "us_per_token": {name: statistics.median(taken) / tokens * 1e6 for name, taken in spent.items()},
        "peak_mib": {name: max(run["peak_mib"] for run in runs) for name, runs in found.items()},
        "speedup_over": {name: timing.ratio(spent[name], spent[last]) for name in others},
    }


def results(asked: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """A row for every length, of the operation in both directions."""
    found: dict[str, list[dict[str, Any]]] = {}
    if "operation" in asked.parts:
        found["operation"] = [
            {"backward": backward}
            | compare("operation", tokens, {f: {"form": f, "backward": backward} for f in FORMS[::-1]}, asked.repeats)
            for tokens in asked.lengths
            for backward in (False, True)
        ]
    if "mask" in asked.parts:
        found["mask"] = [compare("mask", tokens, {"mask": {}}, asked.repeats) for tokens in asked.lengths]
    if "prefill" in asked.parts and asked.model:
        rivals = {name: {"folder": asked.model, "boosted": name == "boosted"} for name in ("base", "boosted")}
        found["prefill"] = [compare("prefill", tokens, rivals, asked.repeats) for tokens in asked.prefills]
    return found


def main() -> None:
    """Measure, and print what was found as JSON."""
    parser = timing.parser(__doc__, repeats=1)
    parser.add_argument("--model", help="directory of a model for the prefill")
    parser.add_argument("--parts", nargs="+", default=list(MEASURES), choices=list(MEASURES))
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, help="texts of operation and mask, in tokens"
    )
    parser.add_argument("--prefills", type=int, nargs="+", default=PREFILLS, help="prompts of the prefill, in tokens")
    parser.add_argument("--alone", type=json.loads, help="one measurement")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.alone:
        print(json.dumps(MEASURES[asked.alone.pop("part")](**asked.alone)))
        return
    timing.show(results(asked), asked)


if __name__ == "__main__":
    main()
