"""Stock runtimes in a process without layerboost: one job per line of input, one JSON answer per line of output.

A job is a format, what was exported, prompts and the size of the vocabulary. The answer has the log-probabilities of
the token after each prompt.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any


def by_transformers(path: str, prompts: list[list[int]], vocabulary: int) -> list[Any]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).tolist() for prompt in prompts]


def by_mlx(path: str, prompts: list[list[int]], vocabulary: int) -> list[Any]:
    import mlx.core as mx
    import mlx_lm

    model, _ = mlx_lm.utils.load_model(Path(path))
    last = [model(mx.array([prompt]))[0, -1].astype(mx.float32) for prompt in prompts]
    return [(logits - mx.logsumexp(logits)).tolist() for logits in last]


def by_llama_cpp(path: str, prompts: list[list[int]], vocabulary: int) -> list[Any]:
    ask, found = serving(Path(path), verbosity=5), []
    for prompt in prompts:
        wanted = {"prompt": prompt, "n_predict": 1, "n_probs": vocabulary, "temperature": 0}
        [first] = ask("completion", wanted | {"post_sampling_probs": False})["completion_probabilities"]
        logprobs = {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}
        found.append([logprobs[token] for token in range(vocabulary)])
    return found


def serving(file: Path, verbosity: int = 0) -> Callable[[str, dict[str, Any]], Any]:
    """llama.cpp in this process with a file loaded, to ask by path and message; verbosity 5 logs what it loads."""
    import xllamacpp as llama

    params = llama.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_batch, params.n_ubatch, params.verbosity = 256, 64, 64, verbosity
    params.warmup = params.fit_params = False
    params.n_parallel = params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    server = llama.Server(params)

    def ask(path: str, message: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"{server.listening_address}/{path}", json.dumps(message).encode())
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    # A server that is destroyed before its loop runs waits for the loop's end forever, and tokenizing needs no loop.
    ask("completion", {"prompt": [1], "n_predict": 1})
    return ask


RUNTIMES = {"granite-swa": by_transformers, "mlx": by_mlx, "gguf": by_llama_cpp}


def main() -> None:
    """Answer jobs until standard input ends; what the libraries print goes to standard error."""
    try:
        import layerboost  # noqa: F401
    except ImportError as error:
        assert "is hidden" in str(error)  # noqa: PT017
    else:
        raise SystemExit("layerboost can be imported")
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        job = json.loads(line)
        print(json.dumps(RUNTIMES[job.pop("to")](**job)), file=told, flush=True)


if __name__ == "__main__":
    main()
