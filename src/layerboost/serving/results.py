"""`bench/comparison.json`: what was measured of each model, and boosted against base, paired by round."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from layerboost.artifacts import Artifact

# Our name of a number -> vLLM's. Units are in the names.
FROM_VLLM = {
    "output_tokens_per_s": "output_throughput",
    "requests_per_s": "request_throughput",
    "ttft_ms_median": "median_ttft_ms",
    "ttft_ms_p99": "p99_ttft_ms",
    "tpot_ms_median": "median_tpot_ms",
    "tpot_ms_p99": "p99_tpot_ms",
}


class Measurement(BaseModel):
    """One run of the load generator. `metrics` holds the keys of FROM_VLLM, `peak_rss_gib` and the KV cache's size."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    model: str
    concurrency: int
    repeat: int
    file: str = Field(description="vLLM's own result, beside comparison.json")
    seed: int
    metrics: dict[str, float]
    kv_context_tokens: int | None = Field(None, description="context length that kv_max_concurrency counts with")

    @property
    def key(self) -> tuple[str, int, int]:
        return self.model, self.concurrency, self.repeat


class Spread(BaseModel):
    """Mean, least and greatest over the repeats."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    mean: float
    min: float
    max: float


class AtConcurrency(BaseModel):
    """Every model at one concurrency; `ratios` are to the reference model, each repeat against the same repeat."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    concurrency: int
    models: dict[str, dict[str, Spread]]
    ratios: dict[str, dict[str, Spread]]


class Comparison(Artifact):
    """`bench/comparison.json`: rewritten after each measurement, `complete` once the recipe's last one is in."""

    settings: dict[str, Any]
    environment: dict[str, Any] = Field(description="vLLM's version, cpu or accelerator, cores")
    models: dict[str, str] = Field(description="hash of each model's config.json")
    reference: str = Field(description="the model that ratios are to")
    complete: bool = False
    measurements: list[Measurement] = Field(default_factory=list)
    results: list[AtConcurrency] = Field(default_factory=list)


def metrics_of(measured: dict[str, Any]) -> dict[str, float]:
    """The numbers we compare, out of vLLM's JSON."""
    return {ours: float(measured[theirs]) for ours, theirs in FROM_VLLM.items()}


def compare(measurements: Sequence[Measurement], reference: str) -> list[AtConcurrency]:
    """Spreads of every metric and ratios to the reference, per concurrency in rising order."""
    results = []
    for concurrency in sorted({entry.concurrency for entry in measurements}):
        rounds: dict[str, dict[int, dict[str, float]]] = {}
        for entry in measurements:
            if entry.concurrency == concurrency:
                rounds.setdefault(entry.model, {})[entry.repeat] = entry.metrics
        base = rounds.get(reference, {})
        results.append(
            AtConcurrency(
                concurrency=concurrency,
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
