"""`layerboost bench`: base and boosted models under a real vLLM server, in interleaved rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerboost.artifacts import file_hash, fingerprint, read_json, write_json
from layerboost.errors import ConfigError
from layerboost.model.integrity import check_checkpoint
from layerboost.recipe import Recipe
from layerboost.runtime import Progress, log
from layerboost.serving.benchmark import run_benchmark, warm_up
from layerboost.serving.results import Comparison, Measurement, compare, metrics_of
from layerboost.serving.server import (
    GIB,
    Server,
    check_port,
    check_vllm,
    cores,
    running_server,
    runs_on_cpu,
)

FOLDER = "bench"
BASE = "base"
# What may differ between two calls without changing what one measurement means.
FREE_SETTINGS = {"port", "startup_timeout_s", "repeats", "concurrency"}


def validate_bench(recipe: Recipe, run: Path, models: dict[str, Path]) -> None:
    """Find out in a moment what would otherwise fail after minutes; raises ConfigError.

    Checks that vLLM is there, the port free, every model directory whole, its context long enough, and that results in
    the run folder are of the same settings and models.
    """
    check_vllm()
    if not models:
        raise ConfigError("nothing to benchmark", do="give at least one model directory")
    wanted = recipe.bench.input_tokens + recipe.bench.output_tokens
    for name, folder in models.items():
        context = check_checkpoint(folder).get("max_position_embeddings")
        if isinstance(context, int) and wanted > context:
            raise ConfigError(
                f"bench.input_tokens + bench.output_tokens is {wanted}",
                found=f"{name} has a context of {context} tokens",
                do="lower one of them",
            )
    check_port(recipe.bench.port)
    _opened(recipe, run, models)


def run_bench(recipe: Recipe, run: Path, models: dict[str, Path]) -> dict[str, Any]:
    """Measure every model (name -> directory) at every concurrency and write `RUN/bench/`; returns the comparison.

    In each round every model gets a fresh server, warmed up. vLLM's JSON goes to
    `{model}-c{concurrency}-r{repeat}.json`, ours to `comparison.json`. A run that was killed goes on where it stopped.
    Raises ConfigError as `validate_bench` does, LayerboostError when a server or a request fails.
    """
    validate_bench(recipe, run, models)
    comparison = _opened(recipe, run, models)
    bench, file = recipe.bench, run / FOLDER / "comparison.json"
    done = {entry.key for entry in comparison.measurements}
    planned = [
        (repeat, name, [size for size in dict.fromkeys(bench.concurrency) if (name, size, repeat) not in done])
        for repeat in range(bench.repeats)
        for name in models
    ]
    missing = sum(len(sizes) for _, _, sizes in planned)
    log.info("bench: %d measurements to make, %d are there", missing, len(done))
    comparison.complete = missing == 0
    with Progress("bench", max(missing, 1), "runs") as progress:
        for repeat, name, sizes in planned:
            if not sizes:
                continue
            log_file = run / FOLDER / "logs" / f"{name}-r{repeat}.log"
            with running_server(name, models[name], bench, log_file) as server:
                warm_up(server, bench)
                for size in sizes:
                    comparison.measurements.append(_measure(recipe, run, server, size, repeat))
                    missing -= 1
                    comparison.complete = missing == 0
                    comparison.results = compare(comparison.measurements, comparison.reference)
                    write_json(file, comparison)
                    progress.advance(1)
    write_json(file, comparison)
    _log_ratios(comparison)
    return comparison.model_dump(mode="json")


def _measure(recipe: Recipe, run: Path, server: Server, concurrency: int, repeat: int) -> Measurement:
    bench, name = recipe.bench, server.name
    # The same prompts for every model of a round, others at another concurrency.
    seed = recipe.seed + concurrency
    stem = f"{name}-c{concurrency}-r{repeat}"
    log.info("measuring %s at concurrency %d, round %d of %d", name, concurrency, repeat + 1, bench.repeats)
    server.peak_rss_bytes = 0
    measured = run_benchmark(server, bench, concurrency, seed, run / FOLDER / "logs" / f"{stem}.log")
    metrics = {**metrics_of(measured), "peak_rss_gib": round(server.peak_rss_bytes / GIB, 3)}
    cache = server.kv_cache()
    if cache is not None:
        metrics |= {"kv_cache_tokens": cache.tokens, "kv_max_concurrency": cache.max_concurrency}
    write_json(run / FOLDER / f"{stem}.json", measured)
    return Measurement(
        model=name,
        concurrency=concurrency,
        repeat=repeat,
        file=f"{stem}.json",
        seed=seed,
        metrics=metrics,
        kv_context_tokens=cache.context_tokens if cache else None,
    )


def _opened(recipe: Recipe, run: Path, models: dict[str, Path]) -> Comparison:
    """The comparison so far, or an empty one; raises ConfigError when it is of something else."""
    new = Comparison(
        settings={**recipe.bench.model_dump(mode="json"), "seed": recipe.seed},
        environment={"vllm": check_vllm(), "device": "cpu" if runs_on_cpu() else "accelerator", "cores": len(cores())},
        models={name: file_hash(folder / "config.json") for name, folder in models.items()},
        reference=BASE if BASE in models else next(iter(models)),
    )
    file = run / FOLDER / "comparison.json"
    if not file.exists():
        return new
    old = read_json(file, Comparison, "layerboost bench")
    if fingerprint(_identity(old)) != fingerprint(_identity(new)):
        before, now = _identity(old), _identity(new)
        changed = [
            f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
            for key in dict.fromkeys([*before, *now])
            if before.get(key) != now.get(key)
        ]
        raise ConfigError(
            f"{file} holds results of other settings or models",
            found="; ".join(changed),
            do=f"use another --run folder, or delete {file.parent}",
        )
    # A result whose file is gone is made again.
    new.measurements = [entry for entry in old.measurements if (file.parent / entry.file).is_file()]
    new.results = compare(new.measurements, new.reference)
    return new


def _identity(comparison: Comparison) -> dict[str, Any]:
    settings = {f"bench.{key}": value for key, value in comparison.settings.items() if key not in FREE_SETTINGS}
    models = {f"config of {name}": value for name, value in comparison.models.items()}
    return {**settings, **comparison.environment, **models}


def _log_ratios(comparison: Comparison) -> None:
    for result in comparison.results:
        for name, ratios in result.ratios.items():
            speed, cache = ratios["output_tokens_per_s"], ratios.get("kv_cache_tokens")
            log.info(
                "concurrency %d: %s gives %.2f times %s's output tokens/s (%.2f to %.2f over the rounds)%s",
                result.concurrency,
                name,
                speed.mean,
                comparison.reference,
                speed.min,
                speed.max,
                f", KV cache of {cache.mean:.2f} times the tokens" if cache else "",
            )
