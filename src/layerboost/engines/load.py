"""Drive vLLM's own load generator, `vllm bench serve`, against a running server."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerboost.engines.server import DIRECT, MODULE, Server, guarded, last_words, stop_guarded
from layerboost.engines.vllm import GIB, HOST
from layerboost.errors import LayerboostError
from layerboost.recipe import Bench

WARMUP_REQUESTS = 4
WARMUP_OUTPUT_TOKENS = 8
WARMUP_TIMEOUT_S = 600
POLL_S = 1.0
RESULT_POLL_S = 0.1
# A server that is dying takes its requests with it some seconds before it is gone.
DYING_S = 5.0


@dataclass(frozen=True)
class Load:
    """What is sent to a model: `requests` random prompts, at most `concurrency` at a time."""

    concurrency: int
    requests: int
    shared_prefix_tokens: int
    input_tokens: int
    output_tokens: int
    seed: int

    @property
    def tokens(self) -> int:
        """Output tokens of all requests."""
        return self.requests * self.output_tokens


def load_arguments(folder: Path, port: int, load: Load, result: Path) -> list[str]:
    """Return the arguments of `vllm bench serve` that send `load` and write `result`."""
    model = str(folder.absolute())
    argv = [
        *("--backend", "openai", "--host", HOST, "--port", str(port)),
        *("--model", model, "--tokenizer", model, "--dataset-name", "random"),
        *("--random-input-len", str(load.input_tokens), "--random-output-len", str(load.output_tokens)),
        *("--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)),
        *("--seed", str(load.seed), "--temperature", "0", "--ignore-eos", "--disable-tqdm"),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99"),
        *("--save-result", "--result-dir", str(result.parent), "--result-filename", result.name),
    ]
    if load.shared_prefix_tokens:
        # The warm-up is the first request: it leaves the prefix in the server's cache before the clock starts.
        argv += ["--random-prefix-len", str(load.shared_prefix_tokens), "--num-warmups", "1"]
    return argv


def load_generator_command() -> list[str]:
    """Return the command of the process that sends loads to a server."""
    return [*MODULE, "layerboost.engines.load_generator"]


@contextmanager
def load_generator(log_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a process that sends loads to a server for as long as the block lasts; its output goes to `log_file`."""
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("wb") as output:
        process = guarded(load_generator_command(), {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}, output)
        try:
            yield process
        finally:
            stop_guarded(process)


def run_benchmark(
    server: Server, generator: subprocess.Popen[bytes], load: Load, log_file: Path, advance: Callable[[float], None]
) -> tuple[dict[str, Any], dict[str, float]]:
    """Send one load: return vLLM's JSON untouched, and the server's own metrics of the same time.

    `log_file` is the generator's; `advance` is told of output tokens as they come. Raises LayerboostError when the
    server dies, the load generator fails, or any request fails.
    """
    with tempfile.TemporaryDirectory(prefix="layerboost-bench-") as scratch:
        result = Path(scratch) / "result.json"
        arguments = load_arguments(server.folder, int(server.url.rsplit(":", 1)[1]), load, result)
        server.reset_peaks()
        before = server.counters()
        assert generator.stdin
        with suppress(BrokenPipeError):  # it has died, which _watch sees
            generator.stdin.write(json.dumps(arguments).encode() + b"\n")
            generator.stdin.flush()
        usage_peak = _watch(server, generator, result, load, before["generation_tokens"], advance)
        server.check_alive()
        if not result.is_file():
            raise LayerboostError(
                f"vllm bench serve failed at concurrency {load.concurrency} on {server.name}",
                found=last_words(log_file),
                do=f"read {log_file}",
            )
        measured: dict[str, Any] = json.loads(result.read_text())
    if measured["completed"] != load.requests:
        server.check_alive(DYING_S)
        raise LayerboostError(
            f"{load.requests - measured['completed']} of {load.requests} requests failed on {server.name}",
            found=last_words(server.log_file),
            do=f"read {server.log_file} and {log_file}",
        )
    return measured, _told(server, load, before, usage_peak)


def _watch(
    server: Server,
    generator: subprocess.Popen[bytes],
    result: Path,
    load: Load,
    tokens_before: float,
    advance: Callable[[float], None],
) -> float:
    """Wait for the result or the load generator's end; return the greatest share of the KV cache seen in use."""
    usage_peak, told = 0.0, 0.0
    polled = time.monotonic()
    while generator.poll() is None and not result.is_file():
        time.sleep(RESULT_POLL_S)
        if time.monotonic() - polled < POLL_S:
            continue
        polled = time.monotonic()
        server.check_alive()
        try:
            now = server.counters()
        except LayerboostError:  # busy; it is asked again
            continue
        usage_peak = max(usage_peak, now["kv_cache_usage_perc"])
        done = min(now["generation_tokens"] - tokens_before, load.tokens)
        advance(done - told)
        told = done
    advance(load.tokens - told)
    return usage_peak


def _told(server: Server, load: Load, before: dict[str, float], usage_peak: float) -> dict[str, float]:
    """Memory and KV cache of one run."""
    after = server.counters()
    counted = {name: after[name] - before[name] for name in before}
    metrics = {
        **server.peaks(),
        "kv_usage_peak": round(usage_peak, 4),
        "preemptions": counted["num_preemptions"],
    }
    if load.shared_prefix_tokens:
        metrics["prefix_hit_share"] = counted["prefix_cache_hits"] / max(counted["prefix_cache_queries"], 1)
    cache = server.kv_cache()
    if cache is not None:
        metrics |= {"kv_cache_tokens": cache.tokens, "kv_max_concurrency": cache.max_concurrency}
        if cache.bytes:
            metrics["kv_used_gib"] = round(usage_peak * cache.bytes / GIB, 4)
    return metrics


def warm_up(server: Server, bench: Bench) -> None:
    """Send a few requests as long as the measured ones are beyond a shared prefix, so that none of those pays for
    first-time work."""

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
        with DIRECT.open(request, timeout=WARMUP_TIMEOUT_S) as answer:
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
