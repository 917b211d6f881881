"""convert: apply the plan to the base's weights → converted/, a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from layerboost.model.base import Base, find_model, open_base
from layerboost.model.card import origin_of
from layerboost.model.checkpoint import check_same_model, plan_in, save_boosted
from layerboost.model.integrity import is_intact
from layerboost.model.sinks import calibrate_sinks
from layerboost.model.surgery import apply_plan, check_plan, windows_alone, without_states
from layerboost.model.thinning import thin_mlps
from layerboost.model.tokenizer import PROCESSORS, lacks_processor
from layerboost.probes.samples import write_samples
from layerboost.recipe import Recipe, recipe_yaml
from layerboost.runtime import log, start_runtime
from layerboost.schemas.plan import LayerPlan, PlanFile, read_plan
from layerboost.schemas.run import CONVERTED, PLAN
from layerboost.traffic import load_calibration, load_mlp_fit


def check(recipe: Recipe, run: Path, base: Base) -> None:
    """Raise ConfigError if there is a plan already and the base cannot take it."""
    if (run / PLAN).is_file():
        check_plan(base.config, read_plan(run / PLAN).layers)


def run_convert(recipe: Recipe, run: Path) -> Path:
    """Write RUN/converted, unless one of the same plan exists; return the directory.

    Sink logits start from one pass of the base over the calibration text, and thinned MLPs are fitted on it as they
    were to be measured. Raise ConfigError before changing any weight.
    """
    plan, target = read_plan(run / PLAN), run / CONVERTED
    base = open_base(recipe, run, start_runtime(recipe))
    check_plan(base.config, plan.layers)
    check_same_model(plan, base.info, run / PLAN)
    if lacks_processor(base.folder, base.model_config.model_type):
        log.warning(
            "%s has no processor (none of %s), which prompts with images and vLLM need: copy its files, also to %s",
            *(base.name, ", ".join(PROCESSORS), target),
        )
    if (
        (there := plan_in(target))
        and there.hash() == plan.hash()
        and is_intact(target)
        and find_model(str(target), base.runtime).config.dtype == base.runtime.dtype
    ):
        log.info("%s is up to date", target)
        return target
    if any(map(needs_text, plan.layers)):
        write_samples(recipe, run, base)
    model = boost(recipe, base, plan, run)
    origin = origin_of(base.folder, base.name, recipe.card)
    save_boosted(model, base.tokenizer, plan, target, recipe_yaml=recipe_yaml(recipe), origin=origin)
    return target


def write_windows_alone(model: Base, target: Path, recipe: Recipe) -> None:
    """Write a boosted checkpoint with sliding layers in place of its linear ones."""
    plan = read_plan(model.folder / PLAN)
    plan = plan.model_copy(update={"layers": windows_alone(plan.layers), "predicted": None})
    save_boosted(
        without_states(model.load(), plan.layers),
        *(model.tokenizer, plan, target),
        recipe_yaml=recipe_yaml(recipe),
        healing=f"Made from {model.name} by leaving out the states of its linear attention.",
    )


def boost(recipe: Recipe, base: Base, plan: PlanFile, run: Path | None = None) -> PreTrainedModel:
    """Return the base with a plan applied; sinks and thinned MLPs are fitted on the calibration text. Raise
    ConfigError."""
    model, sinks, thinned = base.load(), {}, {}
    size, device = recipe.measure.batch_sequences, base.runtime.device
    with_sink = [entry.layer for entry in plan.layers if entry.sink]
    if with_sink and plan.window:
        calibration = load_calibration(recipe, base.tokenizer, recipe.measure.tokens, run)
        fitted = calibrate_sinks(model, calibration.batches(size, device), with_sink, [plan.window])
        sinks = {entry.layer: fitted(entry) for entry in plan.layers if entry.sink}
    if wanted := [(entry.layer, entry.mlp_width) for entry in plan.layers if entry.mlp_width]:
        batches = load_mlp_fit(recipe, base.tokenizer, run).batches(size, device)
        thinned = {layer: found for (layer, _), found in thin_mlps(model, batches, wanted).items()}
    return apply_plan(model, plan.layers, sinks, thinned)


def needs_text(entry: LayerPlan) -> bool:
    """Return whether a part of the layer is fitted on the calibration text."""
    return entry.sink or entry.mlp_width is not None
