"""The stages in order: run one by name, or all with one recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    from layerboost.model.base import Base

RECIPE = "recipe.yaml"
# Stages that may run under torchrun.
SPREAD = ("measure", "heal")


def measure(recipe: Recipe, run: Path, compare: Sequence[Path] = ()) -> Any:
    """Run stage 1, or compare its file with others. Imports are local so that the command line starts fast."""
    if compare:
        from layerboost.measuring.stability import run_stability

        return run_stability(run, list(compare))
    from layerboost.measuring.stage import run_measure

    return run_measure(recipe, run)


def plan(recipe: Recipe, run: Path, curve: bool = False) -> Any:
    """Run stage 2, or with `curve` plan for every budget."""
    from layerboost.planning.stage import run_frontier, run_plan

    return run_frontier(recipe, run) if curve else run_plan(recipe, run)


def convert(recipe: Recipe, run: Path) -> Any:
    """Run stage 3."""
    from layerboost.converting import run_convert

    return run_convert(recipe, run)


def heal(recipe: Recipe, run: Path) -> Any:
    """Run stage 4."""
    from layerboost.healing.stage import run_heal

    return run_heal(recipe, run)


def evaluate(recipe: Recipe, run: Path) -> Any:
    """Run stage 5 on base, converted and healed, as far as they exist, and the recipe's extra checkpoints."""
    from layerboost.evaluating.gate import check_gate
    from layerboost.evaluating.stage import run_evaluate
    from layerboost.model.base import find_model

    runtime = start_runtime(recipe)
    models = checkpoints(recipe, run, runtime)
    extra = extra_checkpoints(recipe.evaluate.checkpoints, models, "evaluate")
    models |= {name: find_model(str(folder), runtime, run, recipe.trust_remote_code) for name, folder in extra.items()}
    comparison = run_evaluate(recipe, run, models)
    check_gate(comparison.gate)
    return comparison


def bench(recipe: Recipe, run: Path, decode_sweep: bool = False) -> Any:
    """Run stage 6 on base, healed (or else converted, which is as fast) and the recipe's extra checkpoints."""
    from layerboost.benching.stage import run_bench

    own = {name: model.folder for name, model in checkpoints(recipe, run, start_runtime(recipe)).items()}
    if "healed" in own:
        own.pop("converted", None)
    return run_bench(recipe, run, own | extra_checkpoints(recipe.bench.checkpoints, own, "bench"), decode_sweep)


def report(recipe: Recipe, run: Path) -> Any:
    """Run stage 7."""
    from layerboost.reporting.stage import run_report

    return run_report(run)


STAGES: dict[str, Callable[..., Any]] = {
    stage.__name__: stage for stage in (measure, plan, convert, heal, evaluate, bench, report)
}


def run_stage(name: str, recipe: Recipe, run: Path, **options: Any) -> Any:
    """Run one stage, record the attempt in run.json and return the stage's result.

    Raise what the stage raises, and ConfigError under torchrun if the stage does not support it.
    """
    if name not in SPREAD:
        only_one_process(name)
    with locked(run), saved_recipe(recipe, run), recorded(run, name, recipe):
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
            do=f"use torchrun only for {' and '.join(SPREAD)}; unset WORLD_SIZE if it is a leftover",
        )


def run_all(recipe: Recipe, run: Path) -> Any:
    """Run every stage in order and return the report's summary; a stage keeps what an earlier run finished.

    After a missed gate, skip the benchmark, write the report and raise GateMissed.
    """
    from layerboost.healing.data import batch_of_process

    only_one_process("run")
    if not finished(recipe, run):
        if not (run / HEALED / PLAN).is_file():
            batch_of_process(recipe.heal)  # not in `check`, which one process may run on behalf of many
        from layerboost.check import check

        check(recipe, run)
    result = None
    # In a new folder each stage saves the recipe, so that the files of the first stages have one.
    with saved_recipe(recipe, run) if (run / RECIPE).is_file() else nullcontext():
        for number, name in enumerate(STAGES, 1):
            log.info("stage %d of %d: %s", number, len(STAGES), name)
            try:
                result = run_stage(name, recipe, run)
            except GateMissed:
                run_stage("report", recipe, run)
                raise
    return result


@contextmanager
def saved_recipe(recipe: Recipe, run: Path) -> Iterator[None]:
    """Save the resolved recipe as RUN/recipe.yaml, so that the run can be repeated; undo it if settings are refused."""
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
    """Return whether this recipe has been run to its end here, so that nothing remains to check."""
    files = [run / RECIPE, run / PLAN, run / HEALED / PLAN, run / "report.html"]
    return (
        all(file.is_file() for file in files)
        and files[0].read_text(encoding="utf-8") == recipe_yaml(recipe)
        and read_plan(files[1]).hash() == read_plan(files[2]).hash()
    )


def checkpoints(recipe: Recipe, run: Path, runtime: Runtime) -> dict[str, Base]:
    """Return those of base, converted and healed that exist, by name.

    Raise ConfigError if one was made from another plan than RUN/plan.yaml or from another base.
    """
    from layerboost.model.base import find_model, open_base
    from layerboost.model.checkpoint import check_same_model, check_same_plan, plan_in
    from layerboost.model.integrity import check_checkpoint

    base = open_base(recipe, run, runtime)
    existing = {"base": base}
    for name, folder, command in (("converted", run / CONVERTED, "convert"), ("healed", run / HEALED, "heal")):
        made_from = plan_in(folder)
        if made_from is None:
            continue
        check_same_plan(made_from, folder, run / PLAN, command)
        check_same_model(made_from, base.info, folder)
        check_checkpoint(folder)
        existing[name] = find_model(str(folder), runtime, run, recipe.trust_remote_code)
    return existing


def extra_checkpoints(given: dict[str, str], own: Mapping[str, Any], section: str) -> dict[str, Path]:
    """Return the recipe's extra checkpoints; raise ConfigError if one has the name of a model of the run."""
    if twice := own.keys() & given.keys():
        raise ConfigError(f"{section}.checkpoints uses a name of the run's own models", found=", ".join(sorted(twice)))
    return {name: Path(folder).expanduser() for name, folder in given.items()}
