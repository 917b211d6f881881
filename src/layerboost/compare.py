"""compare: plans at equal cost side by side, each before and after healing with the same tokens → RUN/compare."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from layerboost.artifacts import (
    CONVERTED,
    HEALED,
    PLAN,
    SENSITIVITY,
    LayerPlan,
    PlanFile,
    Sensitivity,
    read_json,
    read_plan,
    write_json,
    write_plan,
    write_text,
)
from layerboost.errors import ConfigError, InfeasibleBudget
from layerboost.evaluation.comparison import average_against
from layerboost.evaluation.statistics import difference
from layerboost.evaluation.tasks import BenchTask, load_bench
from layerboost.healing.least_squares import check_fit
from layerboost.healing.training import batch_of_process
from layerboost.model.base import open_base
from layerboost.model.surgery import check_plan
from layerboost.pipeline import kept_recipe, only_one_process, run_stage
from layerboost.recipe import Recipe
from layerboost.reporting.compared import compared_page
from layerboost.runtime import locked, log, recorded, start_runtime
from layerboost.schemas.evaluation import EvalComparison
from layerboost.search.costs import base_kv_bytes, plan_kv_bytes
from layerboost.sensitivity.calibration import MEASURED
from layerboost.stages.evaluate import run_evaluate
from layerboost.text import SAMPLES, SAMPLES_FROM

FOLDER, OURS = "compare", "ours"
CONTROLS = {"paper_tiers": "threshold", "llm_drop": "cosine", "uniform": "uniform", "random": "random"}
# Limits on damage are ours alone: the controls know none.
NO_LIMITS = {"plan.max_kl": None, "plan.max_retrieval": None}
ALL_SLIDING = {"all_sliding": False, "all_sliding_sink": True}


def rows(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What each row changes in the recipe; all spend the same tokens of healing, at the same cost."""
    tokens = recipe.heal.attention_tokens + recipe.heal.tokens
    return {
        OURS: {},
        "ours_without_attention_distillation": {
            "heal.fit_tokens": 0,
            "heal.attention_tokens": 0,
            "heal.tokens": tokens,
        },
        **{row: {"plan.method": method, **NO_LIMITS} for row, method in CONTROLS.items()},
        **{name: {} for name in ALL_SLIDING},
    }


def run_compare(recipe: Recipe, run: Path) -> dict[str, Any]:
    """Plan, convert and heal every row in a run folder of its own, evaluate all of them together, and write the table.

    What an earlier call finished is kept. Writes RUN/compare/comparison.json, comparison.md and comparison.html, and
    returns the first. Raises ConfigError without RUN/sensitivity.json, and what the stages raise; a row whose method
    has no plan within the budget, or none that this model and text allow, is left out and named.
    """
    only_one_process("compare")
    with locked(run), kept_recipe(recipe, run), recorded(run, "compare", recipe):
        return _compare(recipe, run)


def _compare(recipe: Recipe, run: Path) -> dict[str, Any]:
    batch_of_process(recipe.heal)
    check_fit(recipe)
    measured = read_json(run / SENSITIVITY, Sensitivity, "layerboost measure")
    runtime = start_runtime(recipe)
    base = open_base(recipe, run, runtime)
    models, left_out = {"base": base.folder}, {}
    _prepare(run, run / FOLDER)  # the evaluation reads it too
    for row, changes in rows(recipe).items():
        folder, settings = run / FOLDER / row, _row_recipe(recipe, base.folder, changes)
        log.info("compare: %s", row)
        _prepare(run, folder)
        if row in ALL_SLIDING:
            # Without a hash of sensitivities it counts as written by hand, and the plan stage leaves it alone.
            write_plan(folder / PLAN, all_sliding(measured, recipe, ALL_SLIDING[row]))
        try:
            run_stage("plan", settings, folder)
            if row in ALL_SLIDING:
                check_all_sliding(read_plan(folder / PLAN), base.config, recipe.text.sequence_tokens)
        except (InfeasibleBudget, Unsuited) as error:
            left_out[row] = error.wrong
            log.warning("%s is left out: %s", row, error)
            continue
        for stage in ("convert", "heal"):
            run_stage(stage, settings, folder)
        models |= {f"{row}-{name}": folder / name for name in (CONVERTED, HEALED)}
    if f"{OURS}-{HEALED}" not in models:
        raise ConfigError("the recipe's own plan is infeasible, so there is nothing to compare with", do="see above")
    found = run_evaluate(recipe, run / FOLDER, models, runtime)
    tasks = load_bench(recipe.evaluate)
    compared = {
        "schema_version": 1,
        "context_tokens": recipe.plan.context_tokens,
        "healing_tokens": recipe.heal.attention_tokens + recipe.heal.tokens,
        "left_out": left_out,
        "rows": [
            _row(row, measured, recipe, run / FOLDER, found, tasks) for row in rows(recipe) if row not in left_out
        ],
        "evaluation": "eval/comparison.json",
    }
    write_json(run / FOLDER / "comparison.json", compared)
    html, markdown = compared_page(compared, found)
    write_text(run / FOLDER / "comparison.html", html)
    write_text(run / FOLDER / "comparison.md", markdown)
    return compared


def all_sliding(measured: Sensitivity, recipe: Recipe, sink: bool) -> PlanFile:
    """Every layer sliding, with the longest window that the budget allows."""
    window = max(1, int(recipe.plan.kv_fraction * recipe.plan.context_tokens))
    layers = [
        LayerPlan(layer=layer, attention="sliding", window=window, sink=sink) for layer in range(measured.model.layers)
    ]
    return PlanFile(model=measured.model, method="all sliding", layers=layers)


class Unsuited(ConfigError):
    """A control that this model or this text does not allow."""


def check_all_sliding(plan: PlanFile, config: Any, sequence_tokens: int) -> None:
    """Raise Unsuited for what `convert` would refuse, which would end the comparison after all other rows."""
    try:
        check_plan(config, plan.layers)
    except ConfigError as error:
        raise Unsuited(error.wrong, found=error.found, do=error.do) from None
    if plan.layers[0].sink and plan.window and plan.window >= sequence_tokens:
        raise Unsuited(
            f"sinks are fitted on text longer than the window of {plan.window}",
            found=f"sequences of {sequence_tokens} tokens",
            do="lower plan.kv_fraction or raise text.sequence_tokens",
        )


def _row_recipe(recipe: Recipe, base: Path, changes: Mapping[str, Any]) -> Recipe:
    values = recipe.model_dump(mode="json") | {"model": str(base)}
    for dotted, value in changes.items():
        section, key = dotted.split(".")
        values[section] = values[section] | {key: value}
    return Recipe.model_validate(values)


def _prepare(run: Path, folder: Path) -> None:
    """What a folder takes over from the run: its sensitivities, plans measured before and the model's own samples."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (SENSITIVITY, MEASURED, SAMPLES, SAMPLES_FROM):
        # A search that was killed has measured more than the run.
        if (run / name).is_file() and not (name == MEASURED and (folder / name).is_file()):
            shutil.copyfile(run / name, folder / name)


def _row(
    row: str, measured: Sensitivity, recipe: Recipe, folder: Path, found: EvalComparison, tasks: list[BenchTask]
) -> dict[str, Any]:
    """One row: what the plan is and costs, and what ours leads it by after healing."""
    plan, context = read_plan(folder / row / PLAN), recipe.plan.context_tokens
    return {
        "name": row,
        "layers": {kind: plan.count(kind) for kind in ("full", "sliding", "none")},
        "window": plan.window,
        "sinks": sum(entry.sink for entry in plan.layers),
        "kv_fraction": plan_kv_bytes(measured.model, plan.layers, context) / base_kv_bytes(measured.model, context),
        "lead": None if row == OURS else _lead(row, folder / "eval", found, tasks),
    }


def _lead(row: str, results: Path, found: EvalComparison, tasks: list[BenchTask]) -> dict[str, Any]:
    """Ours healed less this row healed, paired over the same tokens and items: `kl` (below 0 is better), `average`."""
    pair = {name: f"{name}-{HEALED}" for name in (OURS, row)}

    def read(name: str, what: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((results / f"{pair[name]}.{what}.json").read_text(encoding="utf-8"))
        return values

    lead: dict[str, Any] = {"kl": None, "average": None}
    if found.perplexity:
        kl = [read(name, "text")["kl"] for name in (OURS, row)]
        lead["kl"] = difference([own - other for own, other in zip(*kl, strict=True)]).model_dump()
    if found.average:
        headline = [task for task in tasks if task.name in found.average.tasks]
        pairs = [(task, read(row, task.name), read(OURS, task.name)) for task in headline]
        lead["average"] = average_against(pairs).model_dump()
    return lead
