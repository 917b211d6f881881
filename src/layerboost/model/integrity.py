"""Whether a model directory is complete and its config, plan and weights agree, and whether it can be MODEL."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from layerboost.errors import ConfigError, first_line
from layerboost.model.card import card_data
from layerboost.model.families import FAMILIES, WRAPPERS
from layerboost.model.files import (
    PICKLED,
    SINGLE,
    Tensors,
    check_finite_weights,
    headers,
    plain_config,
    read_weights,
    some,
    weight_files,
)
from layerboost.model.modeling import architecture_of, auto_class, base_layer_types, decoder_layers, is_boosted
from layerboost.model.surgery import experts_per_token, packed_parameters, recorded_plan
from layerboost.runtime import log
from layerboost.schemas.plan import PlanFile, read_plan
from layerboost.schemas.run import PLAN
from layerboost.strategies import WINDOW

# The methods that Transformers undoes on a CPU, and the package that it needs for that.
DEQUANTISED: dict[Any, str] = {"fp8": "", "compressed-tensors": "compressed_tensors"}
# Weights of another type are quantised.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_checkpoint(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return the plain config of a model directory, stock or boosted; only the headers of weight files are read.

    Raise ConfigError if files are missing or damaged, if Transformers could not load the weights or would silently
    replace, ignore or add some and, in a boosted checkpoint, if plan, config and weights are of different models.
    """
    plain = plain_config(folder)
    if plain.get("transformers_weights"):
        raise ConfigError(
            f"{folder / 'config.json'} has Transformers load other weights than vLLM does",
            found=f"transformers_weights {plain['transformers_weights']}",
            do=f"name the file {SINGLE} and remove the setting",
        )
    tensors, text = headers(folder), plain.get("text_config") or plain
    if is_boosted(plain.get("architectures")):
        config = read_config(folder, str(folder))
        recorded = _recorded(folder, config.get_text_config())
        if (folder / PLAN).is_file():
            _check_plan(folder, recorded, read_plan(folder / PLAN))
        _check_tensors(folder, config, tensors)
    elif "attention_sink_layers" in text:
        name = architecture_of(plain["model_type"])
        raise ConfigError(
            f"{folder / 'config.json'} is of a boosted checkpoint and no longer names {name}",
            found=f"architectures {plain.get('architectures')}",
            do="make the checkpoint again; its own files are not for editing",
        )
    elif plain["model_type"] in {*FAMILIES, *WRAPPERS}:
        config = read_config(folder, str(folder), trust_remote_code=trust_remote_code)
        _check_window(folder, text, config.get_text_config())
        _check_tensors(folder, config, tensors, trust_remote_code)
    return plain


def check_base(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> None:
    """Raise ConfigError if a directory cannot be MODEL, loaded in `dtype`. Reads every weight.

    In addition to `check_checkpoint`, this refuses boosted models, weights that are quantised in a way that cannot be
    undone, that are not finite, tied weights that differ, and weights in two formats that differ.
    """
    plain = plain_config(folder)
    _check_quantisation(folder, plain)
    if is_boosted(plain.get("architectures")):
        raise ConfigError(f"{folder} is a boosted checkpoint", do="give the base that it was made from as MODEL")
    check_checkpoint(folder, trust_remote_code)
    check_weights(folder, dtype, trust_remote_code)


def check_weights(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> None:
    """Read every weight; raise ConfigError if one is not finite, or if tied ones or a second format differ."""
    weights = read_weights(folder)
    check_finite_weights(str(folder), weights, dtype)
    config = read_config(folder, str(folder), trust_remote_code=trust_remote_code)
    model = _on_meta(folder, config, trust_remote_code)
    named = dict(zip(_renamed(model, weights), weights.values(), strict=True))
    for name, other in model.all_tied_weights_keys.items():
        if {name, other} <= named.keys() and not torch.equal(named[name], named[other]):
            raise ConfigError(
                f"weights and configuration of {folder} disagree",
                found=f"{name} and {other} differ, by the configuration (tie_word_embeddings) they are one",
                do=f"set tie_word_embeddings to false in config.json, or remove {name}, whichever the model means",
            )
    _check_formats(folder, weights)


def is_intact(folder: Path) -> bool:
    """Return whether `check_checkpoint` accepts a directory; log the error if it does not."""
    try:
        check_checkpoint(folder)
    except ConfigError as error:
        log.warning("%s", error)
        return False
    return True


def read_config(folder: Path, name: str, **kwargs: Any) -> PreTrainedConfig:
    """Return Transformers' config of a directory; raise ConfigError with the first line of any error.

    A model type that Transformers lacks is refused before its error asks for remote code, which would not help.
    """
    plain = {} if "gguf_file" in kwargs else plain_config(folder)
    inside = plain.get("text_config") if plain.get("model_type") in WRAPPERS else None
    for part in (plain, inside):
        if part and (kind := str(part["model_type"])) not in CONFIG_MAPPING:
            raise ConfigError(
                "this model family is not supported"
                if part is plain
                else f"{plain['model_type']} is not supported with this language model",
                found=f"{kind} (not in Transformers {transformers.__version__})",
                do="use a model of a family in `layerboost ls families`",
            )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, **kwargs)
    except Exception as error:  # a config edited by hand fails in many ways
        do = "copy or download it again" if "gguf_file" in kwargs else ""
        raise ConfigError(f"cannot read the configuration of {name}", found=first_line(error), do=do) from None
    if config.model_type in WRAPPERS and config.tie_word_embeddings:
        named = {"tie_word_embeddings"} & {*plain, *(plain.get("text_config") or {})}
        # Transformers' default for a wrapper, as of Mistral Small, whose head is its own: it then ties nothing.
        if not named and any(each.endswith("lm_head.weight") for each in headers(folder)):
            config.tie_word_embeddings = False
    return config


def _check_window(folder: Path, plain: dict[str, Any], config: PreTrainedConfig) -> None:
    """Raise ConfigError if Transformers and vLLM would not give the layers of a stock model the same window."""
    window = plain.get("sliding_window") if plain.get("use_sliding_window", True) else None
    ignored = not hasattr(type(config), "sliding_window") and "layer_types" not in plain
    if window is not None and window < config.max_position_embeddings and ignored:
        raise ConfigError(
            f"{folder / 'config.json'} has a sliding window that Transformers ignores and vLLM does not",
            found=f"sliding_window {window}, model_type {config.model_type}",
            do="remove sliding_window if the model was trained without, or name the model_type that has it",
        )
    if "sliding_attention" in base_layer_types(config) and not getattr(config, "sliding_window", None):
        raise ConfigError(
            f"{folder / 'config.json'} has sliding layers without a window",
            found=f"sliding_window {plain.get('sliding_window')}, "
            f"use_sliding_window {plain.get('use_sliding_window')}, sliding_attention in layer_types",
            do="set sliding_window (and use_sliding_window), or make the layer_types full_attention",
        )


def _check_quantisation(folder: Path, plain: dict[str, Any]) -> None:
    """Raise ConfigError if weights are quantised, by their config or without one, and cannot be dequantised."""
    for key in ("quantization_config", "compression_config"):
        if (settings := plain.get(key)) is None:
            continue
        method = settings.get("quant_method") if key == "quantization_config" and isinstance(settings, dict) else None
        if method not in DEQUANTISED:
            raise _quantised(folder, f"{key} {json.dumps(settings)[:200]}")
        if (package := DEQUANTISED[method]) and find_spec(package) is None:
            raise _quantised(folder, f"{method}, which takes the package {package} to undo")
        if method != "fp8" and any("expert" in name for name in plain | (plain.get("text_config") or {})):
            raise _quantised(folder, f"a mixture of experts by {method}")
        tensors = headers(folder)
        if method == "fp8" and all(tensor.dtype != torch.float8_e4m3fn for tensor in tensors.values()):
            raise ConfigError(
                f"{folder / 'config.json'} has quantization_config fp8, and no weight is of that type",
                do="remove quantization_config if the weights were dequantised, or copy the directory again",
            )
        unscaled = [name for name in tensors if name.endswith(".weight") and tensors[name].dtype == torch.float8_e4m3fn]
        scales = ("_scale_inv",) if method == "fp8" else ("_scale_inv", "_scale")
        if unscaled := [name for name in unscaled if not {name + scale for scale in scales} & tensors.keys()]:
            raise _quantised(folder, f"{some(unscaled)} of type {torch.float8_e4m3fn} without a scale")


def _quantised(folder: Path, found: str) -> ConfigError:
    base = card_data(folder).get("base_model")
    named = ", ".join(base) if isinstance(base, list) else base
    return ConfigError(
        f"{folder} is quantised, which MODEL cannot be",
        found=found,
        do=f"use the original that it was quantised from{f', {named},' if named else ','} and quantise after healing",
    )


def _check_formats(folder: Path, weights: Tensors) -> None:
    """Raise ConfigError if the directory has the weights in a second format too, and they differ."""
    if not any(os.path.lexists(folder / name) for name in PICKLED) or weight_files(folder)[0].suffix == ".bin":
        return
    try:
        others = read_weights(folder, PICKLED)
    except Exception as error:  # no library loads it
        log.warning("%s: weights other than safetensors are ignored (%s)", folder, first_line(error))
        return
    for name in others.keys() & weights.keys():
        coarser, finer = sorted((weights[name], others[name]), key=lambda values: values.dtype.itemsize)
        if not torch.equal(coarser, finer.to(coarser.dtype)):
            raise ConfigError(
                f"{folder} has weights twice, and they differ",
                found=f"{name} in safetensors and in pytorch_model",
                do="remove the files that are not the model's",
            )


def _check_plan(folder: Path, recorded: list[str], plan: PlanFile) -> None:
    planned = [entry.label for entry in plan.layers]
    pairs = enumerate(zip(planned, recorded, strict=False))
    differing = [
        f"layer {layer}: {ours} in {PLAN}, {theirs} in config.json" for layer, (ours, theirs) in pairs if ours != theirs
    ]
    if len(planned) != len(recorded):
        differing = [f"{len(planned)} layers in {PLAN}, {len(recorded)} in config.json"]
    if differing:
        raise ConfigError(
            f"plan and configuration of {folder} disagree",
            found=some(differing, "; "),
            do="change RUN/plan.yaml and run `layerboost convert`; a checkpoint's own files are not for editing",
        )


def _recorded(folder: Path, config: PreTrainedConfig) -> list[str]:
    """Return the strategy of each layer in a boosted checkpoint's config; raise ConfigError if it is invalid."""
    try:
        found = recorded_plan(config)
        window, context = getattr(config, "sliding_window", None), config.max_position_embeddings
    except Exception as error:  # as in read_config
        raise ConfigError(f"cannot read the configuration of {folder}", found=first_line(error)) from None
    if any(WINDOW in entry.strategy.settings for entry in found) and not (
        type(window) is int and 1 <= window <= context
    ):
        raise ConfigError(
            f"cannot read the configuration of {folder}",
            found=f"sliding_window {window!r}, not 1 to {context:,} tokens",
            do="make the checkpoint again; its own files are not for editing",
        )
    return [entry.label for entry in found]


def _on_meta(folder: Path, config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the model of a config on the meta device."""
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # as in read_config
        raise ConfigError(f"no model can be built from {folder / 'config.json'}", found=first_line(error)) from None


def _loaded_on_meta(folder: Path, kind: Any, config: PreTrainedConfig, found: Tensors) -> dict[str, Any]:
    """Return what Transformers reports after loading these tensors, without memory."""
    try:
        _, loading = kind.from_pretrained(
            None,
            config=config,
            state_dict=found,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # as in read_config
        raise ConfigError(f"cannot load {folder}", found=first_line(error)) from None
    return dict(loading)


def _check_tensors(folder: Path, config: PreTrainedConfig, found: Tensors, trust_remote_code: bool = False) -> None:
    """Raise ConfigError if tensors are missing, unexpected or of another shape than in the config's model."""
    model = _on_meta(folder, config, trust_remote_code)
    layers, text = decoder_layers(model).modules(), config.get_text_config()
    experts = min((len(m.get_parameter(name)) for m in layers for name in packed_parameters(m)), default=None)
    if experts is not None and not 1 <= experts_per_token(text) <= experts:
        raise ConfigError(
            f"{folder / 'config.json'} has each token go through more experts than there are, or through none",
            found=f"{experts_per_token(text)} of {experts}",
            do="copy or download it again",
        )
    settings = getattr(config, "quantization_config", None) or {}
    if settings and settings.get("quant_method") != "fp8":
        # Quantised layers hold other tensors than the model's own: compare the modules.
        wanted, there = _modules(model.state_dict()), _modules(_renamed(model, found))
        missing, unexpected = wanted - there - _modules(model.all_tied_weights_keys), there - wanted
        mismatched: Iterable[Any] = ()
    else:
        if settings:
            config = copy.copy(config)
            config.quantization_config = {**settings, "dequantize": True}
        elif strange := sorted(name for name, value in found.items() if value.dtype not in FLOATS):
            raise _quantised(folder, f"{some(strange)} of type {found[strange[0]].dtype}, no quantization_config")
        # Transformers itself knows which tensors it renames, ignores and initialises.
        loading = _loaded_on_meta(folder, type(model), config, found)
        missing, unexpected, mismatched = (loading[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    problems = [f"no {name}" for name in sorted(missing)]
    problems += [f"{name} is not in the configuration's model" for name in sorted(unexpected)]
    problems += [f"{name} is {list(a)}, by the configuration {list(b)}" for name, a, b in sorted(mismatched)]
    if problems:
        raise ConfigError(
            f"weights and configuration of {folder} disagree",
            found=some(problems, "; "),
            do="make the checkpoint again with `layerboost convert` or `layerboost heal`"
            if (folder / PLAN).is_file()
            else "download or write them again, together",
        )


def _renamed(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Return a model's own names of tensors that files name otherwise, such as those of a wrapper."""
    found = list(names)
    for renaming in get_model_conversion_mapping(model):
        if type(renaming) is WeightRenaming:
            found = [renaming.rename_source_key(name)[0] for name in found]
    return found


def _modules(tensors: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in tensors}
