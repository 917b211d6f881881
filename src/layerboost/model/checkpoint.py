"""Boosted Hugging Face checkpoints: saved, read back, and compared with the plan and the base they were made from."""

from __future__ import annotations

import ast
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from layerboost.errors import ConfigError, LayerboostError
from layerboost.files import new_folder
from layerboost.model import attention, caches, families, linear_attention, mlp, modeling
from layerboost.model.base import Base, find_model
from layerboost.model.card import CARD, UNKNOWN, Origin, model_card
from layerboost.model.files import as_saved, in_original_format, read_weights
from layerboost.model.integrity import check_checkpoint, check_weights
from layerboost.model.tokenizer import SENTENCE, save_tokenizer
from layerboost.schemas.model import ModelInfo
from layerboost.schemas.plan import PlanFile, read_plan, write_plan
from layerboost.schemas.run import PLAN
from layerboost.schemas.sensitivity import Sensitivity

FUTURE = "from __future__ import annotations"
# Files that upload, download and resume well.
MAX_SHARD_SIZE = "5GB"


def save_boosted(
    model: PreTrainedModel,
    tokenizer: Any,
    plan: PlanFile,
    target: Path,
    *,
    recipe_yaml: str,
    origin: Origin = UNKNOWN,
    healing: str = "",
) -> None:
    """Write a boosted checkpoint: safetensors, config, tokenizer, the modelling file, plan, recipe and model card.

    `origin`: what the card says about the base; `healing`: a sentence on how the model was trained, empty for an
    untrained one. The tokenizer's files are the base's own. Atomic: `target` is complete and read back, or untouched.
    Raise ConfigError if `target` is a directory of something else, LayerboostError if the disk is full, or if the
    written files are not the model.
    """
    with new_folder(target, modeling.CODE_FILE) as folder:
        model.save_pretrained(
            folder, max_shard_size=MAX_SHARD_SIZE, save_original_format=in_original_format(model.config)
        )
        save_tokenizer(tokenizer, folder)
        (folder / modeling.CODE_FILE).write_text(modeling_source(), encoding="utf-8")
        write_plan(folder / PLAN, plan)
        (folder / "recipe.yaml").write_text(recipe_yaml, encoding="utf-8")
        (folder / CARD).write_text(model_card(plan, origin, healing), encoding="utf-8")
        for file in origin.files:
            shutil.copy(file, folder)
        _check_written(folder, target, model)


def _check_written(folder: Path, target: Path, model: PreTrainedModel) -> None:
    """Raise LayerboostError if the checkpoint in `folder` does not load to the weights of `model`."""
    try:
        check_checkpoint(folder)
        written = read_weights(folder)
        saved = (pair for name, value in model.state_dict().items() for pair in as_saved(model, name, value).items())
        found = ", ".join(
            name for name, value in saved if name in written and not torch.equal(written[name], value.cpu())
        )
    except ConfigError as error:
        found = f"{error.wrong}: {error.found}"
    if found:
        raise LayerboostError(f"{target} could not be written: what is read back is not the model", found=found[:300])


def plan_in(folder: Path) -> PlanFile | None:
    """Return the plan in a boosted checkpoint; None if the directory is not one."""
    return read_plan(folder / PLAN) if (folder / PLAN).is_file() else None


def check_same_model(made: PlanFile | Sensitivity, model: ModelInfo, file: Path) -> None:
    """Raise ConfigError if the content of `file` was made for another model."""
    if made.model.fingerprint != model.fingerprint:
        raise ConfigError(
            f"{file} is for another model",
            found=f"there: {made.model.name} ({made.model.fingerprint}), here: {model.name} ({model.fingerprint})",
            do="use the plan's own model, or measure and plan this one",
        )


def check_same_plan(made_from: PlanFile, folder: Path, file: Path, command: str) -> None:
    """Raise ConfigError if a checkpoint was made from another plan than the one in `file`; `command` makes it."""
    if made_from.hash() != read_plan(file).hash():
        raise ConfigError(
            f"{folder} was made from another plan than {file}",
            do=f"run `layerboost {command}` again, or delete {folder}",
        )


def check_extra_checkpoints(given: Mapping[str, str], run: Path, base: Base) -> None:
    """Raise ConfigError for a recipe's extra checkpoint that is damaged or cannot be compared with the base.

    Checkpoints in the run folder are not checked: they may be made later.
    """
    for folder in {Path(name).expanduser() for name in given.values()}:
        if not folder.absolute().is_relative_to(run.absolute()):
            other = find_model(str(folder), base.runtime, None, base.trust_remote_code)
            check_comparable(other, base)
            if "quantization_config" not in check_checkpoint(folder, base.trust_remote_code):
                check_weights(folder, base.runtime.dtype, base.trust_remote_code)


def check_comparable(other: Base, base: Base) -> None:
    """Raise ConfigError for a model that does not encode text as the base does."""
    rows, ours = base.config.vocab_size, base.tokenizer.get_vocab()
    theirs = other.tokenizer.get_vocab()
    found = ""
    if other.config.vocab_size != rows:
        found = f"{other.config.vocab_size:,} tokens, {rows:,} of the base"
    elif moved := [token for token, index in ours.items() if theirs.get(token, index) != index]:
        found = f"{moved[0]!r} is {theirs[moved[0]]}, {ours[moved[0]]} in the base"
    elif other.tokenizer(SENTENCE)["input_ids"] != base.tokenizer(SENTENCE)["input_ids"]:
        found = f"other ids for {SENTENCE!r}"
    if found:
        raise ConfigError(f"{other.name} cannot be compared with the base: another vocabulary", found=found)


def modeling_source() -> str:
    """Return the modules that are part of a checkpoint as its one file."""
    parts = ['"""Loads this checkpoint with trust_remote_code=True; made by layerboost."""', FUTURE]
    for module in (families, attention, caches, linear_attention, mlp, modeling):
        assert module.__file__
        text = Path(module.__file__).read_text(encoding="utf-8")
        lines = text.splitlines()
        for node in reversed(ast.parse(text).body):
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            local = isinstance(node, ast.ImportFrom) and (node.module or "").startswith("layerboost")
            future = isinstance(node, ast.ImportFrom) and node.module == "__future__"
            if docstring or local or future:
                del lines[node.lineno - 1 : node.end_lineno]
        parts.append("\n".join(lines).strip())
    return "\n\n\n".join(parts) + "\n"
