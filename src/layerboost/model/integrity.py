"""Whether a model directory is whole and agrees with itself, told from its config, its plan and its weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict

from layerboost.artifacts import PLAN, PlanFile, read_plan
from layerboost.errors import ConfigError
from layerboost.model.families import FAMILIES
from layerboost.model.modeling import base_layer_types, skipped_layers
from layerboost.runtime import log

ARCHITECTURE = "LayerBoostForCausalLM"
SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# In the order in which Transformers looks for them.
WEIGHTS = (SINGLE, INDEX, *PICKLED)
POINTER = b"version https://git-lfs"
# Weights of another type are quantised.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHOWN = 3
Tensors = dict[str, torch.Tensor]


def check_checkpoint(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """The plain config of a model directory, stock or boosted, in which nothing is missing and nothing disagrees.

    Reads no weight, only the headers of the weight files. Raises ConfigError for files that are missing or damaged, for
    weights that Transformers could not load or would load in a way nobody asked for and, in a boosted checkpoint, for a
    plan, a config and weights that are not of the same model.
    """
    plain = plain_config(folder)
    tensors = _headers(folder)
    if ARCHITECTURE in (plain.get("architectures") or []):
        config = read_config(folder, str(folder))
        recorded = _recorded(folder, config)
        if (folder / PLAN).is_file():
            _check_plan(folder, recorded, read_plan(folder / PLAN))
        _check_tensors(folder, config, tensors)
    elif "attention_sink_layers" in plain:
        raise ConfigError(
            f"{folder / 'config.json'} is of a boosted checkpoint and no longer names {ARCHITECTURE}",
            found=f"architectures {plain.get('architectures')}",
            do="make the checkpoint again; its own files are not for editing",
        )
    elif plain["model_type"] in FAMILIES:
        config = read_config(folder, str(folder), trust_remote_code=trust_remote_code)
        _check_tensors(folder, config, tensors, trust_remote_code)
    return plain


def check_base(folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> None:
    """Raise ConfigError for a directory that cannot be MODEL, to be loaded in `dtype`. Reads every weight.

    Besides what `check_checkpoint` refuses: quantised and boosted models, weights that are not finite, tied weights and
    weights in two formats that differ.
    """
    plain = plain_config(folder)
    if quantisation := plain.get("quantization_config") or plain.get("compression_config"):
        raise _quantised(folder, f"quantization_config {json.dumps(quantisation)[:200]}")
    if ARCHITECTURE in (plain.get("architectures") or []):
        raise ConfigError(f"{folder} is a boosted checkpoint", do="give the base that it was made from as MODEL")
    check_checkpoint(folder, trust_remote_code)
    weights = read_weights(folder)
    check_finite_weights(str(folder), weights, dtype)
    config = read_config(folder, str(folder), trust_remote_code=trust_remote_code)
    for name, other in _on_meta(folder, config, trust_remote_code).all_tied_weights_keys.items():
        if {name, other} <= weights.keys() and not torch.equal(weights[name], weights[other]):
            raise ConfigError(
                f"weights and configuration of {folder} disagree",
                found=f"{name} and {other} differ, by the configuration (tie_word_embeddings) they are one",
                do=f"set tie_word_embeddings to false in config.json, or remove {name}, whichever the model means",
            )
    _check_formats(folder, weights)


def is_intact(folder: Path) -> bool:
    """Whether `check_checkpoint` finds nothing wrong; what it finds is logged."""
    try:
        check_checkpoint(folder)
    except ConfigError as error:
        log.warning("%s", error)
        return False
    return True


def read_config(folder: Path, name: str, **kwargs: Any) -> PreTrainedConfig:
    """Transformers' config of a directory; raises ConfigError with the first line of whatever is wrong with it."""
    if "gguf_file" not in kwargs:
        check_readable(folder / "config.json")
    try:
        return AutoConfig.from_pretrained(folder, **kwargs)
    except Exception as error:  # a config edited by hand fails in as many ways as its class has fields
        raise ConfigError(f"cannot read the configuration of {name}", found=first_line(error)) from None


def check_readable(file: Path) -> None:
    """Raise ConfigError for a file that cannot be read, a link to nothing or a Git LFS pointer."""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(POINTER))
    except OSError as error:
        dangling = file.is_symlink() and not file.exists()
        found = f"a link to {file.readlink()}, which does not exist" if dangling else first_line(error)
        raise ConfigError(f"{file} cannot be read", found=found, do="copy or download it again") from None
    if start == POINTER:
        raise ConfigError(
            f"{file} is not there", found="a Git LFS pointer in its place", do="run `git lfs pull`, or download it"
        )


def weight_files(folder: Path, names: Iterable[str] = WEIGHTS) -> list[Path]:
    """The files that Transformers loads a directory's weights from, shards in order; `names` limits where it looks.

    Raises ConfigError for files that are missing or cannot be read, and where others lie beside them whose weights
    Transformers or vLLM would take for the model's.
    """
    if os.path.lexists(folder / ADAPTER):
        raise ConfigError(
            f"{folder} holds an adapter, which Transformers would add to the weights",
            found=ADAPTER,
            do=f"merge it into the model and save that; if its weights are merged already, remove {ADAPTER}",
        )
    there = [name for name in names if os.path.lexists(folder / name)]
    if not there:
        if any(folder.glob("*-of-*.safetensors")) or any(folder.glob("pytorch_model-*-of-*.bin")):
            raise ConfigError(f"{folder} has shards but no {INDEX}", do="copy, download or write it again")
        raise ConfigError(
            f"{folder} has no weights",
            found=f"none of {', '.join(WEIGHTS)}",
            do="download them; of a Hub id only safetensors are taken",
        )
    check_readable(folder / there[0])
    if there[:2] == [SINGLE, INDEX] and set(_index(folder / INDEX).values()) != {SINGLE}:
        raise ConfigError(
            f"{folder} has weights twice: Transformers loads one, vLLM the other",
            found=f"{SINGLE} and {INDEX}",
            do="remove the one that is not the model's",
        )
    if not there[0].endswith(".json"):
        return [folder / there[0]]
    shards = sorted(set(_index(folder / there[0]).values()))
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ConfigError(
            f"{folder} lacks {len(missing)} of {len(shards)} shards",
            found=f"no {_some(missing)}",
            do="copy, download or write them again",
        )
    for name in shards:
        check_readable(folder / name)
    return [folder / name for name in shards]


def read_weights(folder: Path, names: Iterable[str] = WEIGHTS) -> Tensors:
    """Every tensor that Transformers loads from a directory. The files are mapped, not read into memory."""
    weights: Tensors = {}
    for file in weight_files(folder, names):
        weights |= load_state_dict(file)
    return weights


def check_finite_weights(name: str, weights: Tensors, dtype: torch.dtype) -> None:
    """Raise ConfigError for weights that are not finite, or not once they are cast to `dtype`."""
    for tensor, values in weights.items():
        wrong = ~values.to(dtype).isfinite()
        if not wrong.any():
            continue
        place = wrong.nonzero()[0].tolist()
        first = values[tuple(place)].item()
        of_token = f", token {place[0]}" if "embed" in tensor or "head" in tensor else ""
        overflows = math.isfinite(first) and dtype == torch.float16
        raise ConfigError(
            f"weights of {name} are not finite" + (" in float16" if overflows else ""),
            found=f"{tensor}: {int(wrong.sum()):,} of {wrong.numel():,}, the first is {first} at {place}{of_token}",
            do="--set dtype=float32, or bfloat16"
            if overflows
            else "download the model again, or use another checkpoint",
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def plain_config(folder: Path) -> dict[str, Any]:
    """The JSON of a directory's config; raises ConfigError where that is no model's."""
    file = folder / "config.json"
    if not os.path.lexists(file):
        found = f"{ADAPTER} alone: an adapter" if (folder / ADAPTER).is_file() else "no config.json in it"
        raise ConfigError(f"{folder} is not a model directory", found=found)
    check_readable(file)
    try:
        config = json.loads(file.read_text(), parse_constant=_not_finite)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} is not a model directory", found=f"config.json: {first_line(error)}") from None
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ConfigError(f"{folder} is not a model directory", found="its config.json names no model_type")
    return config


def _not_finite(constant: str) -> None:
    raise ValueError(f"{constant} among its numbers")


def _index(file: Path) -> dict[str, str]:
    """An index: file by tensor."""
    check_readable(file)
    try:
        return {str(name): str(shard) for name, shard in json.loads(file.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} cannot be read", found=first_line(error)) from None


def _headers(folder: Path) -> Tensors:
    """Every tensor of a directory on the meta device: its name, shape and type."""
    tensors: Tensors = {}
    files = weight_files(folder)
    # Not Mistral's own format, which has names of its own.
    more = {file.name for file in folder.glob("*.safetensors")} - {file.name for file in files}
    more = {name for name in more if not name.startswith("consolidated")}
    if more and not (folder / INDEX).is_file():
        raise ConfigError(
            f"{folder} has weights that Transformers leaves aside and vLLM loads",
            found=_some(sorted(more)),
            do="remove them, or those that are not the model's",
        )
    index = _index(folder / INDEX) if files[0].suffix == ".safetensors" and files[0].name != SINGLE else {}
    for file in files:
        try:
            found = dict(load_state_dict(file, map_location="meta"))
        except Exception as error:  # each format has its own
            raise ConfigError(
                f"{file} is damaged", found=first_line(error), do="copy, download or write it again"
            ) from None
        other = sorted(name for name, value in found.items() if not isinstance(value, torch.Tensor))
        if other:
            raise ConfigError(f"{file} does not hold a model's weights", found=f"{_some(other)} instead of tensors")
        absent = sorted(name for name, shard in index.items() if shard == file.name and name not in found)
        if absent:
            raise ConfigError(f"{file} does not hold what {INDEX} says", found=f"no {_some(absent)}")
        if twice := sorted(found.keys() & tensors.keys()):
            raise ConfigError(f"{folder} holds tensors twice", found=f"{_some(twice)} in {file.name} and before it")
        tensors |= found
    return tensors


def _quantised(folder: Path, found: str) -> ConfigError:
    return ConfigError(
        f"{folder} is quantised, which MODEL cannot be",
        found=found,
        do="use the original that it was quantised from, and quantise after healing",
    )


def _check_formats(folder: Path, weights: Tensors) -> None:
    """Raise ConfigError where a second, readable copy of the weights says something else."""
    if not any(os.path.lexists(folder / name) for name in PICKLED) or weight_files(folder)[0].suffix == ".bin":
        return
    try:
        others = read_weights(folder, PICKLED)
    except Exception as error:  # nobody loads it
        log.warning("%s: other weights than safetensors are left aside (%s)", folder, first_line(error))
        return
    for name, value in others.items():
        if name in weights and not torch.equal(weights[name].float(), value.to(weights[name].dtype).float()):
            raise ConfigError(
                f"{folder} has weights twice, and they differ",
                found=f"{name} in safetensors and in pytorch_model",
                do="remove the files that are not the model's",
            )


def _check_plan(folder: Path, recorded: list[str], plan: PlanFile) -> None:
    planned = [_words(entry.attention, entry.window, entry.sink) for entry in plan.layers]
    differing = [
        f"layer {layer}: {ours} in {PLAN}, {theirs} in config.json"
        for layer, (ours, theirs) in enumerate(zip(planned, recorded, strict=False))
        if ours != theirs
    ]
    if len(planned) != len(recorded):
        differing = [f"{len(planned)} layers in {PLAN}, {len(recorded)} in config.json"]
    if differing:
        raise ConfigError(
            f"plan and configuration of {folder} disagree",
            found=_some(differing, "; "),
            do="change RUN/plan.yaml and run `layerboost convert`; a checkpoint's own files are not for editing",
        )


def _recorded(folder: Path, config: PreTrainedConfig) -> list[str]:
    """Per layer, the strategy that a boosted checkpoint's config records; raises ConfigError where it is nonsense."""
    try:
        found = _strategies(config)
        window, context = getattr(config, "sliding_window", None), config.max_position_embeddings
        slides = any(words.startswith("sliding") for words in found)
    except Exception as error:  # as in read_config
        raise ConfigError(f"cannot read the configuration of {folder}", found=first_line(error)) from None
    if slides and not (type(window) is int and 1 <= window <= context):
        raise ConfigError(
            f"cannot read the configuration of {folder}",
            found=f"sliding_window {window!r}, where 1 to {context:,} tokens make sense",
            do="make the checkpoint again; its own files are not for editing",
        )
    return found


def _strategies(config: PreTrainedConfig) -> list[str]:
    skipped, sinks = skipped_layers(config), getattr(config, "attention_sink_layers", None) or []
    found = []
    for layer, (kind, base) in enumerate(zip(config.layer_types, base_layer_types(config), strict=True)):
        if layer in skipped:
            found.append(_words("none", None, layer in sinks))
        elif kind == "sliding_attention" and base != kind:  # a layer that slides in the base is `full` in a plan
            found.append(_words("sliding", config.sliding_window, layer in sinks))
        else:
            found.append(_words("full", None, layer in sinks))
    return found


def _words(attention: str, window: int | None, sink: bool) -> str:
    return attention + (f" {window}" if window else "") + (" with sink" if sink else "")


def _on_meta(folder: Path, config: PreTrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model of a config, without memory."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # as in read_config
        raise ConfigError(f"no model can be built from {folder / 'config.json'}", found=first_line(error)) from None


def _check_tensors(folder: Path, config: PreTrainedConfig, found: Tensors, trust_remote_code: bool = False) -> None:
    """Raise ConfigError for tensors that the config's model lacks, has in another shape, or would be left without."""
    model = _on_meta(folder, config, trust_remote_code)
    if getattr(config, "quantization_config", None):
        # Quantised layers hold other tensors than the model's own: compare the modules.
        wanted, there = _modules(model.state_dict()), _modules(found)
        missing, unexpected = wanted - there - _modules(model.all_tied_weights_keys), there - wanted
        mismatched: Iterable[Any] = ()
    else:
        if strange := sorted(name for name, value in found.items() if value.dtype not in FLOATS):
            raise _quantised(folder, f"{_some(strange)} of type {found[strange[0]].dtype}, no quantization_config")
        # Transformers says itself what it would rename, leave out and make up.
        _, loading = type(model).from_pretrained(
            None,
            config=config,
            state_dict=found,
            device_map="meta",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
        missing, unexpected, mismatched = (loading[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    problems = [f"no {name}" for name in sorted(missing)]
    problems += [f"{name} is not in the configuration's model" for name in sorted(unexpected)]
    problems += [f"{name} is {list(a)}, by the configuration {list(b)}" for name, a, b in sorted(mismatched)]
    if problems:
        raise ConfigError(
            f"weights and configuration of {folder} disagree",
            found=_some(problems, "; "),
            do="make the checkpoint again with `layerboost convert` or `layerboost heal`"
            if (folder / PLAN).is_file()
            else "download or write them again, together",
        )


def _modules(tensors: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in tensors}


def _some(items: list[str], separator: str = ", ") -> str:
    more = [f"{len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return separator.join([*items[:SHOWN], *more])
