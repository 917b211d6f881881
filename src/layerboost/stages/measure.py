"""measure: the sensitivity of each layer to each replacement → sensitivity.json."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from layerboost.artifacts import (
    SENSITIVITY,
    LayerSensitivity,
    ModelInfo,
    PlanFile,
    Sensitivity,
    fingerprint,
    read_json,
    read_plan,
    write_json,
)
from layerboost.errors import ConfigError
from layerboost.model.checkpoint import (
    check_same_model,
    load_config,
    load_model,
    load_tokenizer,
    model_info,
    open_base,
    write_samples,
)
from layerboost.model.stream import LayerStream
from layerboost.model.surgery import check_plan, check_windows
from layerboost.recipe import Recipe, model_of
from layerboost.runtime import log, start_runtime
from layerboost.sensitivity.calibration import load_prompts
from layerboost.sensitivity.probe import TextProbe
from layerboost.sensitivity.sinks import calibrate_sinks
from layerboost.sensitivity.sweep import sweep
from layerboost.text import Tokens, check_samples, load_tokens


def validate_measure(recipe: Recipe) -> None:
    """Raise ConfigError for settings that could only give meaningless scores."""
    model_of(recipe)
    length = recipe.text.sequence_tokens
    for window in recipe.measure.windows:
        if not 0 < window < length:
            raise ConfigError(
                f"a window of {window} cannot be measured on sequences of {length} tokens",
                found="a window must be at least 1, and one that never drops a token scores 0 by construction",
                do="choose shorter windows (measure.windows) or longer sequences (text.sequence_tokens)",
            )
    if recipe.measure.retrieval_prompts and max(recipe.measure.windows) >= recipe.measure.retrieval_tokens:
        raise ConfigError(
            "retrieval prompts must be longer than every window",
            found=f"{recipe.measure.retrieval_tokens} tokens, window {max(recipe.measure.windows)}",
            do="raise measure.retrieval_tokens, or set measure.retrieval_prompts to 0",
        )
    check_samples(recipe.text, recipe.measure.tokens)
    if recipe.measure.tokens < 2 * length:
        raise ConfigError(
            "measure.tokens must hold two sequences, or there is no standard error",
            found=f"{recipe.measure.tokens} tokens, sequences of {length}",
        )


def run_measure(recipe: Recipe, run: Path) -> Sensitivity:
    """Measure every layer that the run folder does not hold yet; the file is saved after each layer.

    Raises ConfigError, also when the file there was made from another model, text, plan or settings.
    """
    validate_measure(recipe)
    runtime = start_runtime(recipe)
    source = open_base(recipe, run, runtime)
    config, tokenizer = load_config(source, recipe.trust_remote_code), load_tokenizer(source, recipe.trust_remote_code)
    check_windows(config, recipe.measure.windows)
    write_samples(recipe, run, source, tokenizer, runtime)
    info = model_info(source, config, runtime.dtype)
    plan = _plan(recipe, config, info)
    tokens = load_tokens(recipe.text, tokenizer, "calibration", recipe.measure.tokens, run=run)
    prompts = load_prompts(recipe, tokenizer, run)
    longest = max(recipe.text.sequence_tokens, *recipe.measure.windows, *(batch.ids.shape[1] for batch in prompts))
    if longest > info.max_context_tokens:
        raise ConfigError(
            "sequences to measure on are longer than the model's context",
            found=f"{longest} > {info.max_context_tokens}",
            do="lower text.sequence_tokens, measure.windows or measure.retrieval_tokens",
        )
    settings: dict[str, Any] = {
        "windows": list(recipe.measure.windows),
        "sequence_tokens": recipe.text.sequence_tokens,
        "retrieval": fingerprint([batch.ids.tolist() for batch in prompts]) if prompts else None,
        "plan": plan.hash() if plan else None,
    }
    found = _resume(run / SENSITIVITY, info, tokens, settings)
    if found is not None and found.complete:
        log.info("%s is complete", run / SENSITIVITY)
        return found
    model = load_model(source, runtime, recipe.trust_remote_code)
    batches = [batch.to(runtime.device) for batch in tokens.batches(recipe.measure.batch_sequences)]
    sinks = calibrate_sinks(model, batches, range(info.layers), recipe.measure.windows)
    probe = TextProbe(LayerStream(model, sinks), batches, prompts)

    def save(layers: list[LayerSensitivity]) -> None:
        nonlocal found
        found = Sensitivity(
            model=info,
            text=tokens.fingerprint,
            settings=settings,
            sequences=len(tokens.ids),
            tokens=tokens.ids.numel(),
            base_nll=probe.base_nll(),
            base_retrieval=probe.base_retrieval(),
            layers=layers,
        )
        if int(os.environ.get("RANK", "0")) == 0:
            write_json(run / SENSITIVITY, found)

    sweep([probe], recipe.measure.windows, found.layers if found else [], save, plan.layers if plan else None)
    assert found is not None
    return found


def _plan(recipe: Recipe, config: Any, info: ModelInfo) -> PlanFile | None:
    """The plan whose other layers stay changed while one is measured."""
    if recipe.measure.plan is None:
        return None
    file = Path(recipe.measure.plan).expanduser()
    plan = read_plan(file)
    check_plan(config, plan.layers)
    check_same_model(plan, info, file)
    if plan.window and plan.window not in recipe.measure.windows:
        raise ConfigError(
            "the plan's window is not among those to measure",
            found=f"window {plan.window}, measure.windows {', '.join(map(str, recipe.measure.windows))}",
            do="add it to measure.windows",
        )
    return plan


def _resume(file: Path, info: ModelInfo, tokens: Tokens, settings: dict[str, Any]) -> Sensitivity | None:
    """What an earlier run left, if it is of the same model, text and settings; raises ConfigError if it is not."""
    if not file.exists():
        return None
    found = read_json(file, Sensitivity, "layerboost measure")
    here = {"model": info.fingerprint, "text": tokens.fingerprint, **settings}
    there = {"model": found.model.fingerprint, "text": found.text, **found.settings}
    changed = [f"{key}: {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
    if changed:
        raise ConfigError(
            f"{file} was made from something else",
            found="; ".join(changed),
            do=f"use another --run folder, or delete {file}",
        )
    return found
