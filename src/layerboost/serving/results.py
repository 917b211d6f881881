"""`bench/comparison.json`, `bench/decode_sweep.json`: what was measured of each model, and ratios by round."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from layerboost.artifacts import Artifact

# Requests in flight, and in a decode sweep the length of their answers.
Point = tuple[int, int | None]
# Our name of a number -> vLLM's. Units are in the names.
FROM_VLLM = {
    "output_tokens_per_s": "output_throughput",
    "requests_per_s": "request_throughput",
    "ttft_ms_median": "median_ttft_ms",
    "ttft_ms_p99": "p99_ttft_ms",
    "tpot_ms_median": "median_tpot_ms",
    "tpot_ms_p99": "p99_tpot_ms",
    "itl_ms_median": "median_itl_ms",
    "itl_ms_p99": "p99_itl_ms",
    "latency_ms_median": "median_e2el_ms",
    "latency_ms_p99": "p99_e2el_ms",
}


class Measurement(BaseModel):
    """One run of the load generator.

    `metrics` holds the keys of FROM_VLLM, `peak_rss_gib` and, where there is a GPU, `gpu_memory_gib`. Of vLLM also
    `kv_usage_peak` (a share, sampled), `kv_used_gib`, `preemptions`, `prefix_hit_share` of the prompts' tokens where a
    prefix is shared, `kv_cache_tokens` and `kv_max_concurrency`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str
    concurrency: int
    output_tokens: int | None = Field(None, description="length of the answers, in a decode sweep")
    repeat: int
    file: str = Field(description="vLLM's own result, beside comparison.json")
    seed: int
    metrics: dict[str, float]
    kv_context_tokens: int | None = Field(None, description="context length that kv_max_concurrency counts with")

    @property
    def point(self) -> Point:
        return self.concurrency, self.output_tokens

    @property
    def key(self) -> tuple[str, Point, int]:
        return self.model, self.point, self.repeat


class Spread(BaseModel):
    """Mean, least and greatest over the repeats."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mean: float
    min: float
    max: float


class AtConcurrency(BaseModel):
    """Every model at one concurrency, in a decode sweep at one length too.

    `ratios` are to the reference model, each repeat against the same repeat.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    concurrency: int
    output_tokens: int | None = None
    models: dict[str, dict[str, Spread]]
    ratios: dict[str, dict[str, Spread]]


class Comparison(Artifact):
    """Both files: rewritten after each measurement, `complete` once the recipe's last one is in.

    In `comparison.json` a result is of a concurrency; in `decode_sweep.json` it is of a length, `output_tokens`, and
    the concurrency is always `bench.decode_batch`.
    """

    settings: dict[str, Any]
    environment: dict[str, Any] = Field(description="the engine's version, cpu or accelerator, cores")
    models: dict[str, str] = Field(description="hash of each model's config.json")
    reference: str = Field(description="the model that ratios are to")
    complete: bool = False
    measurements: list[Measurement] = Field(default_factory=list)
    results: list[AtConcurrency] = Field(default_factory=list)


def metrics_of(measured: dict[str, Any]) -> dict[str, float]:
    """The finite numbers we compare, out of vLLM's JSON or of `generation.py`'s, which has the same keys."""
    values = {ours: float(measured[theirs]) for ours, theirs in FROM_VLLM.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def compare(measurements: Sequence[Measurement], reference: str) -> list[AtConcurrency]:
    """Spreads of every metric and ratios to the reference, per concurrency and length in rising order."""
    results = []
    for point in sorted({entry.point for entry in measurements}, key=lambda point: (point[0], point[1] or 0)):
        rounds: dict[str, dict[int, dict[str, float]]] = {}
        for entry in measurements:
            if entry.point == point:
                rounds.setdefault(entry.model, {})[entry.repeat] = entry.metrics
        base = rounds.get(reference, {})
        results.append(
            AtConcurrency(
                concurrency=point[0],
                output_tokens=point[1],
                models={model: _spreads(list(own.values())) for model, own in rounds.items()},
                ratios={
                    model: _spreads([_ratio(own[repeat], base[repeat]) for repeat in sorted(own.keys() & base.keys())])
                    for model, own in rounds.items()
                    if model != reference and own.keys() & base.keys()
                },
            )
        )
    return results


def _ratio(own: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    return {name: own[name] / base[name] for name in own if base.get(name)}


def _spreads(rounds: list[dict[str, float]]) -> dict[str, Spread]:
    names = [name for name in rounds[0] if all(name in values for values in rounds)]
    columns = {name: [values[name] for values in rounds] for name in names}
    return {name: Spread(mean=fmean(column), min=min(column), max=max(column)) for name, column in columns.items()}
