"""Where the time of vLLM's steps goes: reading prompts behind a shared prefix, and decoding, by kind of operation.

    python benchmarks/steps.py base=MODEL mild=runs/a/healed --requests 100

Each model in turn, in this process: a prefix is put into the cache, then all requests at once, each with a prompt
behind it, are read and decode. Times of steps are medians without a profiler; shares are of PyTorch's profiler over a
few more steps. What is in no operation is Python: scheduler, input preparation, sampler's bookkeeping. Then JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, sorted(os.sched_getaffinity(0)))))

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

# By the first kind with a part of the operation's name in it.
KINDS = {
    "attention": ("attention", "reshape_and_cache"),
    "products with weights": ("mm", "linear", "matmul", "onednn"),
    "norms, rotary, activations": ("norm", "rotary", "silu", "gelu"),
}
PROFILED, TIMED = 5, 15


def kind_of(operation: str) -> str:
    """The kind of an operation."""
    return next((kind for kind, parts in KINDS.items() if any(part in operation for part in parts)), "others")


def shares(engine: Any, steps: int) -> dict[str, float]:
    """Milliseconds a step by kind of operation, and of what is in none."""
    started = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            engine.step()
        seconds = time.perf_counter() - started
    kinds = dict.fromkeys([*KINDS, "others"], 0.0)
    for event in found.key_averages():
        kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e3 / steps
    return kinds | {"Python": 1e3 * seconds / steps - sum(kinds.values())}


def timed(engine: Any, steps: int) -> float:
    """Median milliseconds of a step."""
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    return 1e3 * float(np.median(times))


def measure(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """Reading and decoding of one model."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype="auto" if torch.cuda.is_available() else "float32",
        enforce_eager=not torch.cuda.is_available(),
        skip_tokenizer_init=True,
        max_model_len=asked.prefix_tokens + asked.prompt_tokens + 256,
        max_num_batched_tokens=asked.batched_tokens,
        max_num_seqs=asked.requests,
        block_size=asked.block_size,
        kv_cache_memory_bytes=int(asked.cache_gib * (1 << 30)),
        enable_prefix_caching=True,
        disable_log_stats=True,
    )
    engine, draw = llm.llm_engine, np.random.default_rng(0)
    vocabulary = engine.vllm_config.model_config.get_vocab_size()

    def tokens(count: int) -> list[int]:
        return draw.integers(100, vocabulary, count).tolist()

    def sampling(answer: int) -> Any:
        return SamplingParams(max_tokens=answer, ignore_eos=True, temperature=0, detokenize=False)

    prefix = tokens(asked.prefix_tokens)
    for _ in range(2):  # with the second, plans of full and sliding layers keep the blocks that a hit needs
        llm.generate([{"prompt_token_ids": prefix + tokens(asked.prompt_tokens)}], sampling(1), use_tqdm=False)
    for index in range(asked.requests):
        engine.add_request(str(index), {"prompt_token_ids": prefix + tokens(asked.prompt_tokens)}, sampling(250))
    answered: set[str] = set()
    started = time.perf_counter()
    while len(answered) < asked.requests:
        answered |= {output.request_id for output in engine.step()}
    reading = time.perf_counter() - started
    found = {"reading_s": reading, "decode_ms": timed(engine, TIMED), "shares_ms": shares(engine, PROFILED)}
    engine.abort_request([str(index) for index in range(asked.requests)])
    while engine.has_unfinished_requests():
        engine.step()
    return found


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--prefix-tokens", type=int, default=2048)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--batched-tokens", type=int, default=256)
    parser.add_argument("--block-size", type=int, default=32)
    parser.add_argument("--cache-gib", type=float, default=3.0)
    asked = parser.parse_args()
    results = {}
    for name, folder in (model.split("=", 1) for model in asked.models):
        found = results[name] = measure(Path(folder), asked)
        print(f"{name}: all read in {found['reading_s']:.1f} s; a decoding step {found['decode_ms']:.0f} ms; profiled:")
        for kind, ms in found["shares_ms"].items():
            print(f"  {kind:28} {ms:8.1f} ms")
    print(json.dumps(vars(asked) | {"results": results}))


if __name__ == "__main__":
    main()
