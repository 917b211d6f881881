"""A vLLM server under load: `vllm bench serve` sends it, and the server reports its KV cache and counters."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerboost.engines.protocol import WARMUP_OUTPUT_TOKENS, Answer, Load
from layerboost.engines.server import HOST, MODULE, Server, failed, gpu_bytes, guarded, running_server
from layerboost.engines.vllm import bench_command, cache_bytes, runs_on_cpu
from layerboost.errors import LayerboostError
from layerboost.recipe import Bench
from layerboost.runtime import GIB

WARMUP_REQUESTS = 4
POLL_S = 1.0
RESULT_POLL_S = 0.1
# Requests of a dying server fail some seconds before it ends.
DYING_S = 5.0
# Metrics that a benchmark reads: a fraction, and counts.
USAGE, TOKENS = "vllm:kv_cache_usage_perc", "vllm:generation_tokens_total"
PREEMPTIONS = "vllm:num_preemptions_total"
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"


@dataclass(frozen=True)
class KvCache:
    """The KV cache as vLLM logs it when it starts."""

    tokens: int
    max_concurrency: float
    context_tokens: int
    bytes: int | None


@dataclass(frozen=True)
class RunningVllm:
    """A server that is ready, and the process that sends loads to it."""

    server: Server
    generator: subprocess.Popen[bytes]
    load_log: Path
    cache: KvCache | None

    def answer(self, load: Load, advance: Callable[[float], None]) -> Answer:
        """Send one load; return vLLM's JSON unchanged, and the server's own metrics during the load."""
        seen = [self._state()]
        with tempfile.TemporaryDirectory(prefix="layerboost-bench-") as scratch:
            result = Path(scratch) / "result.json"
            assert self.generator.stdin
            with suppress(BrokenPipeError):  # it has died, as _progress will find
                self.generator.stdin.write(json.dumps(load_arguments(self.server, load, result)).encode() + b"\n")
                self.generator.stdin.flush()
            done = 0.0
            for state in self._progress(result):
                seen.append(state)
                now = min(state[TOKENS] - seen[0][TOKENS], load.tokens)
                advance(now - done)
                done = now
            self.server.check_alive()
            if not result.is_file():
                wrong = f"vllm bench serve failed at concurrency {load.concurrency} on {self.server.name}"
                raise failed(wrong, self.load_log)
            raw: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        advance(load.tokens - done)
        if raw["completed"] != load.requests:
            self.server.check_alive(DYING_S)
            wrong = f"{load.requests - raw['completed']} of {load.requests} requests failed on {self.server.name}"
            raise failed(wrong, self.server.log_file, f" and {self.load_log}")
        metrics = self._metrics([*seen, self._state()], bool(load.shared_prefix_tokens))
        return Answer(raw, metrics, self.cache.context_tokens if self.cache else None)

    def _progress(self, result: Path) -> Iterator[dict[str, float]]:
        """Yield the server's state each second until the result exists or the load generator has ended."""
        polled = time.monotonic()
        while self.generator.poll() is None and not result.is_file():
            time.sleep(RESULT_POLL_S)
            if time.monotonic() - polled > POLL_S:
                polled = time.monotonic()
                self.server.check_alive()
                with suppress(LayerboostError):  # busy; the next poll tries again
                    yield self._state()

    def _state(self) -> dict[str, float]:
        """Return counts, summed over the server's engines, the largest usage of a cache, and the memory in use now."""
        values = self.server.metrics()
        counts = {name: sum(values[name]) for name in (TOKENS, PREEMPTIONS, HITS, QUERIES)}
        gpu = 0 if runs_on_cpu() else gpu_bytes()
        return {**counts, USAGE: max(values[USAGE], default=0.0), "rss": self.server.rss_bytes(), "gpu": gpu}

    def _metrics(self, seen: list[dict[str, float]], prefix: bool) -> dict[str, float]:
        """Return memory and KV cache of one load from the states `seen`, the first before it and the last after it."""
        peak = {name: max(state[name] for state in seen) for name in (USAGE, "rss", "gpu")}
        counted = {name: seen[-1][name] - seen[0][name] for name in (PREEMPTIONS, HITS, QUERIES)}
        metrics = {
            "peak_rss_gib": round(peak["rss"] / GIB, 3),
            "kv_usage_peak": round(peak[USAGE], 4),
            "preemptions": counted[PREEMPTIONS],
        }
        if peak["gpu"]:
            metrics["gpu_memory_gib"] = round(peak["gpu"] / GIB, 3)
        if prefix:
            metrics["prefix_hit_share"] = counted[HITS] / max(counted[QUERIES], 1)
        if self.cache:
            metrics |= {"kv_cache_tokens": self.cache.tokens, "kv_max_concurrency": self.cache.max_concurrency}
            if self.cache.bytes:
                metrics["kv_used_gib"] = round(peak[USAGE] * self.cache.bytes / GIB, 4)
        return metrics


@contextmanager
def launched(name: str, folder: Path, bench: Bench, log_file: Path) -> Iterator[RunningVllm]:
    """Yield a warmed-up server with its load generator, whose output goes to a file next to `log_file`."""
    load_log = log_file.with_suffix(".load.log")
    load_log.parent.mkdir(parents=True, exist_ok=True)
    environment = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # The generator first: it imports vLLM while the server starts.
    with (
        load_log.open("wb") as output,
        guarded(load_generator_command(), environment, output) as generator,
        served(name, folder, bench, log_file) as server,
    ):
        running = RunningVllm(server, generator, load_log, kv_cache(log_file, cache_bytes(bench)))
        # As long as the measured ones without a shared prefix, so that those do not include first-time work.
        warm = min(WARMUP_OUTPUT_TOKENS, bench.output_tokens)
        running.answer(Load(WARMUP_REQUESTS, WARMUP_REQUESTS, 0, bench.input_tokens, warm, seed=0), lambda _: None)
        yield running


def served(name: str, folder: Path, bench: Bench, log_file: Path) -> AbstractContextManager[Server]:
    """Start a server of a model directory as a benchmark does; see `running_server`."""
    return running_server("vLLM", name, folder, bench_command(folder, bench), bench, log_file)


def load_generator_command() -> list[str]:
    """Return the command of the process that sends loads to a server."""
    return [*MODULE, "layerboost.engines.load_generator"]


def load_arguments(server: Server, load: Load, result: Path) -> list[str]:
    """Return the arguments of `vllm bench serve` that send `load` and write `result`."""
    model = str(server.folder.absolute())
    argv = [
        *("--backend", "openai", "--host", HOST, "--port", server.url.rsplit(":", 1)[1]),
        *("--model", model, "--tokenizer", model, "--dataset-name", "random"),
        *("--random-input-len", str(load.input_tokens), "--random-output-len", str(load.output_tokens)),
        *("--num-prompts", str(load.requests), "--max-concurrency", str(load.concurrency)),
        *("--seed", str(load.seed), "--temperature", "0", "--ignore-eos", "--disable-tqdm"),
        *("--percentile-metrics", "ttft,tpot,itl,e2el", "--metric-percentiles", "50,90,99"),
        *("--save-result", "--result-dir", str(result.parent), "--result-filename", result.name),
    ]
    if load.shared_prefix_tokens:
        # The warm-up is the first request: it puts the prefix into the server's cache before the clock starts.
        argv += ["--random-prefix-len", str(load.shared_prefix_tokens), "--num-warmups", "1"]
    return argv


def kv_cache(log_file: Path, given_bytes: int | None) -> KvCache | None:
    """Return the KV cache as vLLM logged it; None if it did not. Without `given_bytes`, its size is from the log."""
    text = log_file.read_text(encoding="utf-8", errors="replace")
    logged = re.findall(
        r"KV cache size: ([\d,]+) tokens, Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x", text
    )
    if not logged:
        return None
    tokens, context, concurrency = (float(part.replace(",", "")) for part in logged[-1])
    free = re.search(r"Available KV cache memory: ([\d.]+) GiB", text)
    size = given_bytes or (int(float(free[1]) * GIB) if free else None)
    return KvCache(int(tokens), concurrency, int(context), size)
