"""heal: attention distillation, then LoRA distillation from the base → healed/, the adapters merged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from layerboost.artifacts import CONVERTED, HEAL, HEALED, PLAN, LayerPlan, PlanFile, fingerprint, read_plan, write_json
from layerboost.errors import ConfigError
from layerboost.healing.distillers import AttentionDistiller, LogitDistiller
from layerboost.healing.training import train_stage
from layerboost.model.card import origin_of
from layerboost.model.checkpoint import (
    check_same_model,
    check_same_plan,
    find_model,
    load_config,
    load_model,
    load_tokenizer,
    model_info,
    open_base,
    save_boosted,
    write_samples,
)
from layerboost.model.families import FAMILIES
from layerboost.model.integrity import check_checkpoint, is_intact
from layerboost.recipe import Recipe, recipe_yaml
from layerboost.runtime import log, start_runtime
from layerboost.sensitivity.metrics import token_losses
from layerboost.text import Split, load_tokens

VALIDATION_SEQUENCES = 8
IDENTITY = "heal.json"


def run_heal(recipe: Recipe, run: Path, resume: bool = True) -> Path:
    """Train RUN/converted against the base and write RUN/healed; goes on from the last checkpoint in RUN/heal.

    Raises ConfigError before anything is trained, also when RUN/heal was begun with other settings, or when it holds
    work and `resume` is False.
    """
    plan = read_plan(run / CONVERTED / PLAN)
    check_same_plan(plan, run / CONVERTED, run / PLAN, "convert")
    identity = heal_identity(recipe, plan)
    if healed_from(run / HEALED) == fingerprint(identity) and is_intact(run / HEALED):
        log.info("%s is up to date", run / HEALED)
        return run / HEALED
    check_begun(run / HEAL, identity, resume)
    check_checkpoint(run / CONVERTED)
    runtime = start_runtime(recipe)
    source = open_base(recipe, run, runtime)
    config, tokenizer = load_config(source, recipe.trust_remote_code), load_tokenizer(source, recipe.trust_remote_code)
    check_same_model(plan, model_info(source, config, runtime.dtype), run / CONVERTED / PLAN)
    write_samples(recipe, run, source, tokenizer, runtime)
    lessons = load_lessons(recipe, run, plan, tokenizer)
    student = load_model(find_model(str(run / CONVERTED)), runtime)
    check_targets(student, recipe.heal.lora_targets)
    write_json(run / HEAL / IDENTITY, identity)
    torch.manual_seed(recipe.seed)
    rank = recipe.heal.lora_rank
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(recipe.heal.lora_targets))
    adapted = get_peft_model(student, adapters)
    teacher = load_model(source, runtime, recipe.trust_remote_code)
    train(recipe, run / HEAL, plan, teacher, adapted.get_base_model(), lessons)
    merged = adapted.merge_and_unload().requires_grad_(False).eval()
    healing = (
        f"Healed by {recipe.heal.attention_tokens:,} tokens of attention distillation and {recipe.heal.tokens:,} "
        f"tokens of LoRA distillation from the base, on {recipe.text.source}."
    )
    origin = origin_of(source.folder, source.name, recipe.card)
    save_boosted(merged, tokenizer, plan, run / HEALED, recipe_yaml=recipe_yaml(recipe), origin=origin, healing=healing)
    write_json(run / HEALED / IDENTITY, identity)
    return run / HEALED


@dataclass(frozen=True)
class Lessons:
    """What is trained on, `[N, T]` for each stage (no rows: the stage is left out), and what is validated on."""

    attention: torch.Tensor
    lora: torch.Tensor
    validation: torch.Tensor


def load_lessons(recipe: Recipe, run: Path, plan: PlanFile, tokenizer: Any) -> Lessons:
    """All text of the run, so that too little of it shows before anything is trained. Raises ConfigError."""
    length = recipe.text.sequence_tokens

    def ids(split: Split, tokens: int, seed: int = 0) -> torch.Tensor:
        if not tokens:
            return torch.empty(0, length, dtype=torch.long)
        return load_tokens(recipe.text, tokenizer, split, tokens, run=run, seed=seed).ids

    changed = plan.count("full") < plan.model.layers
    lessons = Lessons(
        attention=ids("train", recipe.heal.attention_tokens if changed else 0, recipe.seed),
        lora=ids("train", recipe.heal.tokens, recipe.seed + 1),
        validation=ids("calibration", VALIDATION_SEQUENCES * length),
    )
    if not len(lessons.attention) and not len(lessons.lora):
        raise ConfigError(
            "there is nothing to train",
            found=f"heal.attention_tokens {recipe.heal.attention_tokens}, heal.tokens {recipe.heal.tokens}, "
            f"{plan.model.layers - plan.count('full')} changed layers",
            do="give one of the two stages some tokens",
        )
    batch = recipe.heal.batch_sequences * recipe.heal.gradient_accumulation
    for name, rows in (("attention_tokens", lessons.attention), ("tokens", lessons.lora)):
        if 0 < len(rows) < batch:
            raise ConfigError(
                f"heal.{name} is less than one step",
                found=f"{len(rows)} sequences of {length} tokens; a step takes {batch}",
                do="raise it, or lower heal.batch_sequences or heal.gradient_accumulation",
            )
    return lessons


def heal_identity(recipe: Recipe, plan: PlanFile) -> dict[str, Any]:
    """Everything the healed weights depend on, in plain JSON."""
    settings = recipe.heal.model_dump(mode="json", exclude={"save_steps"})
    text = recipe.text.model_dump(mode="json")
    return {"schema_version": 1, "plan": plan.hash(), "seed": recipe.seed, "heal": settings, "text": text}


def healed_from(folder: Path) -> str | None:
    """The fingerprint of the identity a healed checkpoint was made from; None if there is none."""
    file = folder / IDENTITY
    return fingerprint(json.loads(file.read_text())) if file.is_file() else None


def check_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """Raise ConfigError for LoRA targets that the model does not have."""
    linear = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    unknown = set(targets) - linear
    if unknown:
        raise ConfigError(
            f"heal.lora_targets names layers that do not exist: {', '.join(sorted(unknown))}",
            found=f"this model has {', '.join(sorted(linear))}",
        )


def check_begun(work: Path, identity: dict[str, Any], resume: bool) -> None:
    """Raise ConfigError when RUN/heal holds the work of other settings, or any work that is not to be resumed."""
    file = work / IDENTITY
    if not file.is_file():
        return
    there = json.loads(file.read_text())
    if there != identity:
        changed = [
            f"{section}.{key}: {there[section].get(key)} there, {value} here"
            for section in ("heal", "text")
            for key, value in identity[section].items()
            if there[section].get(key) != value
        ]
        changed += [f"{key} differs" for key in ("plan", "seed") if there[key] != identity[key]]
        raise ConfigError(
            f"{work} was begun with other settings",
            found="; ".join(changed),
            do=f"use another --run folder, or delete {work}",
        )
    if not resume:
        raise ConfigError(f"{work} holds unfinished healing", do=f"leave --no-resume out, or delete {work}")
    log.info("going on with %s", work)


def train(
    recipe: Recipe, folder: Path, plan: PlanFile, teacher: PreTrainedModel, student: PreTrainedModel, lessons: Lessons
) -> None:
    """Both stages, each kept in `folder` when it ends."""
    settings, seed = recipe.heal, recipe.seed
    if len(lessons.attention):
        train_changed_layers(student, plan.layers)
        first = AttentionDistiller(student, teacher, plan.layers)
        train_stage("attention", first, lessons.attention, settings.attention_lr, settings, folder, seed=seed)
    if len(lessons.lora):
        train_everything(student)
        second = LogitDistiller(student, teacher, settings.temperature)
        held = lessons.validation.to(teacher.device)

        def validate() -> dict[str, float]:
            return validation(teacher, student, held)

        train_stage("lora", second, lessons.lora, settings.lr, settings, folder, seed=seed, validate=validate)


def train_changed_layers(student: PreTrainedModel, layers: list[LayerPlan]) -> None:
    """Stage 1 trains the adapters of what it teaches: a sliding layer's attention, an attention-free layer's MLP."""
    sliding = {entry.layer for entry in layers if entry.attention == "sliding"}
    none = {entry.layer for entry in layers if entry.attention == "none"}
    attention = FAMILIES[student.config.model_type].attention
    for name, parameter in student.named_parameters():
        parts = name.split(".")
        layer = int(parts[parts.index("layers") + 1]) if "layers" in parts else -1
        learns = (layer in sliding and attention in parts) or layer in none
        parameter.requires_grad_(learns and ("lora_" in name or parts[-1] == "sinks"))


def train_everything(student: PreTrainedModel) -> None:
    """Stage 2 trains every adapter and every sink."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("lora_" in name or name.endswith(".sinks"))


@torch.no_grad()
def validation(teacher: PreTrainedModel, student: PreTrainedModel, ids: torch.Tensor) -> dict[str, float]:
    """KL to the base and NLL of the student on ids `[N, T]` that are not trained on."""
    kl, nll = [], []
    for batch in ids.split(2):
        target, hidden = (
            model.get_decoder()(input_ids=batch, use_cache=False).last_hidden_state for model in (teacher, student)
        )
        _, (losses,) = token_losses(teacher, target, batch, [hidden], student)
        kl.append(losses.kl)
        nll.append(losses.nll)
    return {"validation_kl": float(torch.cat(kl).mean()), "validation_nll": float(torch.cat(nll).mean())}
