"""`bench/comparison.json`, `bench/decode_sweep.json`: measurements of each model, and ratios by repeat."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from pydantic import Field, computed_field, model_validator

from layerboost.schemas.artifact import Artifact, Part

# Concurrent requests, and in a decode sweep the tokens per answer.
Point = tuple[int, int | None]
SPEED = "output_tokens_per_s"
# Our name of a metric -> vLLM's. Units are in the names.
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


class Measurement(Part):
    """One run of the load generator.

    `metrics` holds the keys of FROM_VLLM, `peak_rss_gib` and, with a GPU, `gpu_memory_gib`. With vLLM also
    `kv_usage_peak` (a fraction, sampled), `kv_used_gib`, `preemptions`, `prefix_hit_share` of the prompts' tokens if a
    prefix is shared, `kv_cache_tokens` and `kv_max_concurrency`. `own_cores`, `other_cores`: cores in use on average,
    by the benchmark with its servers and by everything else, of those that the benchmark may use.
    """

    model: str
    concurrency: int
    output_tokens: int | None = Field(None, description="length of the answers, in a decode sweep")
    repeat: int
    file: str = Field(description="vLLM's own result, in the directory of comparison.json")
    seed: int
    metrics: dict[str, float]
    kv_context_tokens: int | None = Field(None, description="context length that kv_max_concurrency counts with")

    @property
    def point(self) -> Point:
        return self.concurrency, self.output_tokens

    @property
    def key(self) -> tuple[str, Point, int]:
        return self.model, self.point, self.repeat


class Spread(Part):
    """Median, minimum and maximum over the repeats; one repeat has no range."""

    median: float
    min: float
    max: float
    repeats: int

    def text(self, write: Callable[[float], str]) -> str:
        """Return the median with its range, formatted by `write`: 412 (405 to 420); for one repeat the median alone."""
        if self.repeats < 2:
            return write(self.median)
        return f"{write(self.median)} ({write(self.min)} to {write(self.max)})"

    @property
    def as_ratio(self) -> str:
        """Return the ratio as text: 1.42 (1.38 to 1.47 over 3 repeats)."""
        over = f" over {self.repeats} repeats)" if self.repeats > 1 else " (one repeat)"
        return self.text("{:.2f}".format).removesuffix(")") + over


class AtConcurrency(Part):
    """Every model at one concurrency, in a decode sweep at one length too.

    `ratios` are to the reference model, each repeat against the same repeat. `disturbed`: by model, what other than the
    model affected its numbers; undisturbed models are left out.
    """

    concurrency: int
    output_tokens: int | None = None
    models: dict[str, dict[str, Spread]]
    ratios: dict[str, dict[str, Spread]]
    disturbed: dict[str, str] = Field({})

    def warning(self, *models: str) -> str:
        """Return what disturbed any of these models, as a suffix for a number; empty if nothing did."""
        reasons = [f"{model}: {self.disturbed[model]}" for model in models if model in self.disturbed]
        return f"; disturbed ({'; '.join(reasons)})" if reasons else ""


class Comparison(Artifact):
    """Both files: rewritten after each measurement, `complete` after the recipe's last one.

    `comparison.json` has a result per concurrency; `decode_sweep.json` has one per length, `output_tokens`, and
    the concurrency is always `bench.decode_batch`. `results` are computed from the measurements, again when
    a file is read.
    """

    schema_version: int = 2
    settings: dict[str, Any]
    environment: dict[str, Any] = Field(description="the engine's version, cpu or accelerator, cores")
    models: dict[str, str] = Field(description="hash of each model's config.json")
    reference: str = Field(description="the denominator of the ratios")
    complete: bool = False
    measurements: list[Measurement] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _without_results(cls, values: Any) -> Any:
        """Drop the results: they are computed from the measurements."""
        return {key: value for key, value in values.items() if key != "results"} if isinstance(values, dict) else values

    @computed_field  # type: ignore[prop-decorator]
    @property
    def results(self) -> list[AtConcurrency]:
        """Return spreads of every metric and ratios to the reference, by increasing concurrency and length."""
        return compare(self.measurements, self.reference, self.environment)


def metrics_of(measured: dict[str, Any]) -> dict[str, float]:
    """Return the finite metrics to compare from a result with vLLM's keys."""
    values = {ours: float(measured[theirs]) for ours, theirs in FROM_VLLM.items()}
    return {name: value for name, value in values.items() if math.isfinite(value)}


def compare(measurements: Sequence[Measurement], reference: str, environment: Mapping[str, Any]) -> list[AtConcurrency]:
    """Return one result per point: spreads per model, and ratios to the reference."""
    results = []
    for point in sorted({entry.point for entry in measurements}, key=lambda point: (point[0], point[1] or 0)):
        repeats: dict[str, dict[int, dict[str, float]]] = {}
        for entry in measurements:
            if entry.point == point:
                repeats.setdefault(entry.model, {})[entry.repeat] = entry.metrics
        base = repeats.get(reference, {})
        disturbed = {model: disturbance(list(own.values()), environment) for model, own in repeats.items()}
        results.append(
            AtConcurrency(
                concurrency=point[0],
                output_tokens=point[1],
                models={model: _spreads(list(own.values())) for model, own in repeats.items()},
                ratios={
                    model: _spreads([_ratio(own[repeat], base[repeat]) for repeat in sorted(own.keys() & base.keys())])
                    for model, own in repeats.items()
                    if model != reference and own.keys() & base.keys()
                },
                disturbed={model: why for model, why in disturbed.items() if why},
            )
        )
    return results


# Beyond these a measurement counts as disturbed; docs/reference/bench.md has the rule.
OTHERS, BUSY, APART = 0.05, 0.9, 0.15


def disturbance(repeats: Sequence[Mapping[str, float]], environment: Mapping[str, Any]) -> str:
    """Return what other than the model affected the repeats of one model; empty if nothing did.

    A server on a CPU needs every core. One on a GPU needs those that it uses, and lacks them only if all are busy.
    """
    reasons, cores = [], environment.get("cores", 0)
    on_cpu = environment.get("device") == "cpu"
    taken = [
        metrics["other_cores"]
        for metrics in repeats
        if metrics.get("other_cores", 0) > OTHERS * cores
        and (on_cpu or metrics["other_cores"] + metrics["own_cores"] > BUSY * cores)
    ]
    if taken:
        reasons.append(f"other processes used up to {max(taken):.1f} of {cores} cores")
    own = [metrics["own_cores"] for metrics in repeats if metrics.get("own_cores")]
    if on_cpu and not taken and own and max(own) > (1 + APART) * min(own):
        # Where a quota hides the others, this shows that the server got less than before.
        reasons.append(f"got {min(own):.1f} to {max(own):.1f} of {cores} cores")
    speeds = [metrics[SPEED] for metrics in repeats if metrics.get(SPEED)]
    if speeds and max(speeds) > (1 + APART) * min(speeds):
        reasons.append(f"repeats {max(speeds) / min(speeds) - 1:.0%} apart")
    return ", ".join(reasons)


def _ratio(own: dict[str, float], base: dict[str, float]) -> dict[str, float]:
    return {name: own[name] / base[name] for name in own if base.get(name)}


def _spreads(repeats: list[dict[str, float]]) -> dict[str, Spread]:
    names = [name for name in repeats[0] if all(name in values for values in repeats)]
    columns = {name: [values[name] for values in repeats] for name in names}
    return {
        name: Spread(median=median(column), min=min(column), max=max(column), repeats=len(column))
        for name, column in columns.items()
    }
