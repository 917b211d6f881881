"""vLLM as an engine: `vllm serve`, with layerboost's plugin (vllm_plugin/) inside it."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from layerboost.artifacts import PLAN, PlanFile, read_plan
from layerboost.engines.protocol import Command, Running
from layerboost.engines.server import check_port
from layerboost.engines.vllm_command import (
    check_vllm,
    flags_given,
    reserved_flag,
    runs_on_cpu,
    serve_line,
    unless_given,
)
from layerboost.engines.vllm_server import launched
from layerboost.errors import ConfigError
from layerboost.model.integrity import ARCHITECTURE, check_checkpoint
from layerboost.model.memory import CPU_DEFAULTS, GPU_DEFAULTS, CacheSettings, plan_serving
from layerboost.recipe import Bench, Recipe
from layerboost.runtime import log

UNUSED: frozenset[str] = frozenset()


def check(bench: Bench, folders: Iterable[Path]) -> str:
    """Return the version of the vLLM that can be benchmarked here on models in `folders`."""
    version = check_vllm()
    for folder in folders:
        check_path(folder)
    if flag := reserved_flag(bench.server_args):
        raise ConfigError(
            f"bench.server_args may not have {flag}",
            found="the benchmark itself says how its server is reached, and reads the numbers there",
            do="leave it out; the port is bench.port",
        )
    check_port(bench.port)
    return version


def environment(recipe: Recipe) -> dict[str, Any]:
    """Return vLLM's version and what it runs on."""
    return {"vllm": check_vllm(), "device": "cpu" if runs_on_cpu() else "accelerator"}


def cache_defaults() -> CacheSettings:
    """Return what vLLM starts with here, as far as its KV cache is concerned."""
    return CPU_DEFAULTS if runs_on_cpu() else GPU_DEFAULTS


def serving_flags(plan: PlanFile, given: tuple[str, ...]) -> tuple[str, ...]:
    """Return the flags that the plan needs from vLLM here; none for a plan that names no context length."""
    found = plan_serving(plan, cache_defaults())
    return unless_given(given, dict(zip(found.flags[::2], found.flags[1::2], strict=True))) if found else ()


def serve_command(folder: Path, port: int, given: tuple[str, ...]) -> Command:
    """Return the command that serves a model directory, stock or boosted, until interrupted."""
    check_vllm()
    config = check_checkpoint(folder)
    check_path(folder)
    if ARCHITECTURE in str(config.get("architectures")):
        log.info("%s is a boosted checkpoint: layerboost's vLLM plugin loads it", folder)
    check_port(flags_given(given).get("port", port), host="")
    flags = serving_flags(read_plan(folder / PLAN), given) if (folder / PLAN).is_file() else ()
    return serve_line(folder, (*flags, *given), {"--port": str(port)})


def launch(name: str, folder: Path, recipe: Recipe, log_file: Path) -> AbstractContextManager[Running]:
    """Start a server of a model directory and warm it up; its log begins with the command."""
    return launched(name, folder, recipe.bench, log_file)


def check_path(folder: Path) -> None:
    """Raise ConfigError for a path that vLLM takes for a pattern."""
    if set(str(folder.absolute())) & set("*?["):
        raise ConfigError(
            f"vLLM cannot read a model from {folder}",
            found="it takes * ? and [ in a path for a pattern",
            do="rename the directory, or give a symbolic link to it",
        )
