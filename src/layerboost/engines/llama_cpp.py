"""llama.cpp as an engine: its `llama-server`, from the PATH or from the package xllamacpp, on GGUF exports."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from layerboost.engines.protocol import WARMUP_OUTPUT_TOKENS, Answer, Command, Load, latencies
from layerboost.engines.server import (
    DIRECT,
    HOST,
    MODULE,
    REQUEST_ERRORS,
    Server,
    check_port,
    last_words,
    running_server,
)
from layerboost.engines.xllamacpp_server import check_arguments
from layerboost.errors import ConfigError, LayerboostError
from layerboost.exporting.gguf_file import window_in
from layerboost.exporting.stage import check_gguf, gguf_file
from layerboost.model.integrity import read_config
from layerboost.recipe import Bench, EngineName, Recipe
from layerboost.runtime import GIB, cores, log
from layerboost.schemas.plan import PlanFile

NAME: EngineName = "llama.cpp"
UNUSED = frozenset({"kv_cache_gib"})
# llama.cpp's cells of a KV cache come in steps of this many tokens.
CELLS = 256
# Flags that a benchmark sets itself, with their short names.
RESERVED = (
    *("--model", "-m", "--host", "--port", "--ctx-size", "-c", "--parallel", "-np", "--threads", "-t"),
    *("--verbosity", "-lv", "--cache-ram", "-cram", "--slot-save-path"),
)
SWA_FULL = "--swa-full"
WHOLE_CONTEXT = "llama.cpp then holds the whole context in sliding layers, too, so that a plan saves no memory"
UBATCH, UBATCH_SHORT = "--ubatch-size", "-ub"
UBATCH_DEFAULT, LEAST_BATCH = 512, 64
WARMUP_INPUT_TOKENS = 64


def check(bench: Bench, folders: Iterable[Path]) -> str:
    """Return llama.cpp's version; raise ConfigError if it cannot be benchmarked here."""
    found = version()
    if given := sorted(set(RESERVED) & names_of(bench.server_args)):
        raise ConfigError(
            f"bench.server_args may not have {given[0]}",
            found="the benchmark itself sets model, address, context, slots and what is logged",
            do="remove it; the port is bench.port",
        )
    if SWA_FULL in names_of(bench.server_args):
        raise ConfigError(f"bench.server_args may not have {SWA_FULL}", found=WHOLE_CONTEXT, do="remove it")
    if not shutil.which("llama-server"):
        check_arguments(bench.server_args)
    for folder in folders:
        if (folder / "config.json").is_file():
            try:
                check_gguf(folder, bench.gguf_type)
            except ConfigError as error:
                do = f"{error.do}; or bench with Transformers: bench.engine=transformers"
                raise ConfigError(error.wrong, found=error.found, do=do) from None
    check_port(bench.port)
    return found


def environment(recipe: Recipe) -> dict[str, Any]:
    """Return llama.cpp's version, its device, and the slots of its server, on which memory depends."""
    slots, tokens = slots_of(recipe.bench)
    return {"llama.cpp": version(), "device": device(), "slots": slots, "slot_tokens": tokens}


def slots_of(bench: Bench) -> tuple[int, int]:
    """Return the number of slots of a benchmark's server, and the tokens of each: of the longest request, in CELLS."""
    longest = bench.shared_prefix_tokens + bench.input_tokens + bench.output_tokens
    return max(bench.concurrency), math.ceil(longest / CELLS) * CELLS


def device() -> str:
    """Return cpu, or accelerator if the server sees one. The package's build has none."""
    if not (server := shutil.which("llama-server")):
        return "cpu"
    said = subprocess.run([server, "--list-devices"], capture_output=True, text=True, check=False).stdout
    return "accelerator" if re.search(r"^\s+\w+: ", said, re.MULTILINE) else "cpu"


def version() -> str:
    """Return the version of llama.cpp; raise ConfigError without it."""
    if server := shutil.which("llama-server"):
        said = subprocess.run([server, "--version"], capture_output=True, text=True, check=False)
        match = re.search(r"version: (\S+)", said.stdout + said.stderr)
        return f"llama-server {match[1] if match else 'of unknown version'}"
    with suppress(importlib.metadata.PackageNotFoundError):
        return f"xllamacpp {importlib.metadata.version('xllamacpp')}"
    raise ConfigError(
        "llama.cpp is not installed",
        found="no llama-server on the PATH, and no package xllamacpp",
        do="pip install xllamacpp, or install llama.cpp",
    )


def serving_flags(plan: PlanFile, given: tuple[str, ...]) -> tuple[str, ...]:
    """Return the flags with which the plan saves memory, without those `given`."""
    return _flags(plan.window, given)


def _flags(window: int | None, given: Sequence[str]) -> tuple[str, ...]:
    """Return the physical batch: a sliding layer holds window and batch in CELLS, and the batch fills the last ones.

    Batches of fewer than LEAST_BATCH tokens would read prompts slowly.
    """
    if not window or {UBATCH, UBATCH_SHORT} & names_of(given):
        return ()
    return UBATCH, str(math.ceil((window + LEAST_BATCH) / CELLS) * CELLS - window)


def names_of(given: Sequence[str]) -> set[str]:
    """Return the flags among some arguments."""
    return {argument.partition("=")[0] for argument in given if argument.startswith("-")}


def kv_bytes(plan: PlanFile, context_tokens: int, slots: int, ubatch_tokens: int) -> int:
    """Return the bytes of the KV cache that llama.cpp allocates in float16, as an export holds the plan.

    A layer without attention is a sliding layer there. Source: `llama_kv_cache_iswa` in llama.cpp.
    """
    full = math.ceil(context_tokens / CELLS) * CELLS
    window = plan.window or 0
    sliding = min(full, math.ceil((window + ubatch_tokens) / CELLS) * CELLS)
    kept = sum(not entry.attention_changed for entry in plan.layers)
    cells = kept * full + (len(plan.layers) - kept) * sliding
    return 2 * 2 * plan.model.kv_heads * plan.model.head_dim * cells * slots


def serve_command(model: Path, port: int, given: tuple[str, ...]) -> Command:
    """Return the command that serves a GGUF file until interrupted; of a directory, its export in float16."""
    version()
    file = model
    if model.is_dir():
        file = model.resolve().with_name(f"{model.resolve().name}-f16.gguf")
        gguf_file(model, file, "f16")
    window = window_in(file)
    flags = _flags(window, given)
    if window and SWA_FULL in names_of(given):
        log.warning("%s: %s", SWA_FULL, WHOLE_CONTEXT)
    if window and not {"--parallel", "-np"} & names_of(given):
        # By default llama-server has four slots, for which a sliding layer holds four windows.
        flags += ("--parallel", "1")
    if "--port" not in names_of(given):
        check_port(port, host="")
        flags += ("--port", str(port))
    return [*_server(), "--model", str(file.absolute()), *flags, *given], {}


@dataclass(frozen=True)
class Answered:
    """One answer: the time of each token in seconds since the request; prompt tokens from the cache, and read, both 0
    from older servers, which do not tell."""

    times: list[float]
    cached_tokens: int
    read_tokens: int


@dataclass(frozen=True)
class RunningLlama:
    """A server that is ready; `vocabulary`: of the random prompts."""

    server: Server
    vocabulary: int

    def answer(self, load: Load, advance: Callable[[float], None]) -> Answer:
        """Send one load by as many threads as requests are concurrent; raise LayerboostError if a request fails."""
        asked = load.prompts(self.vocabulary).tolist()
        answered: list[Answered] = []
        free: SimpleQueue[int] = SimpleQueue()
        for slot in range(load.concurrency):
            free.put(slot)
        memory = 0
        senders = ThreadPoolExecutor(load.concurrency)
        try:
            if shared := load.shared_prefix_tokens > 0:
                self._request(asked[0][: load.shared_prefix_tokens], 1, slot=0, cached=False)
                self._prefix(0, "save")
            started = time.monotonic()
            sent = [senders.submit(self._answer_one, ids, load.output_tokens, free, shared) for ids in asked]
            for each in as_completed(sent):
                answered.append(each.result())
                memory = max(memory, self.server.rss_bytes())
                advance(load.output_tokens)
        except (*REQUEST_ERRORS, ValueError) as error:
            self.server.check_alive(patience_s=5.0)
            raise LayerboostError(
                f"a request to llama.cpp failed on {self.server.name}",
                found=f"{error}; {last_words(self.server.log_file)}",
                do=f"read {self.server.log_file}",
            ) from error
        finally:  # without waiting: requests in progress end with the server
            senders.shutdown(wait=False, cancel_futures=True)
        raw = latencies([each.times for each in answered], time.monotonic() - started)
        metrics = {"peak_rss_gib": round(memory / GIB, 3)}
        if held := kv_gib(self.server.log_file):
            metrics["kv_used_gib"] = held
        cached = sum(each.cached_tokens for each in answered)
        if shared and (prompts := cached + sum(each.read_tokens for each in answered)):
            metrics["prefix_hit_share"] = cached / prompts
        return Answer(raw, metrics)

    def _answer_one(self, ids: list[int], output_tokens: int, free: SimpleQueue[int], shared: bool) -> Answered:
        """Return the answer to one request in a free slot, which gets the shared prefix if there is one."""
        slot = free.get()
        try:
            if shared:
                self._prefix(slot, "restore")
            return self._request(ids, output_tokens, slot, cached=shared)
        finally:
            free.put(slot)

    def _prefix(self, slot: int, action: Literal["save", "restore"]) -> None:
        """Save a slot's cache to a file, or restore it."""
        url = f"{self.server.url}/slots/{slot}?action={action}"
        DIRECT.open(urllib.request.Request(url, b'{"filename": "prefix"}')).close()

    def _request(self, ids: list[int], output_tokens: int, slot: int, cached: bool) -> Answered:
        """Return one greedy answer; `cached`: read only what the slot does not hold."""
        asked = {"prompt": ids, "n_predict": output_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
        body = json.dumps(asked | {"id_slot": slot, "cache_prompt": cached}).encode()
        request = urllib.request.Request(f"{self.server.url}/completion", body)
        started = time.monotonic()
        times: list[float] = []
        cached_tokens = read_tokens = 0
        with DIRECT.open(request) as answer:
            for line in answer:
                if line.startswith(b"data: "):
                    event = json.loads(line.removeprefix(b"data: "))
                    # A token that ends within a character is sent with the next one.
                    times += [time.monotonic() - started] * (event.get("tokens_predicted", 0) - len(times))
                    timings = event.get("timings", {})
                    if "cache_n" in timings:
                        cached_tokens, read_tokens = timings["cache_n"], timings["prompt_n"]
        if len(times) != output_tokens:
            raise ValueError(f"{len(times)} of {output_tokens} tokens")
        return Answered(times, cached_tokens, read_tokens)


@contextmanager
def launch(name: str, folder: Path, recipe: Recipe, log_file: Path) -> Iterator[RunningLlama]:
    """Yield a warmed-up server of a model directory, exported to RUN/bench/gguf unless it is there already."""
    bench = recipe.bench
    file = log_file.parents[1] / "gguf" / f"{name}-{bench.gguf_type}.gguf"
    gguf_file(folder, file, bench.gguf_type)
    slots, tokens = slots_of(bench)
    with tempfile.TemporaryDirectory(prefix="layerboost-bench-") as scratch:
        argv = [
            *(*_server(), "--model", str(file.absolute()), "--host", HOST, "--port", str(bench.port)),
            *("--parallel", str(slots), "--ctx-size", str(slots * tokens), "--slot-save-path", scratch),
            # Verbose enough to log the KV cache; no copies of the cache in memory for other requests.
            *("--threads", str(len(cores())), "--verbosity", "4", "--cache-ram", "0", *bench.server_args),
        ]
        with running_server("llama.cpp", name, folder, (argv, {}), bench, log_file) as server:
            running = RunningLlama(server, int(read_config(folder, name).vocab_size))
            warm = min(WARMUP_OUTPUT_TOKENS, bench.output_tokens)
            running.answer(Load(1, 1, 0, min(WARMUP_INPUT_TOKENS, bench.input_tokens), warm, seed=0), lambda _: None)
            yield running


def kv_gib(log_file: Path) -> float:
    """Return the size of all KV caches as llama.cpp logged it; 0 if it did not."""
    logged = re.findall(r"llama_kv_cache: size = +([\d.]+) MiB", log_file.read_text(encoding="utf-8", errors="replace"))
    return round(sum(map(float, logged)) / 1024, 6)


def _server() -> Sequence[str]:
    """Return the command of llama.cpp's server."""
    server = shutil.which("llama-server")
    return (server,) if server else (*MODULE, "layerboost.engines.xllamacpp_server")
