"""A server that runs for the time of a `with` block, and commands that end with this process."""

from __future__ import annotations

import errno
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import IO

import psutil
from prometheus_client.parser import text_string_to_metric_families

from layerboost.engines import guard
from layerboost.engines.protocol import Command
from layerboost.errors import ConfigError, LayerboostError
from layerboost.recipe import Bench
from layerboost.runtime import RANKS, clean_environment, log, release_memory

HOST = "127.0.0.1"
POLL_S = 0.5
REPORT_EVERY_S = 30.0
METRICS_TIMEOUT_S = 30
# Variables that a server must not get: torchrun's ranks; a key that our requests do not send; a cache size in GiB,
# which overrides vLLM's --kv-cache-memory-bytes.
NOT_PASSED_ON = {*RANKS, "VLLM_API_KEY", "VLLM_CPU_KVCACHE_SPACE"}
# Of requests: the second of an answer that is cut off.
REQUEST_ERRORS = (OSError, HTTPException)
# Runs the module that follows; with -P, files of the current directory are not imported in place of libraries.
MODULE = (sys.executable, "-P", "-m")
# An error in a log: as Python ends with it, or as argparse says it.
ERROR = re.compile(r"(?:^|\] |\s)((?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Interrupt): .+|\S+: error: .+)")
# Without proxies: those of the environment or the system are for other hosts.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Server:
    """A started server with an HTTP interface. `engine` is its name in messages."""

    engine: str
    name: str
    folder: Path
    url: str
    log_file: Path
    process: subprocess.Popen[bytes]

    def metrics(self) -> Mapping[str, list[float]]:
        """Return the values of each metric at /metrics, one per series of labels; an empty list for an unknown name.

        Raise LayerboostError if the server does not answer.
        """
        try:
            with DIRECT.open(f"{self.url}/metrics", timeout=METRICS_TIMEOUT_S) as answer:
                text = answer.read().decode()
        except REQUEST_ERRORS as error:
            self.check_alive()
            raise LayerboostError(
                f"{self.engine} does not report its metrics while serving {self.name}",
                found=str(error),
                do=f"read {self.log_file}",
            ) from error
        values: dict[str, list[float]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values[sample.name].append(sample.value)
        return values

    def check_alive(self, patience_s: float = 0.0) -> None:
        """Raise LayerboostError, with the errors in the log, if the server has died or dies within `patience_s`."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience_s)
            raise failed(f"{self.engine} died while serving {self.name}", self.log_file)

    def wait_until_ready(self, timeout_s: int) -> None:
        """Return when the server answers /health; raise LayerboostError if it dies or does not within `timeout_s`."""
        started = reported = time.monotonic()
        while True:
            self.check_alive()
            with suppress(*REQUEST_ERRORS), DIRECT.open(f"{self.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    break
            now = time.monotonic()
            if now - started > timeout_s:
                more = "; raise bench.startup_timeout_s if it needs more time"
                raise failed(f"{self.engine} did not answer with {self.name} within {timeout_s} s", self.log_file, more)
            if now - reported > REPORT_EVERY_S:
                reported = now
                log.info("still starting, %.0f s of at most %d s", now - started, timeout_s)
            time.sleep(POLL_S)
        log.info("%s serves %s after %.0f s", self.engine, self.name, time.monotonic() - started)

    def rss_bytes(self) -> int:
        """Return the resident memory of the server's processes; pages that they share are counted more than once."""
        total = 0
        with suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error):
                    total += process.memory_info().rss
        return total


@contextmanager
def running_server(
    engine: str,
    name: str,
    folder: Path,
    command: Command,
    bench: Bench,
    log_file: Path,
) -> Iterator[Server]:
    """Yield a server of the model directory `folder` on HOST and `bench.port`, ready for requests.

    It ends with the block, or with this process: the guard ends it if this process is killed. Its output goes to
    `log_file`. Raise ConfigError if the port is taken, LayerboostError if the server dies or does not answer in time.
    """
    check_port(bench.port)
    argv, environment = command
    log.info("starting %s with %s; its log is %s", engine, name, log_file)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    line = shlex.join([*(f"{key}={value}" for key, value in environment.items()), *argv])
    with log_file.open("wb") as output:
        output.write(f"{line}\n".encode(errors="replace"))
        output.flush()
        with guarded(argv, environment, output) as process:
            server = Server(engine, name, folder, f"http://{HOST}:{bench.port}", log_file, process)
            server.wait_until_ready(bench.startup_timeout_s)
            yield server


@contextmanager
def guarded(
    argv: Sequence[str], environment: Mapping[str, str], output: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """Yield a started command that ends with the block or with this process, together with all that it started.

    This process first frees the GPU memory of its models: the command may need all of it.
    """
    release_memory()
    clean_environment()
    process = subprocess.Popen(
        [sys.executable, guard.__file__, *argv],
        env={key: value for key, value in os.environ.items() if key not in NOT_PASSED_ON} | dict(environment),
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        assert process.stdin
        process.stdin.close()
        try:
            process.wait(guard.GRACE_S + 15)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


def check_port(port: int, host: str = HOST) -> None:
    """Raise ConfigError if another process listens on `port`, or if it is not a valid port."""
    with socket.socket() as probe:
        # As servers bind it: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            found = "another process listens there" if taken else str(error)
            raise ConfigError(f"port {port} cannot be used", found=found, do="choose another port") from None


def gpu_bytes() -> int:
    """Return the memory in use on all NVIDIA GPUs, by any process; 0 without nvidia-smi."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    with suppress(OSError, ValueError):
        used = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return sum(int(line) << 20 for line in used.splitlines())
    return 0


def failed(wrong: str, log_file: Path, more: str = "") -> LayerboostError:
    """Return the error of a command that failed, with what its log says; `more`: what to do besides reading that."""
    return LayerboostError(wrong, found=last_words(log_file), do=f"read {log_file}{more}")


def last_words(log_file: Path) -> str:
    """Return the first distinct error messages of a log, the root cause being the first; else its last lines."""
    text = [line.strip() for line in log_file.read_text(encoding="utf-8", errors="replace").splitlines()]
    found = [ERROR.search(line) for line in text if "See root cause above" not in line]
    errors = dict.fromkeys(match[1] for match in found if match)
    return " | ".join(list(errors)[:3] or list(filter(None, text))[-3:]) or "an empty log"
