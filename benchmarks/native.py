"""vLLM's own classes against its Transformers backend, for the same boosted checkpoints of Llama and Qwen3.

    python benchmarks/native.py

A Llama and a Qwen3 of SmolLM2-135M's shape with random weights, all three kinds of layers. Both engines in this
process, their decoding steps and prompts in turn; a ratio above 1 is in favour of vLLM's own class. Then JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from layerboost.artifacts import LayerPlan
from layerboost.engines.vllm_timing import TimedVllm
from layerboost.model.memory import CacheSettings
from layerboost.model.surgery import apply_plan
from layerboost.runtime import machine, versions

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
WINDOW, CONTEXT_TOKENS, CACHE_BYTES = 64, 2048, 1 << 30
ENGINE = CacheSettings(max_batched_tokens=256, block_size=32, concurrent_batches=1)
# Without asynchronous scheduling a step's time is its own. The two engines share a GPU.
ALONE = {"async_scheduling": False, **({"gpu_memory_utilization": 0.4} if torch.cuda.is_available() else {})}


def boosted(family: str, folder: Path) -> None:
    """Save a model with a third of its layers full, a third sliding with sinks, a third without attention."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE)).eval()
    kinds: dict[int, dict[str, Any]] = {
        0: {"attention": "full"},
        1: {"attention": "sliding", "window": WINDOW, "sink": True},
        2: {"attention": "none"},
    }
    layers = [LayerPlan(layer=layer, **kinds[layer % 3]) for layer in range(SHAPE["num_hidden_layers"])]
    apply_plan(
        model, layers, {entry.layer: torch.zeros(SHAPE["num_attention_heads"]) for entry in layers if entry.sink}
    )
    model.save_pretrained(folder)


def engine(folder: Path, native: bool) -> Any:
    """A vLLM engine that serves a boosted checkpoint by the one class or the other."""
    from layerboost.vllm_plugin import model as served

    own = dict(served.NATIVE)
    if not native:
        served.NATIVE.clear()
    try:
        return TimedVllm(folder, ENGINE, CONTEXT_TOKENS, CACHE_BYTES, **ALONE).engine
    finally:
        served.NATIVE.update(own)


class Clock:
    """One engine under load, timed step by step."""

    def __init__(self, found: Any) -> None:
        self.engine, self.draw = found, np.random.default_rng(0)
        self.count = 0

    def add(self, tokens: int, answer: int) -> None:
        """One more request."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=answer, ignore_eos=True, temperature=0, detokenize=False)
        prompt = self.draw.integers(100, SHAPE["vocab_size"], tokens).tolist()
        self.engine.add_request(str(self.count), {"prompt_token_ids": prompt}, sampling)
        self.count += 1

    def finish(self) -> float:
        """Milliseconds until no request is left."""
        started = time.perf_counter()
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return 1e3 * (time.perf_counter() - started)

    def step(self) -> float:
        """Milliseconds of a step."""
        started = time.perf_counter()
        self.engine.step()
        return 1e3 * (time.perf_counter() - started)


def measure(family: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of reading a prompt and of decoding steps at each batch, by both, and their ratio."""
    with tempfile.TemporaryDirectory() as root:
        boosted(family, Path(root))
        clocks = {native: Clock(engine(Path(root), native)) for native in (True, False)}
    names = {native: type(_model(clock.engine)).__name__ for native, clock in clocks.items()}
    assert names[True] != names[False], names
    found: dict[str, Any] = {"classes": list(names.values())}
    prompts: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(asked.rounds + 1):  # the first is a warm-up
        for native, clock in clocks.items():
            clock.add(asked.prompt_tokens, 1)
            prompts[native].append(clock.finish())
    found["prompt"] = _compared(prompts, skip=1)
    for batch in asked.batches:
        steps: dict[bool, list[float]] = {True: [], False: []}
        for clock in clocks.values():
            for _ in range(batch):
                clock.add(
                    asked.context_tokens,
                    asked.steps + 2 * batch * asked.context_tokens // ENGINE.max_batched_tokens + 8,
                )
            while clock.engine.step() is not None and _reading(clock.engine):
                pass
        for _ in range(asked.steps):
            for native, clock in clocks.items():
                steps[native].append(clock.step())
        found[f"decoding {batch}"] = _compared(steps, skip=2)
        for clock in clocks.values():
            assert clock.engine.get_num_unfinished_requests() == batch, "a request ended while it was timed"
            clock.engine.abort_request([str(index) for index in range(clock.count)])
            clock.finish()
    return found


def _model(found: Any) -> Any:
    return found.model_executor.driver_worker.model_runner.model


def _reading(found: Any) -> bool:
    """Whether a request has not begun to answer."""
    scheduler = found.engine_core.engine_core.scheduler
    return bool(scheduler.waiting) or any(request.num_output_tokens == 0 for request in scheduler.running)


def _compared(times: dict[bool, list[float]], skip: int) -> dict[str, float]:
    own, backend = (float(np.median(times[native][skip:])) for native in (True, False))
    ratios = [b / a for a, b in zip(times[True][skip:], times[False][skip:], strict=True)]
    low, high = np.percentile(ratios, [10, 90])
    return {"own_ms": own, "backend_ms": backend, "ratio": backend / own, "p10": float(low), "p90": float(high)}


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", default=["llama", "qwen3"], choices=["llama", "qwen3"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--context-tokens", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    results = {family: measure(family, asked) for family in asked.families}
    for family, found in results.items():
        for what, row in found.items():
            if what != "classes":
                print(
                    f"{family}, {what}: own {row['own_ms']:.1f} ms, backend {row['backend_ms']:.1f} ms, "
                    f"{row['ratio']:.2f} times ({row['p10']:.2f} to {row['p90']:.2f})"
                )
    print(json.dumps(vars(asked) | {"machine": machine(), "versions": versions(), "results": results}))


if __name__ == "__main__":
    main()
