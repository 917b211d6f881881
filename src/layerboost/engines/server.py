"""A `vllm serve` that lives exactly as long as a `with` block, and commands that end with this process."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from layerboost.engines import guard
from layerboost.engines.vllm import GIB, HOST, check_port, runs_on_cpu, serve_command
from layerboost.errors import LayerboostError
from layerboost.model.integrity import check_checkpoint
from layerboost.recipe import Bench
from layerboost.runtime import RANKS, log, release_memory, settle_environment

POLL_S = 0.5
REPORT_EVERY_S = 30.0
# Whole GiB; where it is set it wins over --kv-cache-memory-bytes.
OVERRIDING = "VLLM_CPU_KVCACHE_SPACE"
# Of one process among several, not of vLLM's; and a key that our requests do not have.
NOT_PASSED_ON = {OVERRIDING, *RANKS, "VLLM_API_KEY"}
# Runs a module that follows, which finds no files of the current folder in place of libraries.
MODULE = (sys.executable, "-P", "-m")
# A proxy that the environment or the system names is for other hosts.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
# Of the server's metrics: what a benchmark reads, its progress first.
COUNTERS = (
    "generation_tokens",
    "kv_cache_usage_perc",
    "num_preemptions",
    "prefix_cache_hits",
    "prefix_cache_queries",
    "num_requests_running",
    "num_requests_waiting",
)
METRICS_TIMEOUT_S = 30


@dataclass(frozen=True)
class KvCache:
    """What vLLM says about its KV cache when it starts."""

    tokens: int
    max_concurrency: float
    context_tokens: int
    bytes: int | None


class Server:
    """A `vllm serve` that answers, with its memory being watched."""

    def __init__(self, name: str, folder: Path, url: str, log_file: Path, process: subprocess.Popen[bytes]) -> None:
        self.name, self.folder, self.url, self.log_file, self.process = name, folder, url, log_file, process
        self._peak_rss_bytes = self._peak_gpu_bytes = 0
        self._stopped = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="layerboost-rss", daemon=True)
        self._watcher.start()

    def kv_cache(self) -> KvCache | None:
        """The KV cache's size as vLLM logged it; None when it logged none."""
        text = self.log_file.read_text(errors="replace")
        found = re.findall(
            r"KV cache size: ([\d,]+) tokens, Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x", text
        )
        if not found:
            return None
        tokens, context, concurrency = found[-1]
        given = re.search(r"--kv-cache-memory-bytes[ =](\d+)\b", text)
        free = re.search(r"Available KV cache memory: ([\d.]+) GiB", text)
        size = int(given[1]) if given else int(float(free[1]) * GIB) if free else None
        return KvCache(int(tokens.replace(",", "")), float(concurrency), int(context.replace(",", "")), size)

    def counters(self) -> dict[str, float]:
        """COUNTERS as the server's /metrics has them now, summed over its engines, the usage being the greatest.

        Raises LayerboostError when it does not answer.
        """
        try:
            with DIRECT.open(f"{self.url}/metrics", timeout=METRICS_TIMEOUT_S) as answer:
                text = answer.read().decode()
        except OSError as error:
            self.check_alive()
            raise LayerboostError(
                f"vLLM does not tell its metrics while serving {self.name}",
                found=str(error),
                do=f"read {self.log_file}",
            ) from error
        values: dict[str, list[float]] = {name: [] for name in COUNTERS}
        for name, value in re.findall(rf"^vllm:({'|'.join(COUNTERS)})(?:_total)?\{{.*\}} (\S+)$", text, re.M):
            values[name].append(float(value))
        return {name: max(found, default=0.0) if "perc" in name else sum(found) for name, found in values.items()}

    def check_alive(self, patience_s: float = 0.0) -> None:
        """Raise LayerboostError, with what the log says, when the server has died or dies within `patience_s`."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_s)
            raise LayerboostError(
                f"vLLM died while serving {self.name}", found=last_words(self.log_file), do=f"read {self.log_file}"
            )

    def rss_bytes(self) -> int:
        """Resident memory of all processes of the server; pages they share count in each."""
        total = 0
        with suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    total += process.memory_info().rss
        return total

    def reset_peaks(self) -> None:
        """Forget what was the most memory so far, but for what is held now: a load may be shorter than a poll."""
        self._peak_rss_bytes, self._peak_gpu_bytes = self.rss_bytes(), 0

    def peaks(self) -> dict[str, float]:
        """The most memory since the last reset, sampled: of its processes, and in use on the GPUs."""
        found = {"peak_rss_gib": round(self._peak_rss_bytes / GIB, 3)}
        return found | ({"gpu_memory_gib": round(self._peak_gpu_bytes / GIB, 3)} if self._peak_gpu_bytes else {})

    def stop(self) -> None:
        """End the server and everything it started."""
        self._stopped.set()
        stop_guarded(self.process)
        self._watcher.join()

    def _watch(self) -> None:
        on_cpu = runs_on_cpu()
        while not self._stopped.wait(POLL_S):
            self._peak_rss_bytes = max(self._peak_rss_bytes, self.rss_bytes())
            if not on_cpu:
                self._peak_gpu_bytes = max(self._peak_gpu_bytes, _gpu_bytes())


@contextmanager
def running_server(name: str, folder: Path, bench: Bench, log_file: Path) -> Iterator[Server]:
    """`vllm serve` of a model directory, answering requests inside the block and gone after it, however it ends.

    Should this process be killed outright, the guard around the server ends it. Its output goes to `log_file`. Raises
    ConfigError when the port is taken or the directory holds no model, LayerboostError when the server dies or does not
    answer in time.
    """
    check_checkpoint(folder)
    check_port(bench.port)
    argv, environment = serve_command(folder, bench)
    log.info("starting vLLM with %s; its log is %s", name, log_file)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with log_file.open("wb") as output:
        output.write(
            f"{shlex.join([f'{key}={value}' for key, value in environment.items()])} {shlex.join(argv)}\n".encode(
                errors="replace"
            )
        )
        output.flush()
        server = Server(name, folder, f"http://{HOST}:{bench.port}", log_file, guarded(argv, environment, output))
    try:
        _wait_until_healthy(server, bench.startup_timeout_s)
        yield server
    finally:
        server.stop()


def guarded(
    argv: list[str], environment: dict[str, str], output: IO[bytes], errors: int | None = subprocess.STDOUT
) -> subprocess.Popen[bytes]:
    """Start a command that ends with this process, whatever ends it; `stop_guarded` ends it before.

    What models held on a GPU here is given back first: the command may want all of it.
    """
    release_memory()
    settle_environment()
    return subprocess.Popen(
        [sys.executable, guard.__file__, *argv],
        env={key: value for key, value in os.environ.items() if key not in NOT_PASSED_ON} | environment,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=errors,
        start_new_session=True,
    )


def stop_guarded(process: subprocess.Popen[bytes]) -> None:
    """End a guarded command and everything it started."""
    assert process.stdin
    process.stdin.close()
    try:
        process.wait(guard.GRACE_S + 15)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def _gpu_bytes() -> int:
    """Memory in use on all NVIDIA GPUs, whoever uses it; 0 where none can be asked."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError):
        used = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return sum(int(line) << 20 for line in used.splitlines())
    return 0


def _wait_until_healthy(server: Server, timeout_s: int) -> None:
    started = time.monotonic()
    reported = started
    while True:
        server.check_alive()
        with suppress(OSError), DIRECT.open(f"{server.url}/health", timeout=5) as answer:
            if answer.status == 200:
                break
        now = time.monotonic()
        if now - started > timeout_s:
            raise LayerboostError(
                f"vLLM did not answer with {server.name} within {timeout_s} s",
                found=last_words(server.log_file),
                do=f"read {server.log_file}; raise bench.startup_timeout_s if it only needs longer",
            )
        if now - reported > REPORT_EVERY_S:
            reported = now
            log.info("still starting, %.0f s of at most %d s", now - started, timeout_s)
        time.sleep(POLL_S)
    log.info("vLLM serves %s after %.0f s", server.name, time.monotonic() - started)


def last_words(log_file: Path, lines: int = 3) -> str:
    """The first distinct error messages of a log, the root cause being the first; else its last lines."""
    text = [line.strip() for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
    errors: dict[str, None] = {}
    for line in text:
        match = re.search(
            r"(?:^|\] |\s)((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt): .+|\S+: error: .+)", line
        )
        if match and "See root cause above" not in line:
            errors.setdefault(match[1])
    return " | ".join(list(errors)[:lines] or text[-lines:]) or "an empty log"
