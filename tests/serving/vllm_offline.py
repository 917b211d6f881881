"""Run by the tests in a process of its own: log-probabilities of prompts and greedy answers, by vLLM, as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

KV_CACHE_BYTES = 1 << 25
BATCHED_TOKENS, BLOCK_SIZE = 64, 32


def answers(folder: str, prompts: list[list[int]], output_tokens: int, trust_remote_code: bool) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    # Fewer tokens a step than the longest prompt has, so that prefill runs in chunks.
    llm = LLM(
        folder,
        trust_remote_code=trust_remote_code,
        dtype="float32",
        enforce_eager=True,
        max_num_batched_tokens=BATCHED_TOKENS,
        block_size=BLOCK_SIZE,
        max_num_seqs=8,
        kv_cache_memory_bytes=KV_CACHE_BYTES,
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    sampling = SamplingParams(temperature=0, max_tokens=output_tokens, logprobs=0, prompt_logprobs=0, ignore_eos=True)
    found = []
    for output in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False):
        prompt, completion = output.prompt_token_ids, output.outputs[0]
        tokens = list(completion.token_ids)
        first = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
        rest = [entry[token].logprob for entry, token in zip(completion.logprobs, tokens, strict=True)]
        found.append({"tokens": tokens, "logprobs": first + rest})
    cache = llm.llm_engine.vllm_config.cache_config
    return {"answers": found, "blocks": cache.num_gpu_blocks, "concurrency": cache.kv_cache_max_concurrency}


def main() -> None:
    job = json.loads(sys.stdin.read())
    done: dict[str, Any] = {}
    for folder in job["folders"]:
        started = time.monotonic()
        try:
            done[folder] = answers(folder, job["prompts"], job["output_tokens"], job["trust_remote_code"])
        except Exception as error:
            done[folder] = f"{type(error).__name__}: {error}"
        print(f"{folder}: {time.monotonic() - started:.1f} s", file=sys.stderr, flush=True)
    Path(sys.argv[1]).write_text(json.dumps(done))


if __name__ == "__main__":
    main()
