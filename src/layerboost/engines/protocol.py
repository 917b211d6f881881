"""What the benchmark and the command line ask of an engine, and what they hand to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from layerboost.recipe import Bench, Recipe
from layerboost.schemas.plan import PlanFile

WARMUP_OUTPUT_TOKENS = 8


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


@dataclass(frozen=True)
class Answer:
    """What one load gave.

    `raw`: throughput and latency under the names of `vllm bench serve`, and whatever else the engine reports.
    `metrics`: memory and counters of the same time, keys of `Measurement.metrics`. `context_tokens`: the context length
    that `kv_max_concurrency` among them counts with.
    """

    raw: dict[str, Any]
    metrics: dict[str, float]
    context_tokens: int | None = None


class Running(Protocol):
    """A model that an engine has started, warmed up where that has to happen once, and ready for loads."""

    def answer(self, load: Load, advance: Callable[[float], None]) -> Answer:
        """Answer one load; call `advance` with the number of further output tokens as they come.

        Raise LayerboostError when the engine or any request fails.
        """


class Engine(Protocol):
    """One way to run a model. A module with these functions is one."""

    @property
    def UNUSED(self) -> frozenset[str]:
        """Keys of the recipe's section `bench` that mean nothing to it."""

    def check(self, bench: Bench, folders: Iterable[Path]) -> str:
        """Return the engine's version, or say that none is needed.

        Raise ConfigError for what would fail once the models in `folders` are ready: a missing engine, a taken port.
        """

    def environment(self, recipe: Recipe) -> dict[str, Any]:
        """Return what results depend on beside models and settings: the version, `device`: cpu or another."""

    def serving_flags(self, plan: PlanFile, given: tuple[str, ...]) -> tuple[str, ...]:
        """Return the arguments of the engine's command, each followed by its value, that make the plan's memory real on
        this machine; without those that are among the arguments `given`."""

    def launch(self, name: str, folder: Path, recipe: Recipe, log_file: Path) -> AbstractContextManager[Running]:
        """Start a model directory, wait until it is ready, and end it with the block, however that ends.

        `name` is for messages. What the engine prints goes to `log_file`.
        """
