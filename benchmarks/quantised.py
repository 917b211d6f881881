"""What quantisation costs and gives: quality and vLLM's speed of checkpoints, the first being the reference.

    python benchmarks/quantised.py --text FILE boosted=runs/smollm2/healed int8=runs/smollm2/int8
    python benchmarks/quantised.py --text FILE boosted=runs/smollm2/healed fp8=runs/smollm2/healed --fp8-kv fp8

Quality: perplexity as vLLM serves it, and KL(reference ‖ model) per token in Transformers, which has no fp8 KV cache.
Speed: all models lie in one process and take turns; every round's time is divided by the reference's of the same round.
Prints a table, then JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))

import torch
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

from layerboost import AutoModelForCausalLM  # Transformers' own, which then loads boosted checkpoints too

PREFILL_PROMPTS, PREFILL_TOKENS = 2, 1024
DECODE_PROMPTS, DECODE_PROMPT_TOKENS, DECODE_TOKENS = 8, 32, 32
KV_CACHE_BYTES = 1 << 29


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--text", type=Path, required=True, help="a plain text file")
    parser.add_argument("--sequences", type=int, default=8, help="of 512 tokens, for quality")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fp8-kv", nargs="+", default=[], metavar="NAME", help="models whose KV cache is fp8")
    asked = parser.parse_args()
    folders = dict(model.split("=", 1) for model in asked.models)
    reference = next(iter(folders))
    if unknown := {*asked.fp8_kv} - {*folders}:
        parser.error(f"--fp8-kv {' '.join(sorted(unknown))}: the models are {', '.join(folders)}")
    tokenizer = AutoTokenizer.from_pretrained(folders[reference])
    ids = tokenizer(asked.text.read_text(), return_tensors="pt").input_ids[0]
    text = ids[: asked.sequences * 512].view(-1, 512)

    found: dict[str, dict[str, Any]] = {name: {"weights_mib": weights_mib(folder)} for name, folder in folders.items()}
    for name, kl in divergences({name: folders[name] for name in folders if name not in asked.fp8_kv}, text).items():
        found[name]["kl"] = kl
    engines = {name: engine(folder, name in asked.fp8_kv) for name, folder in folders.items()}
    for name, llm in engines.items():
        found[name]["perplexity"] = perplexity(llm, text.tolist())
    print(f"quality: {found}", file=sys.stderr, flush=True)
    rounds = timings(engines, ids.tolist(), asked.rounds)
    for name, times in rounds.items():
        for what, tokens in (
            ("prefill", PREFILL_PROMPTS * PREFILL_TOKENS),
            ("decode", DECODE_PROMPTS * DECODE_TOKENS),
        ):
            ratios = [base[what] / own[what] for own, base in zip(times, rounds[reference], strict=True)]
            found[name][f"{what}_tokens_per_s"] = tokens / min(own[what] for own in times)
            found[name][f"{what}_ratio"] = [min(ratios), sum(ratios) / len(ratios), max(ratios)]
    show(found)
    print(json.dumps({"tokens": text.numel(), "rounds": asked.rounds, "models": found}))


def weights_mib(folder: str) -> float:
    """Size of the safetensors files."""
    return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 2**20


@torch.no_grad()
def divergences(folders: dict[str, str], text: torch.Tensor) -> dict[str, float]:
    """KL(reference ‖ model) per token, mean over text `[N, T]`; int8 activations are rounded as in a kernel."""
    reference, *others = (AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for f in folders.values())
    totals = [0.0] * len(others)
    for row in text.split(1):
        wanted = reference(row).logits.log_softmax(-1)
        for index, model in enumerate(others):
            own = model(row).logits.log_softmax(-1)
            totals[index] += float((wanted.exp() * (wanted - own)).sum())
    return dict(zip(folders, [0.0, *(total / text.numel() for total in totals)], strict=True))


def engine(folder: str, fp8_kv: bool) -> LLM:
    """vLLM with a model, float32 where it is not int8 or fp8."""
    return LLM(
        folder,
        dtype="float32",
        kv_cache_dtype="fp8" if fp8_kv else "auto",
        enforce_eager=True,
        max_model_len=2048,
        max_num_batched_tokens=1024,
        max_num_seqs=DECODE_PROMPTS,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )


def perplexity(llm: LLM, sequences: list[list[int]]) -> float:
    """Of sequences of token ids, by vLLM's own log-probabilities."""
    sampling = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    losses = []
    for output in llm.generate([{"prompt_token_ids": ids} for ids in sequences], sampling, use_tqdm=False):
        pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
        losses += [-entry[token].logprob for entry, token in pairs]
    return math.exp(sum(losses) / len(losses))


def timings(engines: dict[str, LLM], ids: list[int], rounds: int) -> dict[str, list[dict[str, float]]]:
    """Seconds per round of prefill and of decode, each model after the other; the first round warms up."""
    prefill = cut(ids, PREFILL_PROMPTS, PREFILL_TOKENS)
    decode = cut(ids, DECODE_PROMPTS, DECODE_PROMPT_TOKENS)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
    for turn in range(rounds + 1):
        for name, llm in engines.items():
            times = {"prefill": seconds(llm, prefill, 1), "decode": seconds(llm, decode, DECODE_TOKENS)}
            print(f"round {turn} of {rounds}, {name}: {times} s", file=sys.stderr, flush=True)
            if turn:
                found[name].append(times)
    return found


def cut(ids: list[int], count: int, length: int) -> list[dict[str, list[int]]]:
    """Prompts out of a text."""
    return [{"prompt_token_ids": ids[start * length : (start + 1) * length]} for start in range(count)]


def seconds(llm: LLM, prompts: list[dict[str, list[int]]], output_tokens: int) -> float:
    """Time to answer prompts, all at once."""
    sampling = SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
    started = time.perf_counter()
    llm.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - started


def show(found: dict[str, dict[str, Any]]) -> None:
    """The table, as it stands in docs/guide/serving.md."""
    print("| | weights, MiB | perplexity | KL | prefill, tokens/s | ratio | decode, tokens/s | ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in found.items():
        cells = [f"{row['weights_mib']:.0f}", f"{row['perplexity']:.2f}", f"{row['kl']:.4f}" if "kl" in row else "–"]
        for what in ("prefill", "decode"):
            low, mean, high = row[f"{what}_ratio"]
            cells += [f"{row[f'{what}_tokens_per_s']:.0f}", f"{mean:.2f} ({low:.2f} to {high:.2f})"]
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
