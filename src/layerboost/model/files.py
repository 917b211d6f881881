"""The files of a model directory: which ones are loaded, whether they exist, and what is in them."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import load_state_dict

from layerboost.errors import ConfigError, LayerboostError, first_line
from layerboost.files import write_text
from layerboost.model.families import WRAPPERS
from layerboost.rows import LFS_POINTER
from layerboost.schemas.artifact import fingerprint, not_finite

SINGLE, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_config.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# In the order in which Transformers looks for them.
WEIGHTS = (SINGLE, INDEX, *PICKLED)
# vLLM loads Mistral's own format as another model, with its own tensor names, and ignores a trainer's files.
NOT_LOADED = ("consolidated", "training_args", "optimizer", "scheduler")
SHOWN = 3
Tensors = dict[str, torch.Tensor]


def check_readable(file: Path) -> None:
    """Raise ConfigError if a file cannot be read, is a dangling link or a Git LFS pointer."""
    try:
        with file.open("rb") as opened:
            start = opened.read(len(LFS_POINTER))
    except OSError as error:
        dangling = file.is_symlink() and not file.exists()
        found = f"a link to {file.readlink()}, which does not exist" if dangling else first_line(error)
        raise ConfigError(f"{file} cannot be read", found=found, do="copy or download it again") from None
    if start == LFS_POINTER.encode():
        raise ConfigError(
            f"{file} is missing", found="a Git LFS pointer in its place", do="run `git lfs pull`, or download it"
        )


def plain_config(folder: Path) -> dict[str, Any]:
    """Return the JSON of a directory's config.json; raise ConfigError if it is not that of a model."""
    file = folder / "config.json"
    if not os.path.lexists(file):
        if (folder / ADAPTER).is_file():
            raise ConfigError(f"{folder} is an adapter, not a model", do="merge it into its model and give that")
        raise ConfigError(f"{folder} is not a model directory", found="no config.json in it")
    check_readable(file)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if wrong := not_finite(config):
            raise ValueError(wrong)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder} is not a model directory", found=f"config.json: {first_line(error)}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise ConfigError(f"{folder} is not a model directory", found="its config.json names no model_type")
    text, wrapper, found = config.get("text_config"), WRAPPERS.get(config["model_type"]), ""
    if isinstance(text, dict):
        found = "" if text.get("model_type") else "no model_type in its text_config"
    elif wrapper and not (wrapper.flat and text is None and "hidden_size" in config):
        kind = "null" if text is None else f"a {type(text).__name__}"
        found = f"text_config is {kind}" if "text_config" in config else "no text_config"
    if found:
        raise ConfigError(
            f"{folder / 'config.json'} does not say which language model the wrapper {config['model_type']} holds",
            found=f"{found}: Transformers would take its default",
            do="copy or download it again, or write there what the weights are of: text_config with its model_type",
        )
    return config


def weight_files(folder: Path, names: Iterable[str] = WEIGHTS) -> list[Path]:
    """Return the files that Transformers loads a directory's weights from; `names` limits which it looks for.

    Raise ConfigError if one is missing or unreadable, or if other files would be loaded too or instead.
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
            do="download them; of a Hub id only safetensors are used",
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
            found=f"no {some(missing)}",
            do="copy, download or write them again",
        )
    for name in shards:
        check_readable(folder / name)
    return [folder / name for name in shards]


def read_weights(folder: Path, names: Iterable[str] = WEIGHTS) -> Tensors:
    """Return every tensor that Transformers loads from a directory, memory-mapped."""
    weights: Tensors = {}
    for file in weight_files(folder, names):
        weights |= load_state_dict(file)
    return weights


def in_original_format(config: PreTrainedConfig) -> bool:
    """Return whether `save_pretrained` names and packs the tensors of a model as published checkpoints do.

    Those of a wrapper keep their own names, which vLLM and Transformers know too.
    """
    return config.model_type not in WRAPPERS


def as_saved(model: PreTrainedModel, name: str, value: torch.Tensor) -> Tensors:
    """Return a tensor of a model's state as it is saved: Transformers renames some tensors, and packs those of experts,
    as it loads them."""
    if not in_original_format(model.config):
        return {name: value}
    return revert_weight_conversion(model, {name: value})


def headers(folder: Path) -> Tensors:
    """Return every tensor of a directory on the meta device: only its name, shape and type are read.

    Raise ConfigError if a file is damaged, a tensor is in two files, or vLLM would load other safetensors too.
    """
    tensors: Tensors = {}
    files = weight_files(folder)
    others = {file.name for file in folder.glob(f"*{files[0].suffix}")} - {file.name for file in files}
    others = {name for name in others if not name.startswith(NOT_LOADED)}
    indexed = files[0].suffix == ".safetensors" and (folder / INDEX).is_file()
    if others and not indexed:
        raise ConfigError(
            f"{folder} has weights that Transformers ignores and vLLM loads",
            found=some(sorted(others)),
            do="remove the files that are not the model's",
        )
    index = _index(folder / INDEX) if files[0].suffix == ".safetensors" and files[0].name != SINGLE else {}
    for file in files:
        try:
            found = dict(load_state_dict(file, map_location="meta"))
        except Exception as error:  # each format has its own
            raise ConfigError(
                f"{file} is damaged", found=first_line(error), do="copy, download or write it again"
            ) from None
        if strange := sorted(name for name, value in found.items() if not isinstance(value, torch.Tensor)):
            raise ConfigError(f"{file} does not hold a model's weights", found=f"{some(strange)}: not a tensor")
        absent = sorted(name for name, shard in index.items() if shard == file.name and name not in found)
        if absent:
            raise ConfigError(f"{file} lacks tensors that {INDEX} names", found=f"no {some(absent)}")
        if twice := sorted(found.keys() & tensors.keys()):
            raise ConfigError(
                f"{folder} holds tensors twice", found=f"{some(twice)} in {file.name} and an earlier file"
            )
        tensors |= found
    return tensors


def check_finite_weights(name: str, weights: Tensors, dtype: torch.dtype) -> None:
    """Raise ConfigError if weights are not finite in `dtype`, naming the tensor and the place in it."""
    for tensor, values in weights.items():
        if not values.is_floating_point():  # packed weights
            continue
        wrong = ~values.to(dtype).isfinite()
        if not wrong.any():
            continue
        place = wrong.nonzero()[0].tolist()
        first = values[tuple(place)].item()
        of_token = f", token {place[0]}" if "emb" in tensor or "head" in tensor else ""
        overflows = math.isfinite(first) and dtype == torch.float16
        raise ConfigError(
            f"weights of {name} are not finite" + (" in float16" if overflows else ""),
            found=f"{tensor}: {int(wrong.sum()):,} of {wrong.numel():,}, the first is {first} at {place}{of_token}",
            do="--set dtype=float32, or bfloat16"
            if overflows
            else "download the model again, or use another checkpoint",
        )


def check_gguf(file: Path) -> None:
    """Raise ConfigError if a GGUF file is damaged or its weights are not finite."""
    from gguf import GGUFReader, dequantize

    try:
        for tensor in GGUFReader(file).tensors:
            values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
            check_finite_weights(str(file), {tensor.name: values}, torch.float32)
    except ConfigError:
        raise
    except Exception as error:  # numpy's, of a shape or a size
        raise ConfigError(f"{file} cannot be read", found=first_line(error), do="copy or download it again") from None


def _index(file: Path) -> dict[str, str]:
    """Return an index of shards: file by tensor."""
    check_readable(file)
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        names, _ = index["weight_map"], index["metadata"]  # Transformers wants both
        return {str(name): str(shard) for name, shard in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        found = f"no {error}" if isinstance(error, KeyError) else first_line(error)
        raise ConfigError(f"{file} cannot be read", found=found) from None


def remembered(what: str, files: Iterable[Path], find: Callable[[], str]) -> str:
    """Return `find()`, or what it returned earlier, in any process, if these files have not changed.

    A file counts as unchanged if path, inode, size and both times are the same. Results for files that changed within
    the last two seconds are not cached: another change could leave the same times.
    """
    states = [(str(file.resolve()), file.stat()) for file in sorted(files)]
    old_enough = all(time.time() - state.st_ctime > 2 for _, state in states)
    key = [(path, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in states]
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerboost" / fingerprint(what, key)
        if cache.is_file():
            return cache.read_text(encoding="utf-8")
    except (OSError, RuntimeError):  # no home directory, or not readable
        return find()
    found = find()
    if old_enough:
        with suppress(LayerboostError):
            write_text(cache, found)
    return found


def some(items: list[str], separator: str = ", ") -> str:
    """Return the first few items and how many more there are."""
    more = [f"{len(items) - SHOWN} more"] if len(items) > SHOWN else []
    return separator.join([*items[:SHOWN], *more])
