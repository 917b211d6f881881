"""The interface of an engine, for the benchmark and the command line; loads and what is made of their times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from layerboost.recipe import Bench, EngineName, Recipe
from layerboost.schemas.plan import PlanFile

WARMUP_OUTPUT_TOKENS = 8
FIRST_TOKEN = 3  # special tokens usually have the first ids
# The arguments of a command, and the variables to add to its environment.
Command = tuple[list[str], dict[str, str]]


@dataclass(frozen=True)
class Load:
    """Requests to a model: `requests` random prompts, at most `concurrency` at a time."""

    concurrency: int
    requests: int
    shared_prefix_tokens: int
    input_tokens: int
    output_tokens: int
    seed: int

    @property
    def tokens(self) -> int:
        """Return the output tokens of all requests."""
        return self.requests * self.output_tokens

    def prompts(self, vocabulary: int) -> torch.Tensor:
        """Return random prompts `[requests, shared prefix + input]`, the same for every model with this vocabulary."""
        draw = torch.Generator().manual_seed(self.seed)
        prefix = torch.randint(FIRST_TOKEN, vocabulary, (1, self.shared_prefix_tokens), generator=draw)
        own = torch.randint(FIRST_TOKEN, vocabulary, (self.requests, self.input_tokens), generator=draw)
        return torch.cat([prefix.expand(self.requests, -1), own], 1)


@dataclass(frozen=True)
class Answer:
    """The result of one load.

    `raw`: throughput and latency under the names of `vllm bench serve`, and what else the engine reports. `metrics`:
    memory and counters during the load, keys of `Measurement.metrics`. `context_tokens`: the context length to which
    `kv_max_concurrency` refers.
    """

    raw: dict[str, Any]
    metrics: dict[str, float]
    context_tokens: int | None = None


def latencies(answered: Sequence[Sequence[float]], duration_s: float) -> dict[str, float]:
    """Return throughput and latency under the names of `vllm bench serve`, for engines without a load generator.

    `answered`: for each request, the time of each of its tokens in seconds since it was sent; `duration_s`: of all.
    """
    tokens = sum(len(times) for times in answered)

    def spread(name: str, values: Sequence[float]) -> dict[str, float]:
        ms = np.array(values or [0.0]) * 1e3
        return {f"median_{name}_ms": float(np.median(ms)), f"p99_{name}_ms": float(np.percentile(ms, 99))}

    return {
        "completed": len(answered),
        "duration": float(duration_s),
        "total_output_tokens": tokens,
        "request_throughput": float(len(answered) / duration_s),
        "output_throughput": float(tokens / duration_s),
        **spread("ttft", [times[0] for times in answered]),
        **spread("tpot", [(times[-1] - times[0]) / max(len(times) - 1, 1) for times in answered]),
        **spread("e2el", [times[-1] for times in answered]),
        **spread("itl", [float(gap) for times in answered for gap in np.diff(times)]),
    }


class Running(Protocol):
    """A model that an engine has started and, if it needs that, warmed up."""

    def answer(self, load: Load, advance: Callable[[float], None]) -> Answer:
        """Answer one load; call `advance` with the number of output tokens since the last call.

        Raise LayerboostError if the engine or any request fails.
        """


class Engine(Protocol):
    """One way to run a model: a module with these functions."""

    @property
    def NAME(self) -> EngineName:
        """Return the engine's name in the recipe."""

    @property
    def UNUSED(self) -> frozenset[str]:
        """Return the keys of the recipe's section `bench` that the engine does not use."""

    def check(self, bench: Bench, folders: Iterable[Path]) -> str:
        """Return the engine's version, or that none is needed.

        Raise ConfigError for what would fail later, when the models in `folders` exist: a missing engine, a taken port.
        """

    def environment(self, recipe: Recipe) -> dict[str, Any]:
        """Return what results depend on, apart from models and settings: the version, and `device`, cpu or another."""

    def serving_flags(self, plan: PlanFile, given: tuple[str, ...]) -> tuple[str, ...]:
        """Return the arguments of the engine's command, each followed by its value, with which the plan saves memory on
        this machine; without those that are among the arguments `given`."""

    def serve_command(self, model: Path, port: int, given: tuple[str, ...]) -> Command:
        """Return the command that serves a model until interrupted, with the arguments `given`; raise ConfigError."""

    def launch(self, name: str, folder: Path, recipe: Recipe, log_file: Path) -> AbstractContextManager[Running]:
        """Start a model directory, wait until it is ready, and stop it at the end of the block.

        `name` is for messages. The engine's output goes to `log_file`.
        """
