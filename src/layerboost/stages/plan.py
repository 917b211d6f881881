"""plan: from sensitivities to one strategy a layer → plan.yaml, which a person may edit."""

from __future__ import annotations

from pathlib import Path

from layerboost.artifacts import PLAN, SENSITIVITY, PlanFile, Sensitivity, file_hash, read_json, read_plan, write_plan
from layerboost.errors import ConfigError
from layerboost.recipe import Recipe
from layerboost.runtime import log
from layerboost.search.choices import predict
from layerboost.search.memory import CPU_ENGINE, GPU_ENGINE, serving
from layerboost.search.selection import select
from layerboost.serving.server import runs_on_cpu


def run_plan(recipe: Recipe, run: Path) -> PlanFile:
    """Choose the strategies and write `plan.yaml`; one made from the same inputs stays, with a person's edits, and so
    does one that a person wrote.

    Raises ConfigError, or InfeasibleBudget with the nearest budget that can be met.
    """
    source = run / SENSITIVITY
    sensitivity = read_json(source, Sensitivity, "layerboost measure")
    if not sensitivity.complete:
        raise ConfigError(
            f"{source} is incomplete",
            found=f"{len(sensitivity.layers)} of {sensitivity.model.layers} layers",
            do="run `layerboost measure` again: it goes on where it stopped",
        )
    settings = recipe.plan.model_dump(mode="json")
    if recipe.plan.method == "random":
        settings["seed"] = recipe.seed
    target = run / PLAN
    if target.exists():
        there = read_plan(target)
        by_hand = there.sensitivity is None
        if by_hand or (there.sensitivity == file_hash(source) and there.settings == settings):
            log.info("%s is up to date; delete it to choose again", target)
            return there
        log.info("%s was made from other inputs: choosing again", target)
    layers = select(sensitivity, recipe.plan, recipe.seed)
    plan = PlanFile(
        model=sensitivity.model,
        method=recipe.plan.method,
        settings=settings,
        sensitivity=file_hash(source),
        layers=layers,
    )
    predicted = predict(sensitivity, layers, recipe.plan)
    plan.predicted = predicted.model_copy(update={"plan": plan.hash()})
    engine = CPU_ENGINE if runs_on_cpu() else GPU_ENGINE
    plan.serving = serving(sensitivity.model, layers, recipe.plan.context_tokens, recipe.plan.concurrency, engine)
    warn(plan, recipe.plan.context_tokens)
    write_plan(target, plan)
    return plan


def warn(plan: PlanFile, context_tokens: int) -> None:
    """Say what a plan gains nothing by."""
    if plan.window and plan.window >= context_tokens:
        log.warning(
            "a window of %d holds all of the %d tokens of context that this plan is for: its %d sliding layers gain "
            "nothing over full ones; plan with a shorter window, or set plan.context_tokens to the length you serve",
            plan.window,
            context_tokens,
            plan.count("sliding"),
        )
