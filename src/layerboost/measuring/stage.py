"""measure: the sensitivity of each layer to each replacement → sensitivity.json."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from layerboost.errors import ConfigError
from layerboost.measuring.scan import scanned
from layerboost.measuring.sweep import candidates, sweep
from layerboost.model.base import Base, open_base
from layerboost.model.checkpoint import check_same_model
from layerboost.model.files import check_gguf
from layerboost.model.sinks import calibrate_sinks
from layerboost.model.stream import LayerStream
from layerboost.model.surgery import check_linear, check_mlps, check_plan, check_windows
from layerboost.model.thinning import thin_mlps, widths_of
from layerboost.probes.calibration import filler_tokens, load_prompts
from layerboost.probes.probe import Probe, TextProbe
from layerboost.probes.samples import write_samples
from layerboost.recipe import Recipe, model_of
from layerboost.retrieval import Prompts
from layerboost.runtime import Runtime, is_main_process, log, main_process_first, start_runtime
from layerboost.schemas.artifact import fingerprint, read_json, write_json
from layerboost.schemas.model import ModelInfo
from layerboost.schemas.plan import LayerPlan, PlanFile, read_plan
from layerboost.schemas.run import SENSITIVITY
from layerboost.schemas.sensitivity import LayerSensitivity, Sensitivity
from layerboost.strategies import LINEAR, MEASURED, SLIDING
from layerboost.tasks.checks import check_items
from layerboost.tasks.lm_eval import BenchTask
from layerboost.tasks.probe import TaskProbe, load_choices
from layerboost.text import Tokens, check_samples
from layerboost.traffic import Traffic, load_calibration, load_mlp_fit


@dataclass(frozen=True)
class Inputs:
    """The inputs of a measurement: text or the user's prompts, retrieval prompts, tasks."""

    text: Tokens | Traffic
    prompts: list[Prompts]
    tasks: list[BenchTask]


def validate_measure(recipe: Recipe) -> None:
    """Raise ConfigError for settings that can only give meaningless scores."""
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
    if "attention" not in recipe.measure.components:
        raise ConfigError(
            "attention is always measured",
            found=f"measure.components {', '.join(recipe.measure.components) or 'empty'}",
            do="set it to [attention], or to [attention, mlp]",
        )
    filler = filler_tokens(recipe)
    # Thinned MLPs are fitted on as much text again.
    parts = 2 if "mlp" in recipe.measure.components else 1
    own_text = 0 if recipe.measure.traffic else parts * recipe.measure.tokens
    check_samples(recipe.text, recipe.measure.skip_tokens + max(filler, own_text), "calibration")
    if recipe.measure.head_scores == "scan" and (recipe.measure.traffic or recipe.measure.plan):
        raise ConfigError(
            "the scan estimates scores of the base on text alone",
            found="measure.head_scores scan with measure.traffic or measure.plan",
            do="set measure.head_scores to exact, or leave the other out",
        )
    if recipe.measure.tokens < 2 * length:
        raise ConfigError(
            "measure.tokens must hold two sequences, or there is no standard error",
            found=f"{recipe.measure.tokens} tokens, sequences of {length}",
        )


def check(recipe: Recipe, run: Path, base: Base) -> None:
    """Raise ConfigError for what `run_measure` cannot use, apart from text that the model has yet to write."""
    validate_measure(recipe)
    if base.gguf:
        check_gguf(base.folder / base.gguf)
    check_config(recipe, base.config)
    context_tokens = base.config.max_position_embeddings
    if "self" not in recipe.text.sources:
        load_inputs(recipe, base.tokenizer, run, context_tokens)
        if "mlp" in recipe.measure.components:
            load_mlp_fit(recipe, base.tokenizer, run)
        return
    load_tasks(recipe, base.tokenizer, context_tokens)
    if recipe.measure.traffic:
        load_calibration(recipe, base.tokenizer, recipe.measure.tokens, run)


def run_measure(recipe: Recipe, run: Path) -> Sensitivity:
    """Measure every layer that RUN/sensitivity.json lacks; return all. Raise ConfigError as `measure` does."""
    validate_measure(recipe)
    runtime = start_runtime(recipe)
    with main_process_first():  # it unpacks and samples
        base = open_base(recipe, run, runtime)
        check_config(recipe, base.config)
        write_samples(recipe, run, base)
    return measure(recipe, base, run)


def measure(recipe: Recipe, base: Base, run: Path | None = None) -> Sensitivity:
    """Return the sensitivity of every layer; with `run`, go on with its sensitivity.json and save it after each layer.

    Raise ConfigError, also if the file there was made from another model, text, plan, tasks or settings.
    """
    info, runtime = base.info, base.runtime
    plan = _plan(recipe, base.config, info)
    inputs = load_inputs(recipe, base.tokenizer, run, info.max_context_tokens)
    head_group, mlp_widths = _head_group(recipe, base.config), _mlp_widths(recipe, base.config)
    thins = bool(mlp_widths) or any(entry.mlp_width for entry in (plan.layers if plan else ()))
    fit = load_mlp_fit(recipe, base.tokenizer, run) if thins else None
    settings = _settings(recipe, inputs, plan, runtime, head_group)
    settings |= {"mlp_widths": mlp_widths or None, "mlp_fit": fit.fingerprint if fit else None}
    found = _resume(run / SENSITIVITY, info, inputs.text, settings) if run else None
    scans = head_group is not None and recipe.measure.head_scores == "scan"
    if run and found is not None and found.complete and (not scans or any(entry.heads for entry in found.layers)):
        log.info("%s is complete", run / SENSITIVITY)
        return found
    model = base.load()
    size, device = recipe.measure.batch_sequences, runtime.device
    batches = inputs.text.batches(size, device)
    sinks = calibrate_sinks(model, batches, info.attention_layers, recipe.measure.windows)
    done = found.layers if found else []
    wanted = {(layer, width) for layer in range(len(done), info.layers) for width in mlp_widths}
    wanted |= {(entry.layer, entry.mlp_width) for entry in (plan.layers if plan else ()) if entry.mlp_width}
    stream = LayerStream(model, sinks, thin_mlps(model, fit.batches(size, device) if fit else [], sorted(wanted)))
    # On a plan, most variants change layers above them too.
    text = TextProbe(stream, batches, inputs.prompts, () if plan else recipe.measure.windows)
    probes: list[Probe] = [text]
    if inputs.tasks:
        batch_tokens = recipe.measure.batch_sequences * recipe.text.sequence_tokens
        probes.append(tasks := TaskProbe(stream, base.tokenizer, inputs.tasks, batch_tokens))

    def save(layers: list[LayerSensitivity]) -> None:
        nonlocal found
        found = Sensitivity(
            model=info,
            text=inputs.text.fingerprint,
            settings=settings,
            sequences=len(inputs.text.ids),
            tokens=inputs.text.tokens,
            base_nll=text.base_nll(),
            base_retrieval=text.base_retrieval(),
            base_tasks=tasks.base_tasks() if inputs.tasks else None,
            layers=layers,
        )
        if run and is_main_process():
            write_json(run / SENSITIVITY, found)

    options = candidates(base.config, recipe.measure.windows, recipe.measure.strategies, mlp_widths)
    sweep(probes, options, done, save, plan.layers if plan else None, None if scans else head_group)
    assert found is not None
    if scans and head_group:
        tokens = [batch for batch in batches if isinstance(batch, torch.Tensor)]
        drawn = recipe.measure.scan_draws, recipe.seed
        save(scanned(model, tokens, inputs.prompts, found.layers, sinks, head_group, *drawn))
    return found


def load_inputs(recipe: Recipe, tokenizer: Any, run: Path | None, context_tokens: int) -> Inputs:
    """Return all inputs, read and checked for a model with this context; raise ConfigError for unusable ones."""
    inputs = Inputs(
        load_calibration(recipe, tokenizer, recipe.measure.tokens, run),
        load_prompts(recipe, tokenizer, run),
        load_tasks(recipe, tokenizer, context_tokens),
    )
    _check_context(recipe, inputs, context_tokens)
    return inputs


def load_tasks(recipe: Recipe, tokenizer: Any, context_tokens: int) -> list[BenchTask]:
    """Return the tasks to measure on; raise ConfigError if their items cannot be scored."""
    settings = recipe.measure
    tasks = load_choices(settings.tasks, recipe.evaluate.bench_data, settings.task_items)
    check_items(tasks, tokenizer, context_tokens)
    return tasks


def check_config(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Raise ConfigError for replacements that this model cannot have, and for text that it cannot write itself."""
    check_windows(config, recipe.measure.windows)
    length, context = recipe.text.sequence_tokens, config.max_position_embeddings
    if "self" in recipe.text.sources and length > context:
        raise ConfigError(
            "the model's own samples would be longer than its context",
            found=f"{length:,} > {context:,} tokens",
            do="lower text.sequence_tokens",
        )
    if SLIDING not in recipe.measure.strategies:
        raise ConfigError(
            "measure.strategies lacks sliding, without whose scores there is no plan",
            found=", ".join(recipe.measure.strategies),
            do="add sliding",
        )
    if LINEAR in recipe.measure.strategies:
        check_linear(config)
    _head_group(recipe, config)
    _mlp_widths(recipe, config)


def _check_context(recipe: Recipe, inputs: Inputs, context_tokens: int) -> None:
    text, window = inputs.text, max(recipe.measure.windows)
    if isinstance(text, Traffic) and max(text.lengths) <= window:
        raise ConfigError(
            f"a window of {window} cannot be measured on measure.traffic",
            found=f"its longest row has {max(text.lengths)} tokens (at most text.sequence_tokens): none is dropped",
            do="choose shorter windows (measure.windows); such a window would gain nothing there either",
        )
    longest = max(text.ids.shape[1], *(batch.ids.shape[1] for batch in inputs.prompts), window)
    if longest > context_tokens:
        raise ConfigError(
            "sequences to measure on are longer than the model's context",
            found=f"{longest} > {context_tokens}",
            do="lower text.sequence_tokens, measure.windows or measure.retrieval_tokens",
        )


def _settings(
    recipe: Recipe, inputs: Inputs, plan: PlanFile | None, runtime: Runtime, head_group: int | None
) -> dict[str, Any]:
    """Return what the scores depend on, apart from model and text."""
    how: str = recipe.measure.head_scores
    if how == "scan":
        answers = ", and of answers" if recipe.measure.retrieval_prompts else ""
        how = f"scan of {recipe.measure.scan_draws} draws, seed {recipe.seed}{answers}"
    rows = [row for batch in inputs.prompts for row in batch.ids.tolist()]
    return {
        "dtype": runtime.dtype_name,
        "windows": list(recipe.measure.windows),
        "strategies": list(recipe.measure.strategies) if recipe.measure.strategies != MEASURED else None,
        "sequence_tokens": recipe.text.sequence_tokens,
        "retrieval": fingerprint(rows) if rows else None,
        "tasks": [task.name for task in inputs.tasks] or None,
        "items": fingerprint([task.data for task in inputs.tasks]) if inputs.tasks else None,
        "plan": plan.hash() if plan else None,
        "kv_head_group": head_group,
        "head_scores": how if head_group else None,
    }


def _plan(recipe: Recipe, config: Any, info: ModelInfo) -> PlanFile | None:
    """Return the plan whose other layers stay changed while one is measured."""
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


def _mlp_widths(recipe: Recipe, config: PreTrainedConfig) -> list[int]:
    """Return the widths of MLPs to measure; none if MLPs are not. Raise ConfigError if the model has no such MLPs."""
    if "mlp" not in recipe.measure.components:
        return []
    widths = widths_of(config, recipe.measure.mlp_widths)
    check_mlps(config, [LayerPlan(layer=0, attention="full", mlp="thin", mlp_width=width) for width in widths])
    return widths


def _head_group(recipe: Recipe, config: PreTrainedConfig) -> int | None:
    """Return how many KV heads are measured together; None: layers alone. Raise ConfigError if they do not divide."""
    if recipe.measure.unit == "layer":
        return None
    heads, group = config.num_key_value_heads, recipe.measure.head_group
    if heads % group or heads == group:
        sizes = ", ".join(str(size) for size in range(1, heads) if not heads % size)
        raise ConfigError(
            "the KV heads of a layer cannot be split into groups of measure.head_group",
            found=f"groups of {group}, {heads} KV heads per layer",
            do=f"choose one of {sizes}" if sizes else "set measure.unit and plan.unit to layer",
        )
    return group


def _resume(file: Path, info: ModelInfo, text: Tokens | Traffic, settings: dict[str, Any]) -> Sensitivity | None:
    """Return what an earlier run measured; raise ConfigError if model, text or settings were different."""
    if not file.exists():
        return None
    found = read_json(file, Sensitivity, "layerboost measure")
    here = {"model": info.fingerprint, "text": text.fingerprint, **settings}
    there = {"model": found.model.fingerprint, "text": found.text, **found.settings}
    changed = [f"{key}: {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
    if changed:
        raise ConfigError(
            f"{file} was made from something else",
            found="; ".join(changed),
            do=f"use another --run folder, or delete {file}",
        )
    return found
