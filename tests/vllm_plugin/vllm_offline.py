"""The process of vLLM that the tests share: one job per line of standard input, one JSON answer per line of output.

`{"engine": OPTIONS}` starts an engine and answers with log-probabilities of the prompts and greedy answers, or with the
error's text.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from typing import Any

KV_CACHE_BYTES = 1 << 25
BATCHED_TOKENS, BLOCK_SIZE = 64, 32
LONG_END = 50


def answers(
    prompts: list[list[int]],
    output_tokens: int,
    adapter: str | None,
    prefix_tokens: int,
    images: list[str],
    **options: Any,
) -> dict[str, Any]:
    """Of one engine. With prefix caching the prompts are asked twice, and the second pass finds them in the cache.

    `images`: a file for each of the first prompts, which have its placeholder.

    Last, if there are `prefix_tokens`, two prompts that share so many tokens: `cached_of_prefix` are those that the
    second did not read.
    """
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    # Fewer tokens a step than the longer prompts have, so that prefill runs in chunks.
    settings: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_num_batched_tokens": BATCHED_TOKENS,
        "block_size": BLOCK_SIZE,
        "max_num_seqs": len(prompts),
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "enable_lora": adapter is not None,
    }
    llm = LLM(**settings | options)
    lora = LoRARequest("adapter", 1, adapter) if adapter else None
    # vLLM fails at a prompt's own log-probabilities under an adapter, of stock models too.
    found = ask(llm, prompts, output_tokens, lora, lora is None, images)
    passes = 1
    if llm.llm_engine.vllm_config.cache_config.enable_prefix_caching:
        # The first pass read no cache where it was asked for the prompt's own log-probabilities.
        found += ask(llm, prompts, output_tokens, lora, False, images)
        passes = 2
    cache = llm.llm_engine.vllm_config.cache_config
    return {
        "cached_of_prefix": cached_of_prefix(llm, prompts, prefix_tokens) if prefix_tokens else 0,
        "answers": found,
        "passes": passes,
        "blocks": cache.num_gpu_blocks,
        "concurrency": cache.kv_cache_max_concurrency,
    }


def cached_of_prefix(llm: Any, prompts: list[list[int]], tokens: int) -> int:
    """How much of a prefix the second prompt that has it finds in the cache."""
    prefix = [3 + index * index % 89 for index in range(tokens)]
    # Ends long enough that the windows which vLLM keeps at a prompt's own end are not those of the prefix.
    for end in prompts[0] * LONG_END, prompts[1] * LONG_END:
        [answer] = ask(llm, [prefix + end], 1, None, False, [])
    return int(answer["cached_tokens"])


def ask(
    llm: Any, prompts: list[list[int]], output_tokens: int, lora: Any, prompt_logprobs: bool, images: list[str]
) -> list[Any]:
    """Tokens of each greedy answer, log-probabilities of its tokens and of the prompt's before them if asked for."""
    from PIL import Image
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0,
        max_tokens=output_tokens,
        logprobs=0,
        prompt_logprobs=0 if prompt_logprobs else None,
        ignore_eos=True,
    )
    found = []
    requests: list[dict[str, Any]] = [{"prompt_token_ids": prompt} for prompt in prompts]
    for request, file in zip(requests, images, strict=False):
        request["multi_modal_data"] = {"image": Image.open(file).convert("RGB")}
    for output in llm.generate(requests, sampling, use_tqdm=False, lora_request=lora):
        prompt, completion = output.prompt_token_ids, output.outputs[0]
        tokens = list(completion.token_ids)
        entries = [*zip((output.prompt_logprobs or [])[1:], prompt[1:], strict=prompt_logprobs)]
        entries += zip(completion.logprobs, tokens, strict=True)
        logprobs = [entry[token].logprob for entry, token in entries]
        answer = {"tokens": tokens, "logprobs": logprobs, "cached_tokens": output.num_cached_tokens}
        found.append(answer | {"prompt": prompt})
    return found


def answered(job: dict[str, Any]) -> Any:
    """Do one job."""
    started = time.monotonic()
    try:
        settings = {"adapter": None, "prefix_tokens": 0, "images": []} | job["engine"]
        return answers(job["prompts"], job["output_tokens"], **settings)
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    finally:
        print(f"{time.monotonic() - started:.1f} s for {str(job)[-300:]}", file=sys.stderr, flush=True)


def main() -> None:
    """Answer jobs until standard input ends; what vLLM prints goes to standard error."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answered(json.loads(line))), file=told, flush=True)


if __name__ == "__main__":
    main()
