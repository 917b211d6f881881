"""The stages in order: one by name, or all of one recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerboost.errors import ConfigError, GateMissed, InfeasibleBudget
from layerboost.files import write_text
from layerboost.recipe import Recipe, recipe_yaml
from layerboost.run_folder import locked, recorded
from layerboost.runtime import Runtime, is_main_process, log, release_memory, start_runtime, world_size
from layerboost.schemas.plan import read_plan
from layerboost.schemas.run import CONVERTED, HEALED, PLAN

if TYPE_CHECKING:
    pass

RECIPE = "recipe.yaml"
# Stages that torchrun's processes share.
SPREAD = ("measure", "heal")


def measure(recipe: Recipe, run: Path, compare: Sequence[Path] = ()) -> Any:
    """Stage 1, or a comparison of what it wrote with others; imports stay inside: the command line starts fast."""
    if compare:
        from layerboost.measuring.stability import run_stability

        return run_stability(run, list(compare))
    from layerboost.measuring.stage import run_measure

    return run_measure(recipe, run)


def plan(recipe: Recipe, run: Path, curve: bool = False) -> Any:
    """Stage 2, or with `curve` the plans of every budget."""
    from layerboost.planning.stage import run_frontier, run_plan

    return run_frontier(recipe, run) if curve else run_plan(recipe, run)


def convert(recipe: Recipe, run: Path, compat: bool = False) -> Any:
    """Stage 3."""
    from layerboost.converting import run_convert

    return run_convert(recipe, run, compat)


def heal(recipe: Recipe, run: Path, resume: bool = True) -> Any:
    """Stage 4."""
    from layerboost.healing.stage import run_heal

    return run_heal(recipe, run, resume)


def evaluate(recipe: Recipe, run: Path) -> Any:
    """Stage 5: base, converted and healed, whichever the run folder holds, and the recipe's further checkpoints."""
    from layerboost.evaluating.gate import check_gate
    from layerboost.evaluating.stage import run_evaluate

    runtime = start_runtime(recipe)
    found = checkpoints(recipe, run, runtime)
    others = further(recipe.evaluate.checkpoints, found, "evaluate")
    comparison = run_evaluate(recipe, run, found | others, runtime)
    check_gate(comparison.gate)
    return comparison


def bench(recipe: Recipe, run: Path, decode_sweep: bool = False) -> Any:
    """Stage 6: base against the last boosted checkpoint, converted and healed being equally fast, and further ones."""
    from layerboost.benching.stage import run_bench

    found = checkpoints(recipe, run, start_runtime(recipe))
    if "healed" in found:
        found.pop("converted", None)
    return run_bench(recipe, run, found | further(recipe.bench.checkpoints, found, "bench"), decode_sweep)


def report(recipe: Recipe, run: Path, png: bool = False) -> Any:
    """Stage 7; with `png` the charts also as PNG files."""
    from layerboost.reporting.stage import run_report

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
        from layerboost.check import check

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
    from layerboost.model.base import open_base
    from layerboost.model.checkpoint import check_same_model, check_same_plan, plan_in
    from layerboost.model.integrity import check_checkpoint

    base = open_base(recipe, run, runtime)
    found = {"base": base.folder}
    for name, folder, command in (("converted", run / CONVERTED, "convert"), ("healed", run / HEALED, "heal")):
        made_from = plan_in(folder)
        if made_from is None:
            continue
        check_same_plan(made_from, folder, run / PLAN, command)
        check_same_model(made_from, base.info, folder)
        check_checkpoint(folder)
        found[name] = folder
    return found


def further(given: dict[str, str], own: dict[str, Path], section: str) -> dict[str, Path]:
    """The recipe's further checkpoints; raises ConfigError for a name that the run's own models have."""
    if twice := own.keys() & given.keys():
        raise ConfigError(f"{section}.checkpoints uses a name of the run's own models", found=", ".join(sorted(twice)))
    return {name: Path(folder).expanduser() for name, folder in given.items()}
