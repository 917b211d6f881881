"""convert: the plan applied to the base's weights → converted/, a Hugging Face checkpoint."""

from __future__ import annotations

from pathlib import Path

from layerboost.artifacts import CONVERTED, PLAN, read_plan
from layerboost.model.checkpoint import (
    check_same_model,
    load_config,
    load_model,
    load_tokenizer,
    model_info,
    open_base,
    plan_in,
    save_boosted,
    write_samples,
)
from layerboost.model.surgery import apply_plan, check_plan
from layerboost.recipe import Recipe, recipe_yaml
from layerboost.runtime import log, start_runtime
from layerboost.sensitivity.sinks import calibrate_sinks
from layerboost.text import load_tokens


def run_convert(recipe: Recipe, run: Path) -> Path:
    """Write RUN/converted; one made from the same plan stays. Raises ConfigError before any weight is changed.

    Sink logits start from one calibration pass of the base over the calibration text.
    """
    plan = read_plan(run / PLAN)
    target = run / CONVERTED
    runtime = start_runtime(recipe)
    source = open_base(recipe, run, runtime)
    config = load_config(source, recipe.trust_remote_code)
    check_plan(config, plan.layers)
    check_same_model(plan, model_info(source, config, runtime.dtype), run / PLAN)
    if (there := plan_in(target)) and there.hash() == plan.hash():
        log.info("%s is up to date", target)
        return target
    model = load_model(source, runtime, recipe.trust_remote_code)
    tokenizer = load_tokenizer(source, recipe.trust_remote_code)
    sinks = {}
    with_sink = [entry.layer for entry in plan.layers if entry.sink]
    if with_sink and plan.window:
        write_samples(recipe, run, source, tokenizer, runtime)
        tokens = load_tokens(recipe.text, tokenizer, "calibration", recipe.measure.tokens, run=run)
        batches = [batch.to(runtime.device) for batch in tokens.batches(recipe.measure.batch_sequences)]
        found = calibrate_sinks(model, batches, with_sink, [plan.window])
        sinks = {layer: found[layer, plan.window] for layer in with_sink}
    apply_plan(model, plan.layers, sinks)
    save_boosted(model, tokenizer, plan, target, recipe_yaml=recipe_yaml(recipe))
    return target
