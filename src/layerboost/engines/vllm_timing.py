"""A vLLM engine in this process, timed step by step: the times to which `layerboost costs` fits a machine's rates."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from layerboost.costs.memory import CacheSettings
from layerboost.engines.vllm import runs_on_cpu, vllm_environment
from layerboost.errors import LayerboostError, first_line

REPEATS, DECODE_STEPS = 3, 12


class TimedVllm:
    """An engine with one model, whose requests are random prompts."""

    def __init__(
        self, folder: Path, settings: CacheSettings, context_tokens: int, cache_bytes: int, **options: Any
    ) -> None:
        """Start it; raise LayerboostError if it cannot start."""
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"} | vllm_environment()
        from vllm import LLM

        try:
            self.engine = LLM(
                str(folder),
                dtype="float32" if runs_on_cpu() else "bfloat16",
                enforce_eager=runs_on_cpu(),
                skip_tokenizer_init=True,
                max_model_len=context_tokens,
                max_num_batched_tokens=settings.max_batched_tokens,
                max_num_seqs=min(128, settings.max_batched_tokens),
                block_size=settings.block_size,
                kv_cache_memory_bytes=cache_bytes,
                enable_prefix_caching=False,
                disable_log_stats=True,
                **options,
            ).llm_engine
        except Exception as error:  # vLLM raises whatever its parts do
            raise LayerboostError("vLLM could not start", found=first_line(error), do="change --cache-gib") from error
        self.settings, self.context_tokens, self.cache_bytes = settings, context_tokens, cache_bytes

    def kv_cache(self) -> tuple[int, float]:
        """Return the number of blocks, and the number of requests of the full context that fit at once."""
        cache = self.engine.vllm_config.cache_config
        return cache.num_gpu_blocks, cache.kv_cache_max_concurrency

    def prefill_ms(self, tokens: int) -> float:
        """Return the milliseconds to read a prompt: the sum over its steps of the least time in a few repeats."""
        best: dict[int, float] = {}
        for repeat in range(REPEATS + 1):
            self._add(f"prefill-{repeat}", 1, tokens, 1)
            step = 0
            while self.engine.has_unfinished_requests():
                clock = time.perf_counter()
                self.engine.step()
                if repeat:  # the first is a warm-up
                    best[step] = min(best.get(step, np.inf), time.perf_counter() - clock)
                step += 1
        return 1e3 * sum(best.values())

    def decode(self, requests: int, tokens: int) -> dict[str, float]:
        """Return the least time of a step in which requests of at least `tokens` tokens decode together, in `ms`, and
        on average over these steps the `tokens` per request and the blocks that all hold, `held_blocks`.
        """
        scheduler = self.engine.engine_core.engine_core.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        free = pool.get_num_free_blocks()
        # The first request decodes while the others are read, so answers must be long enough for that.
        longest = requests * tokens // self.settings.max_batched_tokens + requests + 2 * DECODE_STEPS
        names = self._add(f"decode-{requests}-{tokens}", requests, tokens, longest)
        answers: dict[str, int] = {}
        times: list[float] = []
        held: list[int] = []
        lengths: list[float] = []
        while len(times) < DECODE_STEPS:
            decoding = len(answers) == requests
            if decoding and len(scheduler.running) < requests:
                raise LayerboostError(
                    f"{requests} requests of {tokens:,} tokens do not fit into the KV cache together",
                    do="raise --cache-gib",
                )
            clock = time.perf_counter()
            for output in self.engine.step():
                answers[output.request_id] = len(output.outputs[0].token_ids)
            if decoding:
                times.append(time.perf_counter() - clock)
                held.append(free - pool.get_num_free_blocks())
                lengths.append(tokens + float(np.mean(list(answers.values()))))
        self.engine.abort_request(names)
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return {"ms": 1e3 * min(times), "tokens": round(float(np.mean(lengths))), "held_blocks": float(np.mean(held))}

    def _add(self, name: str, requests: int, tokens: int, answer: int) -> list[str]:
        """Add requests with random prompts of one length; return their names."""
        from vllm import SamplingParams

        vocabulary = self.engine.vllm_config.model_config.get_vocab_size()
        draw = np.random.default_rng(0)
        sampling = SamplingParams(max_tokens=answer, ignore_eos=True, temperature=0, detokenize=False)
        names = [f"{name}-{index}" for index in range(requests)]
        for request in names:
            prompt = draw.integers(100, vocabulary, tokens).tolist()
            self.engine.add_request(request, {"prompt_token_ids": prompt}, sampling)
        return names
