"""`layerboost bench`: base and boosted models under the engine that serves them, in interleaved repeats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerboost.benching.processors import Processors
from layerboost.engines import open_engine
from layerboost.engines.protocol import Engine, Load, Running
from layerboost.errors import ConfigError
from layerboost.files import file_hash
from layerboost.model.base import Base
from layerboost.model.checkpoint import check_extra_checkpoints
from layerboost.model.integrity import check_checkpoint
from layerboost.recipe import Bench, Recipe
from layerboost.runtime import Progress, cores, log
from layerboost.schemas.artifact import finite, read_json, write_json
from layerboost.schemas.benchmark import SPEED, Comparison, Measurement, Point, metrics_of
from layerboost.schemas.plan import read_plan
from layerboost.schemas.run import BASE, PLAN

FOLDER = "bench"
# Settings that may differ between two calls: they do not change a single measurement.
FREE_SETTINGS = {"port", "startup_timeout_s", "repeats", "concurrency", "decode_lengths"}
# Settings of one kind of benchmark that the other does not use.
OF_LOAD = {"concurrency", "requests_per_concurrency", "output_tokens"}
OF_SWEEP = {"decode_batch", "decode_lengths"}
# The prompt of a decode sweep: short, so that the length is that of the answer.
SWEEP_INPUT_TOKENS = 16


@dataclass(frozen=True)
class Job:
    """The measurements of one call, and their files."""

    recipe: Recipe
    run: Path
    models: dict[str, Path]
    decode_sweep: bool

    @property
    def engine(self) -> Engine:
        return open_engine(self.bench.engine)

    @property
    def bench(self) -> Bench:
        return self.recipe.bench

    @property
    def file(self) -> Path:
        return self.run / FOLDER / ("decode_sweep.json" if self.decode_sweep else "comparison.json")

    @property
    def points(self) -> list[Point]:
        if self.decode_sweep:
            return [(self.bench.decode_batch, length) for length in dict.fromkeys(self.bench.decode_lengths)]
        return [(concurrency, None) for concurrency in dict.fromkeys(self.bench.concurrency)]

    def load(self, point: Point) -> Load:
        """Return the load of a point: the same prompts for every model, others at another point."""
        (concurrency, length), bench = point, self.bench
        return Load(
            concurrency=concurrency,
            requests=concurrency if length else bench.requests(concurrency),
            shared_prefix_tokens=bench.shared_prefix_tokens,
            input_tokens=bench.input_tokens,
            output_tokens=length or bench.output_tokens,
            seed=self.recipe.seed + concurrency + (length or 0),
        )

    def stem(self, name: str, point: Point, repeat: int) -> str:
        return f"{name}-{f'decode{point[1]}' if point[1] else f'c{point[0]}'}-r{repeat}"


def check(recipe: Recipe, run: Path, base: Base) -> None:
    """Raise ConfigError for what `run_bench` could not serve or load."""
    check_extra_checkpoints(recipe.bench.checkpoints, run, base)
    check_lengths(recipe.bench, "the model", base.config.max_position_embeddings)
    open_engine(recipe.bench.engine).check(recipe.bench, (base.folder, run))


def run_bench(recipe: Recipe, run: Path, models: dict[str, Path], decode_sweep: bool = False) -> Comparison:
    """Measure every model (name -> directory) at every concurrency and write `RUN/bench/`; return the comparison.

    In each repeat every model is started anew. The engine's JSON goes to `{model}-c{concurrency}-r{repeat}.json`, ours
    to `comparison.json`. With `decode_sweep`, lengths are measured instead of concurrencies, and the files are
    `{model}-decode{length}-r{repeat}.json` and `decode_sweep.json`. A run that was killed continues where it stopped.
    Raise ConfigError before anything is started if the engine is missing, the port is taken, a model is incomplete or
    its context too short, or if existing results are of other settings or models; LayerboostError if the engine or a
    request fails.
    """
    job = _checked(recipe, run, models, decode_sweep)
    comparison = _opened(job)
    done = {entry.key for entry in comparison.measurements}
    repeats = range(job.bench.repeats)
    # Repeats of a single model need not alternate: one server for all of them, unless it caches prompts.
    alone = len(models) == 1 and not job.bench.shared_prefix_tokens
    planned = [
        (name, [(repeat, point) for repeat in turn for point in job.points if (name, point, repeat) not in done])
        for turn in ([repeats] if alone else [[repeat] for repeat in repeats])
        # Every second repeat in reverse: a machine that slows down steadily favours no model.
        for name in (reversed(models) if turn[0] % 2 else models)
    ]
    missing = sum(len(measurements) for _, measurements in planned)
    log.info("bench: %d measurements to make, %d exist", missing, len(done))
    comparison.complete = missing == 0
    tokens = sum(job.load(point).tokens for _, measurements in planned for _, point in measurements)
    with Progress("bench", max(tokens, 1), "output tokens") as progress:
        for name, measurements in planned:
            if not measurements:
                continue
            check_checkpoint(models[name])  # again: it may have changed
            sweep, repeat = "-decode" if decode_sweep else "", measurements[0][0]
            log_file = run / FOLDER / "logs" / f"{name}{sweep}-r{repeat}.log"
            with job.engine.launch(name, models[name], job.recipe, log_file) as running:
                for repeat, point in measurements:
                    comparison.measurements.append(_measure(job, running, name, point, repeat, progress))
                    missing -= 1
                    comparison.complete = missing == 0
                    write_json(job.file, comparison)
    write_json(job.file, comparison)
    _log_ratios(comparison)
    return comparison


def _measure(job: Job, running: Running, name: str, point: Point, repeat: int, progress: Progress) -> Measurement:
    load, stem = job.load(point), job.stem(name, point, repeat)
    at = f"at concurrency {load.concurrency}, {load.output_tokens} tokens out"
    log.info("measuring %s %s, repeat %d of %d", name, at, repeat + 1, job.bench.repeats)
    processors = Processors()
    answer = running.answer(load, progress.advance)
    used = processors.used()
    write_json(job.run / FOLDER / f"{stem}.json", finite(answer.raw))
    return Measurement(
        model=name,
        concurrency=point[0],
        output_tokens=point[1],
        repeat=repeat,
        file=f"{stem}.json",
        seed=load.seed,
        metrics={**metrics_of(answer.raw), **answer.metrics, **used},
        kv_context_tokens=answer.context_tokens,
    )


def _checked(recipe: Recipe, run: Path, models: dict[str, Path], decode_sweep: bool) -> Job:
    """Return the job with the flags that every model is served with; raise ConfigError."""
    bench = recipe.bench
    if decode_sweep:
        longest = max(bench.decode_lengths)
        used: dict[str, Any] = {"concurrency": (bench.decode_batch,), "output_tokens": longest}
        used |= {"shared_prefix_tokens": 0, "input_tokens": SWEEP_INPUT_TOKENS}
        bench = bench.model_copy(update=used)
    for name, folder in models.items():
        config = check_checkpoint(folder)
        context = (config.get("text_config") or config).get("max_position_embeddings")
        if isinstance(context, int):
            check_lengths(bench, name, context, decode_sweep)
    engine = open_engine(bench.engine)
    engine.check(bench, models.values())
    flags = (*_flags(engine, models, bench.server_args), *bench.server_args)
    bench = bench.model_copy(update={"engine": engine.NAME, "server_args": flags})
    return Job(recipe.model_copy(update={"bench": bench}), run, models, decode_sweep)


def check_lengths(bench: Bench, name: str, context_tokens: int, decode_sweep: bool = False) -> None:
    """Raise ConfigError for requests longer than a model's context."""
    longest = max(bench.decode_lengths) if decode_sweep else bench.output_tokens
    wanted = bench.shared_prefix_tokens + bench.input_tokens + longest
    if wanted > context_tokens:
        keys = "bench.shared_prefix_tokens, bench.input_tokens or bench.output_tokens"
        raise ConfigError(
            f"a request of the benchmark is {wanted} tokens long",
            found=f"{name} has a context of {context_tokens} tokens",
            do=f"lower {'bench.decode_lengths' if decode_sweep else keys}",
        )


def _flags(engine: Engine, models: dict[str, Path], given: tuple[str, ...]) -> tuple[str, ...]:
    """Return the serving flags that the models' plans need in addition to those `given`.

    They are the same for all models, the base included: otherwise a ratio would compare settings too. Raise ConfigError
    if plans need different flags.
    """
    plans = {name: read_plan(folder / PLAN) for name, folder in models.items() if (folder / PLAN).is_file()}
    needed = {name: flags for name, plan in plans.items() if (flags := engine.serving_flags(plan, given))}
    if len(set(needed.values())) > 1:
        raise ConfigError(
            "the plans of the models advise different serving flags, and all must be served alike",
            found="; ".join(f"{name}: {' '.join(flags)}" for name, flags in needed.items()),
            do="choose for all of them: bench.server_args",
        )
    return next(iter(needed.values()), ())


def _opened(job: Job) -> Comparison:
    """Return the existing comparison, or an empty one; raise ConfigError if it is of other settings or models."""
    engine = job.engine
    unused = {"checkpoints", *(OF_LOAD if job.decode_sweep else OF_SWEEP), *engine.UNUSED}
    new = Comparison(
        settings={**job.bench.model_dump(mode="json", exclude=unused), "seed": job.recipe.seed},
        environment={**engine.environment(job.recipe), "cores": len(cores())},
        models={name: file_hash(folder / "config.json") for name, folder in job.models.items()},
        reference=BASE if BASE in job.models else next(iter(job.models)),
    )
    if not job.file.exists():
        return new
    old = read_json(job.file, Comparison, "layerboost bench")
    before, now = _identity(old), _identity(new)
    if changed := [key for key in dict.fromkeys([*before, *now]) if before.get(key) != now.get(key)]:
        raise ConfigError(
            f"{job.file} holds results of other settings or models",
            found="; ".join(f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed),
            do=f"use another --run folder, or delete {job.file.parent}",
        )
    # A measurement whose file is missing is made again.
    new.measurements = [entry for entry in old.measurements if (job.file.parent / entry.file).is_file()]
    return new


def _identity(comparison: Comparison) -> dict[str, Any]:
    settings = {f"bench.{key}": value for key, value in comparison.settings.items() if key not in FREE_SETTINGS}
    models = {f"config of {name}": value for name, value in comparison.models.items()}
    return {**settings, **comparison.environment, **models}


def _log_ratios(comparison: Comparison) -> None:
    for result in comparison.results:
        for name, ratios in result.ratios.items():
            cache = ratios.get("kv_cache_tokens")
            log.info(
                "concurrency %d%s: %s gives %s times %s's output tokens/s%s%s",
                result.concurrency,
                f", {result.output_tokens} tokens out" if result.output_tokens else "",
                name,
                ratios[SPEED].as_ratio,
                comparison.reference,
                f", KV cache of {cache.median:.2f} times the tokens" if cache else "",
                result.warning(comparison.reference, name),
            )
