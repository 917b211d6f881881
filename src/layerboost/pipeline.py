"""The stages in order: one by name, all of one recipe, and the checks before hours of compute."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerboost.artifacts import CONVERTED, HEALED, PLAN, read_plan, write_text
from layerboost.errors import ConfigError, GateMissed, InfeasibleBudget, LayerboostError
from layerboost.recipe import Bench, Recipe, recipe_yaml
from layerboost.runtime import (
    Runtime,
    is_main_process,
    locked,
    log,
    no_run_folder,
    recorded,
    release_memory,
    start_runtime,
    world_size,
)

if TYPE_CHECKING:
    import torch

GIB = 1 << 30
RECIPE = "recipe.yaml"
# Stages that torchrun's processes share.
SPREAD = ("measure", "heal")


def measure(recipe: Recipe, run: Path, compare: Sequence[Path] = ()) -> Any:
    """Stage 1, or a comparison of what it wrote with others; imports stay inside: the command line starts fast."""
    if compare:
        from layerboost.stages.stability import run_stability

        return run_stability(run, list(compare))
    from layerboost.stages.measure import run_measure

    return run_measure(recipe, run)


def plan(recipe: Recipe, run: Path, curve: bool = False) -> Any:
    """Stage 2, or with `curve` the plans of every budget."""
    from layerboost.stages.plan import run_frontier, run_plan

    return run_frontier(recipe, run) if curve else run_plan(recipe, run)


def convert(recipe: Recipe, run: Path, compat: bool = False) -> Any:
    """Stage 3."""
    from layerboost.stages.convert import run_convert

    return run_convert(recipe, run, compat)


def heal(recipe: Recipe, run: Path, resume: bool = True) -> Any:
    """Stage 4."""
    from layerboost.stages.heal import run_heal

    return run_heal(recipe, run, resume)


def evaluate(recipe: Recipe, run: Path) -> Any:
    """Stage 5: base, converted and healed, whichever the run folder holds, and the recipe's further checkpoints."""
    from layerboost.evaluation.gate import check_gate
    from layerboost.stages.evaluate import run_evaluate

    runtime = start_runtime(recipe)
    found = checkpoints(recipe, run, runtime)
    others = further(recipe.evaluate.checkpoints, found, "evaluate")
    comparison = run_evaluate(recipe, run, found | others, runtime)
    check_gate(comparison.gate)
    return comparison


def bench(recipe: Recipe, run: Path, decode_sweep: bool = False) -> Any:
    """Stage 6: base against the last boosted checkpoint, converted and healed being equally fast, and further ones."""
    from layerboost.stages.bench import run_bench

    found = checkpoints(recipe, run, start_runtime(recipe))
    if "healed" in found:
        found.pop("converted", None)
    return run_bench(recipe, run, found | further(recipe.bench.checkpoints, found, "bench"), decode_sweep)


def report(recipe: Recipe, run: Path, png: bool = False) -> Any:
    """Stage 7; with `png` the charts also as PNG files."""
    from layerboost.stages.report import run_report

    return run_report(run, png)


STAGES: dict[str, Callable[..., Any]] = {
    stage.__name__: stage for stage in (measure, plan, convert, heal, evaluate, bench, report)
}


def run_stage(name: str, recipe: Recipe, run: Path, **options: Any) -> Any:
    """Run one stage and note the attempt in run.json. Returns what the stage returns.

    Raises ConfigError under torchrun for a stage that one process must run, besides what the stage raises.
    """
    if name not in SPREAD:
        only_one_process(name)
    with locked(run), kept_recipe(recipe, run), recorded(run, name, recipe):
        try:
            return STAGES[name](recipe, run, **options)
        finally:
            release_memory()


def only_one_process(command: str) -> None:
    """Raise ConfigError under torchrun: every process would write the same files."""
    if world_size() > 1:
        raise ConfigError(
            f"layerboost {command} does not run under torchrun",
            found=f"{world_size()} processes (WORLD_SIZE)",
            do=f"start torchrun for {' and '.join(SPREAD)} alone; unset WORLD_SIZE if it is a leftover",
        )


def run_all(recipe: Recipe, run: Path) -> Any:
    """Run every stage in order; each keeps what an earlier run finished. Returns the report's summary.

    A missed gate is not worth a benchmark: the report is written all the same, and GateMissed raised.
    """
    from layerboost.healing.training import batch_of_process

    only_one_process("run")
    if not finished(recipe, run):
        if not (run / HEALED / PLAN).is_file():
            batch_of_process(recipe.heal)  # not in `check`, which one process may ask on behalf of many
        check(recipe, run)
    result = None
    # In a new folder each stage keeps the recipe, and what the first ones made is not left without it.
    with kept_recipe(recipe, run) if (run / RECIPE).is_file() else nullcontext():
        for number, name in enumerate(STAGES, 1):
            log.info("stage %d of %d: %s", number, len(STAGES), name)
            try:
                result = run_stage(name, recipe, run)
            except GateMissed:
                run_stage("report", recipe, run)
                raise
    return result


@contextmanager
def kept_recipe(recipe: Recipe, run: Path) -> Iterator[None]:
    """Save the resolved recipe as RUN/recipe.yaml, where running again repeats the run; take refused settings back."""
    if not is_main_process():
        yield
        return
    file = run / RECIPE
    before = file.read_text(encoding="utf-8") if file.is_file() else None
    write_text(file, recipe_yaml(recipe))
    try:
        yield
    except (ConfigError, InfeasibleBudget):
        if before is None:
            file.unlink()
        else:
            write_text(file, before)
        raise


def finished(recipe: Recipe, run: Path) -> bool:
    """Whether this very recipe has been run to its end here, so that there is nothing left to check."""
    files = [run / RECIPE, run / PLAN, run / HEALED / PLAN, run / "report.html"]
    return (
        all(file.is_file() for file in files)
        and files[0].read_text(encoding="utf-8") == recipe_yaml(recipe)
        and read_plan(files[1]).hash() == read_plan(files[2]).hash()
    )


def checkpoints(recipe: Recipe, run: Path, runtime: Runtime) -> dict[str, Path]:
    """Base, converted and healed directories that exist, by name.

    Raises ConfigError for one that was made from another plan than RUN/plan.yaml or from another base.
    """
    from layerboost.model.checkpoint import (
        check_same_model,
        check_same_plan,
        load_config,
        model_info,
        open_base,
        plan_in,
    )
    from layerboost.model.integrity import check_checkpoint

    base = open_base(recipe, run, runtime)
    info = model_info(base, load_config(base, recipe.trust_remote_code), runtime.dtype)
    found = {"base": base.folder}
    for name, folder, command in (("converted", run / CONVERTED, "convert"), ("healed", run / HEALED, "heal")):
        made_from = plan_in(folder)
        if made_from is None:
            continue
        check_same_plan(made_from, folder, run / PLAN, command)
        check_same_model(made_from, info, folder)
        check_checkpoint(folder)
        found[name] = folder
    return found


def further(given: dict[str, str], own: dict[str, Path], section: str) -> dict[str, Path]:
    """The recipe's further checkpoints; raises ConfigError for a name that the run's own models have."""
    if twice := own.keys() & given.keys():
        raise ConfigError(f"{section}.checkpoints uses a name of the run's own models", found=", ".join(sorted(twice)))
    return {name: Path(folder).expanduser() for name, folder in given.items()}


@dataclass(frozen=True)
class Estimate:
    """What `check` found: the model, and what the run will need against what there is."""

    model: str
    family: str
    layers: int
    parameters: int
    device: str
    memory_needed_gib: float
    memory_free_gib: float
    disk_needed_gib: float
    disk_free_gib: float
    calibration_tokens: int
    healing_tokens_per_s: float
    healing_hours: float
    vllm: str


def check(recipe: Recipe, run: Path) -> Estimate:
    """Recipe, model, text, tasks, further checkpoints, vLLM, port, memory and disk.

    Memory is that of healing, the hungriest stage, on its device, the adapters with their optimizer left out; beside a
    GPU the host must hold the model once, to merge it. Speed is worked out from this machine's matrix product.
    Raises ConfigError for what cannot work and LayerboostError when memory or disk will not do.
    """
    from layerboost.healing.estimate import estimate_healing
    from layerboost.healing.least_squares import check_fit
    from layerboost.healing.training import check_report_to, less_memory
    from layerboost.model.checkpoint import model_info
    from layerboost.model.integrity import check_checkpoint
    from layerboost.stages.evaluate import validate_evaluate
    from layerboost.stages.measure import validate_inputs, validate_measure
    from layerboost.stages.plan import validate_plan
    from layerboost.text import check_samples, is_local, load_tokens

    free_bytes = shutil.disk_usage(_place_of(run)).free
    validate_measure(recipe)
    validate_plan(recipe)
    check_report_to(recipe.heal.report_to)
    check_fit(recipe)
    runtime = start_runtime(recipe)
    source, config, tokenizer = _checked_base(recipe, run, runtime)
    validate_inputs(recipe, tokenizer, run, config.max_position_embeddings)
    longest = max(recipe.heal.fit_tokens, recipe.heal.attention_tokens, recipe.heal.tokens)
    check_samples(recipe.text, longest, "train")
    if all(map(is_local, recipe.text.sources)):
        load_tokens(recipe.text, tokenizer, "train", longest)
    for given in {*recipe.evaluate.checkpoints.values(), *recipe.bench.checkpoints.values()}:
        folder = Path(given).expanduser()
        if not folder.absolute().is_relative_to(run.absolute()):  # else it may be yet to be made
            check_checkpoint(folder)
    validate_evaluate(recipe, tokenizer, run, config.max_position_embeddings)
    vllm = _check_bench(recipe.bench, config.max_position_embeddings, (source.folder, run))
    info = model_info(source, config, runtime.dtype)
    weights_gib = info.parameters * info.bytes_per_element / GIB
    copies = 2 + bool(source.gguf) - sum((run / folder).is_dir() for folder in (CONVERTED, HEALED))
    plan = read_plan(run / PLAN).layers if (run / PLAN).is_file() else None
    healing = estimate_healing(recipe, config, info, runtime, plan)
    estimate = Estimate(
        model=source.name,
        family=info.model_type,
        layers=info.layers,
        parameters=info.parameters,
        device=str(runtime.device),
        memory_needed_gib=healing.memory_gib,
        memory_free_gib=free_memory_gib(runtime.device),
        disk_needed_gib=round(copies * weights_gib, 2),
        disk_free_gib=round(free_bytes / GIB, 2),
        calibration_tokens=recipe.measure.tokens,
        healing_tokens_per_s=healing.tokens_per_s,
        healing_hours=healing.hours,
        vllm=vllm,
    )
    check_room(estimate, weights_gib, runtime.device, less_memory(recipe.heal))
    return estimate


def _checked_base(recipe: Recipe, run: Path, runtime: Runtime) -> tuple[Any, Any, Any]:
    """The base, its config and its tokenizer; raises ConfigError for what `measure` could not use."""
    from layerboost.model.checkpoint import find_base, load_config, load_tokenizer
    from layerboost.model.files import check_gguf
    from layerboost.model.surgery import check_windows

    source = find_base(recipe, run, runtime)
    if source.gguf:
        check_gguf(source.folder / source.gguf)
    config = load_config(source, recipe.trust_remote_code)
    check_windows(config, recipe.measure.windows)
    return source, config, load_tokenizer(source, recipe.trust_remote_code)


def check_room(estimate: Estimate, weights_gib: float, device: torch.device, advice: str) -> None:
    """Raises LayerboostError when memory or disk will not do; `advice` is for healing's memory."""
    wants = [
        (f"memory on {device}", estimate.memory_needed_gib, estimate.memory_free_gib, f"free some, or {advice}"),
        ("disk", estimate.disk_needed_gib, estimate.disk_free_gib, "free some, or use a smaller model"),
    ]
    if device.type != "cpu":
        wants.append(("host memory", round(weights_gib, 2), free_memory_gib("cpu"), "free some: merging needs it once"))
    for kind, needed, free, do in wants:
        if needed > free:
            raise LayerboostError(f"not enough {kind}: {needed} GiB needed", found=f"{free} GiB free", do=do)


def _check_bench(bench: Bench, context_tokens: int, folders: Sequence[Path]) -> str:
    """vLLM's version, where the benchmark needs it; raises ConfigError for what it could not run."""
    from layerboost.serving.command import check_server
    from layerboost.stages.bench import check_lengths

    check_lengths(bench, "the model", context_tokens)
    if bench.engine == "transformers":
        return "not needed"
    return check_server(bench, folders)


def free_memory_gib(device: torch.device | str) -> float:
    """Memory that a process could still take there."""
    import psutil
    import torch

    cpu = torch.device(device).type == "cpu"
    free: int = psutil.virtual_memory().available if cpu else torch.cuda.mem_get_info(device)[0]
    return round(free / GIB, 2)


def _place_of(run: Path) -> Path:
    """The run folder, or the nearest directory above it that exists; raises ConfigError where it cannot be made."""
    place = run.absolute()
    while not place.exists() and not place.is_symlink():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise no_run_folder(run, f"{place} is not a directory that can be written")
    return place
