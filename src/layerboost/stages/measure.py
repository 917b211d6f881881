"""measure: the sensitivity of each layer to each replacement → sensitivity.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from layerboost.artifacts import SENSITIVITY, LayerSensitivity, ModelInfo, Score, Sensitivity, read_json, write_json
from layerboost.errors import ConfigError
from layerboost.model.checkpoint import load_config, load_model, load_tokenizer, model_info, open_base, write_samples
from layerboost.model.surgery import check_windows
from layerboost.recipe import Recipe, model_of
from layerboost.runtime import log, start_runtime
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
    check_samples(recipe.text, recipe.measure.tokens)
    if recipe.measure.tokens < 2 * length:
        raise ConfigError(
            "measure.tokens must hold two sequences, or there is no standard error",
            found=f"{recipe.measure.tokens} tokens, sequences of {length}",
        )


def run_measure(recipe: Recipe, run: Path) -> Sensitivity:
    """Measure every layer that the run folder does not hold yet; the file is saved after each layer.

    Raises ConfigError, also when the file there was made from another model, text or settings.
    """
    validate_measure(recipe)
    runtime = start_runtime(recipe)
    source = open_base(recipe, run, runtime)
    config, tokenizer = load_config(source, recipe.trust_remote_code), load_tokenizer(source, recipe.trust_remote_code)
    check_windows(config, recipe.measure.windows)
    write_samples(recipe, run, source, tokenizer, runtime)
    tokens = load_tokens(recipe.text, tokenizer, "calibration", recipe.measure.tokens, run=run)
    info = model_info(source, config, runtime.dtype)
    if max(recipe.text.sequence_tokens, *recipe.measure.windows) > info.max_context_tokens:
        raise ConfigError(
            "text.sequence_tokens is longer than the model's context",
            found=f"{recipe.text.sequence_tokens} > {info.max_context_tokens}",
        )
    settings = {"windows": list(recipe.measure.windows), "sequence_tokens": recipe.text.sequence_tokens}
    found = _resume(run / SENSITIVITY, info, tokens, settings)
    if found is not None and found.complete:
        log.info("%s is complete", run / SENSITIVITY)
        return found

    def save(base_nll: Score, layers: list[LayerSensitivity]) -> None:
        nonlocal found
        found = Sensitivity(
            model=info,
            text=tokens.fingerprint,
            settings=settings,
            sequences=len(tokens.ids),
            tokens=tokens.ids.numel(),
            base_nll=base_nll,
            layers=layers,
        )
        write_json(run / SENSITIVITY, found)

    model = load_model(source, runtime, recipe.trust_remote_code)
    batches = [batch.to(runtime.device) for batch in tokens.batches(recipe.measure.batch_sequences)]
    sweep(model, batches, recipe.measure.windows, found.layers if found else [], save)
    assert found is not None
    return found


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
