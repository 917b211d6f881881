"""Drives vLLM's own load generator, `vllm bench serve`, against a running server."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from layerboost.errors import LayerboostError
from layerboost.recipe import Bench
from layerboost.serving.server import HOST, Server, last_words, vllm_command

WARMUP_REQUESTS = 4
WARMUP_OUTPUT_TOKENS = 8
WARMUP_TIMEOUT_S = 600


def bench_command(folder: Path, bench: Bench, concurrency: int, seed: int, result: Path) -> list[str]:
    """The command that sends `bench.requests` random prompts, at most `concurrency` at a time, and writes `result`."""
    model = str(folder.absolute())
    return [
        *vllm_command(),
        *("bench", "serve", "--backend", "openai", "--host", HOST, "--port", str(bench.port)),
        *("--model", model, "--tokenizer", model, "--dataset-name", "random"),
        *("--random-input-len", str(bench.input_tokens), "--random-output-len", str(bench.output_tokens)),
        *("--num-prompts", str(bench.requests), "--max-concurrency", str(concurrency)),
        *("--seed", str(seed), "--temperature", "0", "--ignore-eos", "--disable-tqdm"),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99"),
        *("--save-result", "--result-dir", str(result.parent), "--result-filename", result.name),
    ]


def run_benchmark(server: Server, bench: Bench, concurrency: int, seed: int, log_file: Path) -> dict[str, Any]:
    """One run of `vllm bench serve`; returns its JSON untouched. Its output goes to `log_file`.

    Raises LayerboostError when the server dies, the load generator fails, or any request fails.
    """
    with tempfile.TemporaryDirectory(prefix="layerboost-bench-") as scratch:
        result = Path(scratch) / "result.json"
        command = bench_command(server.folder, bench, concurrency, seed, result)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        log_file.parent.mkdir(parents=True, exist_ok=True)
        with log_file.open("wb") as output:
            ended = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
            )
        server.check_alive()
        if ended.returncode != 0 or not result.is_file():
            raise LayerboostError(
                f"vllm bench serve failed at concurrency {concurrency} on {server.name}",
                found=last_words(log_file),
                do=f"read {log_file}",
            )
        measured: dict[str, Any] = json.loads(result.read_text())
    if measured["completed"] != bench.requests:
        raise LayerboostError(
            f"{bench.requests - measured['completed']} of {bench.requests} requests failed on {server.name}",
            found=last_words(server.log_file),
            do=f"read {server.log_file} and {log_file}",
        )
    return measured


def warm_up(server: Server, bench: Bench) -> None:
    """Send a few requests as long as the measured ones, so that none of those pays for first-time work."""

    def send(start: int) -> None:
        # Low token ids exist in every vocabulary; the prompts differ so that none is a prefix of another.
        prompt = [3 + (start + position) % 97 for position in range(bench.input_tokens)]
        output_tokens = min(WARMUP_OUTPUT_TOKENS, bench.output_tokens)
        body = {
            "model": str(server.folder.absolute()),
            "prompt": prompt,
            "max_tokens": output_tokens,
            "ignore_eos": True,
        }
        request = urllib.request.Request(
            f"{server.url}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=WARMUP_TIMEOUT_S) as answer:
            answer.read()

    try:
        with ThreadPoolExecutor(WARMUP_REQUESTS) as pool:
            list(pool.map(send, range(WARMUP_REQUESTS)))
    except OSError as error:
        server.check_alive()
        detail = error.read().decode(errors="replace")[:300] if isinstance(error, urllib.error.HTTPError) else ""
        raise LayerboostError(
            f"vLLM refused a warm-up request with {server.name}",
            found=f"{error} {detail}".strip(),
            do=f"read {server.log_file}",
        ) from error
