"""plan: from sensitivities to one strategy per layer → plan.yaml, which you may edit."""

from __future__ import annotations

import filecmp
import shutil
from itertools import count
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from layerboost.costs.budget import Budget, prefill_work
from layerboost.costs.memory import plan_serving
from layerboost.engines import open_engine
from layerboost.engines.vllm import cache_defaults, runs_on_cpu
from layerboost.errors import ConfigError
from layerboost.exporting.stage import check_plan
from layerboost.exporting.targets import lacks_sinks
from layerboost.files import file_hash
from layerboost.model.base import Base, find_model
from layerboost.model.families import what_vllm_lacks
from layerboost.planning.choices import metric_limits, predict, windows
from layerboost.planning.greedy import Measure
from layerboost.planning.methods import MEASURING, axis_of, frontier, knee, select
from layerboost.probes.calibration import open_measured
from layerboost.probes.metrics import TEXT_METRICS
from layerboost.recipe import Plan, Recipe
from layerboost.runtime import log, start_runtime
from layerboost.schemas.artifact import write_json
from layerboost.schemas.plan import AXES, FRONTIER, Axis, Frontier, FrontierPoint, PlanFile, read_plan, write_plan
from layerboost.schemas.run import PLAN, SENSITIVITY
from layerboost.schemas.sensitivity import Sensitivity, read_sensitivity

LLAMA_CPP = "llama.cpp"
# Unhealed plans of 0.32 and 0.41 measured were healed to 0.085 and 0.112; nothing worse was tried.
REPAIRED_KL = 0.3
# Settings that older files lack.
LATER = ("unit", "components", "sinks")


def check(recipe: Recipe, run: Path, base: Base) -> None:
    """Raise ConfigError if the plan needs metrics or windows that the same recipe does not measure."""
    settings, measure = recipe.plan, recipe.measure
    asked = _asked(settings)
    for metric, there, key in (
        ("retrieval", measure.retrieval_prompts, "measure.retrieval_prompts"),
        ("benchmark", measure.tasks, "measure.tasks"),
    ):
        if metric in asked and not there:
            raise ConfigError(
                f"the plan needs {metric}, which is not measured",
                found=f"no {key}",
                do=f"set {key}, or plan without it",
            )
    mlps = settings.method == "block_influence" or "mlp" in (settings.components or ())
    if mlps and "mlp" not in measure.components:
        raise ConfigError(
            "the plan needs scores of MLPs, which are not measured",
            found=f"measure.components {', '.join(measure.components)}",
            do="add mlp to measure.components, or plan attention alone",
        )
    if settings.unit == "kv_head" != measure.unit:
        raise ConfigError(
            "the plan needs scores of KV heads, which are not measured",
            found=f"plan.unit {settings.unit}, measure.unit {measure.unit}",
            do="set measure.unit to kv_head, or plan.unit to layer",
        )
    if settings.unit == "kv_head" and measure.head_scores == "scan" and (other := asked - {"kl", "retrieval"}):
        raise ConfigError(
            f"the plan needs {', '.join(sorted(other))} of KV heads, and the scan estimates KL and retrieval alone",
            found="measure.head_scores scan",
            do="set measure.head_scores to exact, or plan by KL and retrieval",
        )
    if settings.unit == "kv_head" and not settings.sinks:
        raise ConfigError(
            "windows on single KV heads are measured with the sink that their layer gains by",
            found="plan.unit kv_head, plan.sinks false",
            do="set plan.unit to layer, or plan.sinks to true: no export holds layers of two kinds of KV heads",
        )
    if settings.window and settings.window not in measure.windows:
        raise ConfigError(
            f"plan.window {settings.window} is not measured",
            found=f"measure.windows {', '.join(map(str, measure.windows))}",
            do="choose one of them, or add it there",
        )
    if settings.costs and not Path(settings.costs).is_file():
        raise ConfigError(f"plan.costs {settings.costs} is not a file", do="docs/reference/plan.md says how to make it")
    if open_engine(recipe.bench.engine).NAME == LLAMA_CPP:
        _check_export(recipe, run, base.model_config)


def _check_export(recipe: Recipe, run: Path, config: PreTrainedConfig) -> None:
    """Raise ConfigError if llama.cpp could not run the plan in the run folder, or the one that will replace it."""
    there = read_plan(run / PLAN) if (run / PLAN).is_file() else None
    if there and _stays(there, recipe, run / SENSITIVITY):
        check_plan(config, there.layers)
    elif recipe.plan.sinks and lacks_sinks(config.model_type):
        raise ConfigError(
            f"llama.cpp runs no {config.model_type} with sinks, which the plan may have",
            found="plan.sinks true, and llama.cpp as the engine of the benchmark",
            do="set plan.sinks=false, or bench.engine to vllm or transformers",
        )


def _stays(plan: PlanFile, recipe: Recipe, source: Path) -> bool:
    """Return whether `run_plan` keeps a plan that is there: one by hand, or made from the same scores and settings."""
    if plan.sensitivity is None:
        return True
    return source.is_file() and plan.sensitivity == file_hash(source) and plan.settings == _settings(recipe)


def run_plan(recipe: Recipe, run: Path) -> PlanFile:
    """Choose the strategies and write `plan.yaml`; return it. A plan made from the same inputs stays, edits included,
    and so does one written by hand.

    Raise ConfigError for unusable sensitivities or settings, and InfeasibleBudget, which names the nearest plan.
    """
    source, target = run / SENSITIVITY, run / PLAN
    sensitivity = _of_the_base(source)
    if target.exists():
        there = read_plan(target)
        if _stays(there, recipe, source):
            log.info("%s is up to date; delete it to choose again", target)
            _warn(there.window, recipe.plan.context_tokens)
            return there
        log.info("%s was made from other inputs: choosing again", target)
        if there.valid_prediction is None:
            log.warning("%s was edited since: a copy stays as %s", target, _keep_edited(target))
    plan = choose(recipe, sensitivity, _measure(recipe, run, sensitivity), made_from=file_hash(source))
    _say(plan, Budget.of(sensitivity, recipe.plan))
    _warn_of_export(recipe, run, plan)
    write_plan(target, plan)
    _explain(plan, sensitivity, recipe.plan)
    return plan


def _keep_edited(plan: Path) -> Path:
    """Copy a plan to `plan.edited.yaml`, or to `plan.edited.2.yaml` and so on after others; return the copy."""
    names = (plan.with_name(f"plan.edited{f'.{number}' if number > 1 else ''}.yaml") for number in count(1))
    kept = next(file for file in names if not file.exists() or filecmp.cmp(file, plan, shallow=False))
    shutil.copy(plan, kept)
    return kept


def choose(
    recipe: Recipe, sensitivity: Sensitivity, measure: Measure | None = None, made_from: str | None = None
) -> PlanFile:
    """Return the plan that the recipe's method chooses, with what is predicted of it.

    `measure`: for the methods that measure whole plans; `made_from`: hash of the file of sensitivities. Raise
    ConfigError, or InfeasibleBudget with the nearest budget that can be met.
    """
    _check_heads(sensitivity, recipe.plan)
    layers = select(sensitivity, recipe.plan, recipe.seed, measure)
    plan = PlanFile(
        model=sensitivity.model,
        method=recipe.plan.method,
        settings=_settings(recipe),
        sensitivity=made_from,
        layers=layers,
    )
    predicted = predict(sensitivity, layers, recipe.plan)
    plan.predicted = predicted.model_copy(update={"plan": plan.hash()})
    _warn(plan.window, recipe.plan.context_tokens)
    return plan


def _warn_of_export(recipe: Recipe, run: Path, plan: PlanFile) -> None:
    """Warn of a plan that the benchmark's engine could not run, if that is llama.cpp."""
    if recipe.model is None or open_engine(recipe.bench.engine).NAME != LLAMA_CPP:
        return
    base = find_model(recipe.model, start_runtime(recipe), run, recipe.trust_remote_code)
    try:
        check_plan(base.model_config, plan.layers)
    except ConfigError as error:
        log.warning("llama.cpp, the engine of the benchmark, could not run this plan: %s", error)


def run_frontier(recipe: Recipe, run: Path) -> Frontier:
    """Write `frontier.json`, the plans of every budget, and return it; `plan.yaml` stays. Raise as `run_plan` does."""
    source = run / SENSITIVITY
    sensitivity = _of_the_base(source)
    _check_heads(sensitivity, recipe.plan)
    points = frontier(sensitivity, recipe.plan, recipe.seed, _measure(recipe, run, sensitivity))
    for window in sorted({point.window for point in points if point.window}):
        _warn(window, recipe.plan.context_tokens)
    axis, made_from = axis_of(recipe.plan), file_hash(source)
    result = Frontier(
        model=sensitivity.model, sensitivity=made_from, settings=_settings(recipe), axis=axis, points=points
    )
    write_json(run / FRONTIER, result)
    if found := knee(points, recipe.plan.metric, axis):
        log.info("the knee of the curve: %s", _at(found, recipe.plan.metric, axis))
    return result


def _measure(recipe: Recipe, run: Path, sensitivity: Sensitivity) -> Measure | None:
    """Return the function that measures plans, None for methods without one."""
    if recipe.plan.method not in MEASURING:
        return None
    settings = recipe.plan
    asked = _asked(settings)
    known = set(TEXT_METRICS) | ({"retrieval"} if recipe.measure.retrieval_prompts else set())
    if asked - known:
        raise ConfigError(
            f"plan.method {settings.method} cannot measure plans by {', '.join(sorted(asked - known))}",
            found=f"measured on whole plans: {', '.join(sorted(known))}",
            do="choose among them (plan.metric), set measure.retrieval_prompts, or plan.method=budget",
        )
    measured = {variant.window for entry in sensitivity.layers for variant in entry.variants}
    candidates = [window for window in windows(sensitivity, settings) if window in measured]
    return open_measured(recipe, run, sensitivity, candidates, start_runtime(recipe))


def _check_heads(sensitivity: Sensitivity, settings: Plan) -> None:
    """Raise ConfigError if the plan is to be made by KV heads and their scores are missing, or lack a metric."""
    if settings.unit != "kv_head":
        return
    can_slide = [entry for entry in sensitivity.layers if any(variant.window for variant in entry.variants)]
    measured = {metric for entry in can_slide for variant in entry.heads for metric in variant.scores}
    if any(not entry.heads for entry in can_slide):
        raise ConfigError(
            "the plan needs scores of KV heads, which the sensitivities lack",
            found=f"measured by {sensitivity.settings.get('head_scores') or 'layer'}",
            do="measure with measure.unit kv_head in another --run folder, or set plan.unit to layer",
        )
    if can_slide and (missing := _asked(settings) - measured):
        raise ConfigError(
            f"the sensitivities of KV heads have no {', '.join(sorted(missing))}",
            found=f"{', '.join(sorted(measured))}, by {sensitivity.settings.get('head_scores')}",
            do="measure with measure.head_scores exact, or plan by what there is",
        )


def _asked(settings: Plan) -> set[str]:
    """Return the metrics that a choice depends on."""
    return {settings.metric, *metric_limits(settings), *(["retrieval"] if settings.retrieval_weight else [])}


def _of_the_base(source: Path) -> Sensitivity:
    """Return the file's sensitivities; raise ConfigError if they are of a changed model: they predict no plan."""
    found = read_sensitivity(source)
    if found.settings.get("plan"):
        raise ConfigError(
            f"{source} was measured on a changed model (measure.plan): plans are made from the base's sensitivities",
            found=f"plan {found.settings['plan']}",
            do="measure without measure.plan in another --run folder; compare the two with measure --compare",
        )
    return found


def _settings(recipe: Recipe) -> dict[str, Any]:
    """Return what the choice depends on, apart from the sensitivities."""
    # Written only where they change something: an edited plan stays as it is.
    unset = {name for name in LATER if getattr(recipe.plan, name) == Plan.model_fields[name].default}
    settings = recipe.plan.model_dump(mode="json", exclude=unset)
    if recipe.plan.method == "random":
        settings["seed"] = recipe.seed
    if recipe.plan.costs and Path(recipe.plan.costs).is_file():
        settings["costs"] = file_hash(Path(recipe.plan.costs))
    return settings


def _say(plan: PlanFile, budget: Budget) -> None:
    """Log the serving flags for vLLM on this machine, and their effects, if it serves the model."""
    if what_vllm_lacks(plan.model.model_type, runs_on_cpu):
        return
    rates = budget.rates

    def prefill_ms(size: int) -> float:
        assert rates
        return rates.milliseconds(prefill_work(plan.model, plan.layers, budget.context_tokens, size))

    found = plan_serving(plan, cache_defaults(), prefill_ms if rates else None)
    if found and found.flags:
        log.info("with %s %s", " ".join(found.flags), found.gain)


def _explain(plan: PlanFile, sensitivity: Sensitivity, settings: Plan) -> None:
    """Log what the prediction means; warn if it is beyond what healing has been seen to repair."""
    loss = plan.predicted.quality_loss.get("kl") if plan.predicted else None
    if loss is None:
        return
    log.info(
        "predicted KL %.3f nats per token, a sum of single scores: the plan itself loses up to twice as much before "
        "healing",
        loss,
    )
    if loss <= REPAIRED_KL:
        return
    axis = axis_of(settings)
    advice = f"raise plan.{axis}"
    points = [] if settings.method in MEASURING else frontier(sensitivity, settings)
    if found := next((each for each in points if each.predicted.quality_loss.get("kl", 0.0) <= REPAIRED_KL), None):
        advice += f" (the cheapest plan within it: {_at(found, 'kl', axis)})"
    log.warning(
        "a predicted KL of %.2f is beyond what healing has been seen to repair (plans of 0.4 measured, 0.3 predicted; "
        "docs/results/healing.md): evaluate the healed model before you serve it, or %s",
        loss,
        advice,
    )


def _at(point: FrontierPoint, metric: str, axis: Axis) -> str:
    """Return a point of the frontier as text."""
    found = point.predicted
    loss = found.quality_loss.get(metric, 0.0)
    return f"{getattr(found, axis):.0%} of the {AXES[axis]}, predicted {metric} {loss:.3f}"


def _warn(window: int | None, context_tokens: int) -> None:
    """Warn of a window that saves nothing."""
    if window and window >= context_tokens:
        log.warning(
            "a window of %d holds all of the %d tokens of context that this plan is for: its sliding layers gain "
            "nothing over full ones; plan with a shorter window, or set plan.context_tokens to the length you serve",
            window,
            context_tokens,
        )
