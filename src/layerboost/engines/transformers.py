"""The load of a benchmark answered by Transformers, one batch after the other, for machines without vLLM.

`python -m layerboost.engines.transformers JOB RESULT` is a process of its own: its peak memory is the model's.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, StoppingCriteria

from layerboost.artifacts import json_text, write_text
from layerboost.engines.load import WARMUP_OUTPUT_TOKENS, Load
from layerboost.engines.server import MODULE, guarded, last_words, stop_guarded
from layerboost.engines.vllm import GIB
from layerboost.errors import LayerboostError
from layerboost.model.checkpoint import Source, load_model
from layerboost.recipe import Recipe
from layerboost.runtime import peak_rss_bytes, start_runtime

# Special tokens lie below, as a rule.
FIRST_TOKEN = 3


def run_generation(name: str, folder: Path, recipe: Recipe, load: Load, log_file: Path) -> dict[str, Any]:
    """Answer `load` in a process of its own; returns its JSON, with vLLM's names where it has them.

    Its output goes to `log_file`. Raises LayerboostError when it fails.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    result = log_file.with_suffix(".result")
    result.unlink(missing_ok=True)
    settings = recipe.model_dump(include={"device", "dtype", "trust_remote_code"})
    job = {"folder": str(folder.absolute()), "settings": settings, "load": asdict(load)}
    with log_file.open("wb") as output:
        process = guarded([*MODULE, __name__, json.dumps(job), str(result)], {}, output)
        try:
            process.wait()
        finally:
            stop_guarded(process)
    if not result.is_file():
        raise LayerboostError(
            f"Transformers failed at concurrency {load.concurrency} on {name}",
            found=last_words(log_file),
            do=f"read {log_file}",
        )
    measured: dict[str, Any] = json.loads(result.read_text())
    result.unlink()
    return measured


class Clock(StoppingCriteria):
    """Notes when each token of a batch is there; stops nothing."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def prompts(load: Load, vocabulary: int) -> torch.Tensor:
    """Random prompts `[requests, shared prefix + input]`, the same for every model with this vocabulary."""
    draw = torch.Generator().manual_seed(load.seed)
    prefix = torch.randint(FIRST_TOKEN, vocabulary, (1, load.shared_prefix_tokens), generator=draw)
    own = torch.randint(FIRST_TOKEN, vocabulary, (load.requests, load.input_tokens), generator=draw)
    return torch.cat([prefix.expand(load.requests, -1), own], 1)


def answer(
    model: PreTrainedModel, batch: torch.Tensor, prefix_tokens: int, output_tokens: int
) -> tuple[torch.Tensor, list[float]]:
    """Greedy answers `[B, output]` to prompts `[B, T]`, and the seconds at which each step's tokens were there.

    The first `prefix_tokens` lie in the cache when the clock starts.
    """
    cache = None
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    if prefix_tokens:
        prefix = batch[:, :prefix_tokens]
        known = model.generate(
            prefix, attention_mask=torch.ones_like(prefix), max_new_tokens=1, return_dict_in_generate=True, **settings
        )
        cache = known.past_key_values
    clock = Clock()
    started = time.perf_counter()
    found = model.generate(
        batch,
        attention_mask=torch.ones_like(batch),
        past_key_values=cache,
        max_new_tokens=output_tokens,
        stopping_criteria=[clock],
        **settings,
    )
    return found[:, batch.shape[1] :], [moment - started for moment in clock.times]


def measure(model: PreTrainedModel, load: Load) -> dict[str, Any]:
    """Answer all requests, `concurrency` in a batch; throughput and latency under vLLM's names for them."""
    text = prompts(load, model.config.vocab_size).to(model.device)
    warm = min(WARMUP_OUTPUT_TOKENS, load.output_tokens)
    answer(model, text[: load.concurrency], load.shared_prefix_tokens, warm)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    runs = []
    for batch in text.split(load.concurrency):
        _, times = answer(model, batch, load.shared_prefix_tokens, load.output_tokens)
        runs.append((len(batch), np.array(times)))
    duration = sum(times[-1] for _, times in runs)
    sizes = [size for size, _ in runs]
    tokens = sum(size * len(times) for size, times in runs)

    def spread(name: str, values: list[float]) -> dict[str, float]:
        of_requests = np.repeat(values, sizes) * 1e3
        return {
            f"median_{name}_ms": float(np.median(of_requests)),
            f"p99_{name}_ms": float(np.percentile(of_requests, 99)),
        }

    steps = np.concatenate([np.repeat(np.diff(times), size) for size, times in runs]) * 1e3
    found = {
        "completed": load.requests,
        "duration": float(duration),
        "total_output_tokens": tokens,
        "request_throughput": float(load.requests / duration),
        "output_throughput": float(tokens / duration),
        **spread("ttft", [times[0] for _, times in runs]),
        **spread("tpot", [(times[-1] - times[0]) / max(len(times) - 1, 1) for _, times in runs]),
        **spread("e2el", [times[-1] for _, times in runs]),
        "median_itl_ms": float(np.median(steps)) if len(steps) else 0.0,
        "p99_itl_ms": float(np.percentile(steps, 99)) if len(steps) else 0.0,
        "peak_rss_gib": round(peak_rss_bytes() / GIB, 3),
    }
    if torch.cuda.is_available():
        found["gpu_memory_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 3)
    return found


def main(job_text: str, result: Path) -> None:
    """Do a job and write its result."""
    job = json.loads(job_text)
    recipe, folder = Recipe(**job["settings"]), Path(job["folder"])
    model = load_model(Source(folder.name, folder), start_runtime(recipe), recipe.trust_remote_code)
    write_text(result, json_text(measure(model, Load(**job["load"])), str(result)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
