"""Whether a model directory is whole and agrees with itself, told from its config, its plan and its files' headers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from layerboost.artifacts import PLAN, PlanFile, read_plan
from layerboost.errors import ConfigError
from layerboost.model.modeling import base_layer_types, skipped_layers
from layerboost.runtime import log

ARCHITECTURE = "LayerBoostForCausalLM"
INDEX = "model.safetensors.index.json"
SHOWN = 3
Shape = tuple[int, ...]


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """The plain config of a model directory, stock or boosted, in which nothing is missing and nothing disagrees.

    Reads no weight: of safetensors files only the headers. Raises ConfigError for shards that are missing or damaged
    and, in a boosted checkpoint, for a plan, a config and weights that are not of the same model.
    """
    plain = _plain_config(folder)
    shapes = tensor_shapes(folder)
    if ARCHITECTURE in (plain.get("architectures") or []):
        config = read_config(folder, str(folder))
        recorded = _recorded(folder, config)
        if (folder / PLAN).is_file():
            _check_plan(folder, recorded, read_plan(folder / PLAN))
        if shapes:
            _check_tensors(folder, config, shapes)
    elif "attention_sink_layers" in plain:
        raise ConfigError(
            f"{folder / 'config.json'} is of a boosted checkpoint and no longer names {ARCHITECTURE}",
            found=f"architectures {plain.get('architectures')}",
            do="make the checkpoint again; its own files are not for editing",
        )
    return plain


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
    try:
        return AutoConfig.from_pretrained(folder, **kwargs)
    except Exception as error:  # a config edited by hand fails in as many ways as its class has fields
        raise ConfigError(f"cannot read the configuration of {name}", found=first_line(error)) from None


def tensor_shapes(folder: Path) -> dict[str, Shape]:
    """Every tensor in a directory's safetensors files with its shape; none where it has weights of another format.

    Raises ConfigError for files that are missing, truncated or not what the index says.
    """
    files, index = _weight_files(folder)
    shapes: dict[str, Shape] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ConfigError(
                f"{file} is damaged", found=first_line(error), do="copy, download or write it again"
            ) from None
        absent = sorted(name for name, shard in index.items() if shard == file.name and name not in found)
        if absent:
            raise ConfigError(f"{file} does not hold what {INDEX} says", found=f"no {_some(absent)}")
        shapes |= found
    return shapes


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _plain_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        found = "no config.json in it" if isinstance(error, FileNotFoundError) else str(error)
        raise ConfigError(f"{folder} is not a model directory", found=found) from None
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ConfigError(f"{folder} is not a model directory", found="its config.json names no model_type")
    return config


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The safetensors files that Transformers loads, and the index: file by tensor, empty for a single file."""
    single = folder / "model.safetensors"
    if single.is_file():
        return [single], {}
    if (folder / INDEX).is_file():
        try:
            index = dict(json.loads((folder / INDEX).read_text())["weight_map"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{folder / INDEX} cannot be read", found=first_line(error)) from None
        names = sorted(set(index.values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConfigError(
                f"{folder} lacks {len(missing)} of {len(names)} shards",
                found=f"no {_some(missing)}",
                do="copy, download or write them again",
            )
        return [folder / name for name in names], index
    if any(folder.glob("model-*-of-*.safetensors")):
        raise ConfigError(f"{folder} has shards but no {INDEX}", do="copy, download or write it again")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise ConfigError(f"{folder} has no weights", found="neither *.safetensors nor *.bin")
    return [], {}


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


def _check_tensors(folder: Path, config: PreTrainedConfig, found: dict[str, Shape]) -> None:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # as in read_config
        raise ConfigError(f"no model can be built from {folder / 'config.json'}", found=first_line(error)) from None
    wanted: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model.all_tied_weights_keys)
    if getattr(config, "quantization_config", None):
        # Quantised layers hold other tensors than the model's own: compare the modules.
        wanted, found = _modules(wanted), _modules(found)
        tied = set(_modules(tied))
    problems = [f"no {name}" for name in sorted(wanted.keys() - found.keys() - tied)]
    problems += [f"{name} is not in the configuration's model" for name in sorted(found.keys() - wanted.keys())]
    problems += [
        f"{name} is {list(found[name])}, by the configuration {list(shape)}"
        for name, shape in wanted.items()
        if found.get(name, shape) != shape
    ]
    if problems:
        raise ConfigError(
            f"weights and configuration of {folder} disagree",
            found=_some(problems, "; "),
            do="make the checkpoint again with `layerboost convert` or `layerboost heal`",
        )


def _modules(tensors: Iterable[str]) -> dict[str, Shape]:
    return {name.rpartition(".")[0]: () for name in tensors}


def _some(items: list[str], separator: str = ", ") -> str:
    more = [f"{len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return separator.join([*items[:SHOWN], *more])
