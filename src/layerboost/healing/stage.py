"""heal: least squares, attention distillation, then LoRA distillation from the base → healed/, adapters merged."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from layerboost.errors import ConfigError
from layerboost.healing.data import (
    VALIDATION_SEQUENCES,
    Data,
    batch_of_process,
    check_lengths,
    cut,
    lengths_of,
    load_requests,
)
from layerboost.healing.distillers import AttentionDistiller, Distiller, LogitDistiller, Targets, positions_of
from layerboost.healing.least_squares import check_fit, fit_stage
from layerboost.healing.recall import with_recall
from layerboost.healing.sharding import shard
from layerboost.healing.student import adapted_layers, describe, shared_student, train_only, with_adapters
from layerboost.healing.training import check_report_to, enough_memory, load_result, train_stage
from layerboost.model.base import Base, open_base
from layerboost.model.card import origin_of
from layerboost.model.checkpoint import check_same_model, check_same_plan, save_boosted
from layerboost.model.integrity import check_checkpoint, is_intact
from layerboost.model.modeling import auto_class
from layerboost.probes.metrics import SequenceLosses, check_values, token_losses
from layerboost.probes.samples import write_samples
from layerboost.recipe import Heal, Recipe, Text, recipe_yaml
from layerboost.runtime import Runtime, is_main_process, log, main_process_first, start_runtime
from layerboost.schemas.artifact import fingerprint, write_json
from layerboost.schemas.plan import LayerPlan, PlanFile, read_plan
from layerboost.schemas.run import CONVERTED, HEAL, HEALED, PLAN
from layerboost.strategies import SLIDING
from layerboost.text import Tokens, check_samples, is_local, last_changed, load_tokens, opening_ids
from layerboost.traffic import Reread, Traffic

IDENTITY, TEXT = "heal.json", "text.json"
HEALED_BY = "Healed by"
# Sequences of each stage that are searched for tokens beyond the window, and the fraction of them that is too small.
LOOKED_AT, FEW_BEYOND = 64, 0.05


def check(recipe: Recipe, run: Path, base: Base) -> None:
    """Raise ConfigError for settings and text that `run_heal` cannot use."""
    check_report_to(recipe.heal.report_to)
    check_fit(recipe)
    check_lengths(recipe, base.config.max_position_embeddings)
    if recipe.heal.lora_targets:
        with torch.device("meta"):
            model = auto_class(base.model_config).from_config(base.model_config)
        layers = read_plan(run / PLAN).layers if (run / PLAN).is_file() else []
        checked_layers(model, layers, recipe.heal)
    most = max(recipe.heal.fit_tokens, recipe.heal.attention_tokens, recipe.heal.tokens)
    if recipe.heal.traffic:
        load_requests(recipe, base.tokenizer, most)
        return
    check_samples(recipe.text, most, "train")
    if all(map(is_local, recipe.text.sources)):
        load_tokens(training_text(recipe), base.tokenizer, "train", most)


def run_heal(recipe: Recipe, run: Path) -> Path:
    """Train RUN/converted against the base, from the last checkpoint in RUN/heal; write and return RUN/healed.

    Under torchrun every process trains and the first one writes. Raise ConfigError before training, also if RUN/heal
    was started with other settings.
    """
    plan = read_plan(run / CONVERTED / PLAN)
    check_same_plan(plan, run / CONVERTED, run / PLAN, "convert")
    runtime = start_runtime(recipe)
    identity = heal_identity(recipe, plan, runtime)
    if read_identity(run / HEALED / IDENTITY) == identity and is_intact(run / HEALED):
        log.info("%s is up to date", run / HEALED)
        sources = [recipe.heal.traffic] if recipe.heal.traffic else recipe.text.sources
        if last_changed(sources) > (run / HEALED / IDENTITY).stat().st_mtime:
            log.warning(
                "%s has changed since %s was healed on it. To heal on what it holds now, delete %s and %s",
                *(" + ".join(sources), run / HEALED, run / HEAL, run / HEALED),
            )
        return run / HEALED
    check_begun(run / HEAL, identity)
    check_checkpoint(run / CONVERTED)
    check_report_to(recipe.heal.report_to)
    batch_of_process(recipe.heal)
    check_fit(recipe)
    with main_process_first():
        base = open_base(recipe, run, runtime)
        if not recipe.heal.traffic:
            write_samples(recipe, run, base)
    check_same_model(plan, base.info, run / CONVERTED / PLAN)
    check_lengths(recipe, base.info.max_context_tokens)
    text = load_text(recipe, run, plan, base.tokenizer)
    check_same_text(run / HEAL, text)
    pair = load_pair(recipe, run, plan, base, text)
    if is_main_process():
        write_json(run / HEAL / TEXT, {"fingerprint": text.fingerprint})
        write_json(run / HEAL / IDENTITY, identity)
    fitted = train(recipe, run / HEAL, plan, pair, text, base.tokenizer.eos_token_id, runtime.device)
    if is_main_process():
        if recipe.heal.shard:
            pair = load_healed(recipe, run, plan, base, text)
        # The base shares the weights that the adapters are merged into: it is unusable from here on.
        pair.adapters.merge_and_unload()
        save_boosted(
            pair.student.requires_grad_(False).eval(),
            base.tokenizer,
            plan,
            run / HEALED,
            recipe_yaml=recipe_yaml(recipe),
            origin=origin_of(base.folder, base.name, recipe.card),
            healing=card_text(recipe, text, fitted),
        )
        write_json(run / HEALED / IDENTITY, identity)
    return run / HEALED


def card_text(recipe: Recipe, text: HealingText, fitted: list[int]) -> str:
    """Return the model card's sentences on healing, in one line."""
    traffic = recipe.heal.traffic
    source = f"the requests in {Path(traffic).name}" if traffic else recipe.text.name
    sentences = (
        f"{HEALED_BY} {text.tokens['attention']:,} tokens of attention distillation and {text.tokens['lora']:,} "
        f"tokens of LoRA distillation from the base, on {source}."
    )
    if fitted:
        sentences += (
            f" Before that, the output projections of {len(fitted)} sliding layers were fitted to "
            f"{text.fit_tokens:,} tokens by least squares."
        )
    return sentences


STAGES = ("attention", "lora")


@dataclass(frozen=True)
class HealingText:
    """The sequences `[L]` of each stage, of which the first `tokens[stage]` tokens are trained on.

    `answers` `[L]`: where the next token of a sequence of stage 2 answers. `asking`: validation text that asks for what
    it said before, if answers weigh more than other tokens. `fit_tokens`: the first tokens of the attention stage, for
    the fit before it. `fingerprint`: of all text. `given`: what goes with the ids of each sequence, empty for text.
    """

    sequences: dict[str, list[torch.Tensor]]
    answers: list[torch.Tensor]
    asking: Traffic | None
    fit_tokens: int
    tokens: dict[str, int]
    validation: Tokens | Traffic
    fingerprint: str
    given: Sequence[Reread] = ()

    @property
    def stages(self) -> list[str]:
        return [stage for stage in STAGES if self.tokens[stage]]


def training_text(recipe: Recipe) -> Text:
    """Return the text in sequences of healing's greatest length."""
    return recipe.text.model_copy(update={"sequence_tokens": max(lengths_of(recipe))})


def load_text(recipe: Recipe, run: Path, plan: PlanFile, tokenizer: Any) -> HealingText:
    """Return all text or requests of the run, read before training; raise ConfigError if there is too little."""
    changed = [entry for entry in plan.layers if entry.changed]
    learns = any(entry.learns_alone for entry in changed)
    tokens = {"attention": recipe.heal.attention_tokens if learns else 0, "lora": recipe.heal.tokens}
    fit_tokens = recipe.heal.fit_tokens if any(entry.attention == SLIDING for entry in changed) else 0
    if not any((fit_tokens, *tokens.values())):
        raise ConfigError(
            "there is nothing to train",
            found=f"heal.fit_tokens {recipe.heal.fit_tokens}, heal.attention_tokens {recipe.heal.attention_tokens}, "
            f"heal.tokens {recipe.heal.tokens}, {len(changed)} changed layers",
            do="give one of the stages some tokens",
        )

    if recipe.heal.traffic:
        found = _request_text(recipe, tokenizer, tokens, fit_tokens)
        warn_of_short_documents(found.sequences["lora"][:LOOKED_AT], plan.window, None)
        return found
    seeds = {name: recipe.seed + index for index, name in enumerate(STAGES)}
    needed = {**tokens, "attention": max(tokens["attention"], fit_tokens)}
    train = {
        name: load_tokens(training_text(recipe), tokenizer, "train", count, run=run, seed=seeds[name])
        for name, count in needed.items()
        if count
    }
    validation = load_tokens(
        recipe.text, tokenizer, "calibration", VALIDATION_SEQUENCES * recipe.text.sequence_tokens, run=run
    )
    opening, fraction = opening_ids(tokenizer), recipe.heal.retrieval_share
    made = {
        name: with_recall(cut(read.ids, lengths_of(recipe), opening), tokenizer, fraction, seeds[name])
        for name, read in train.items()
    }
    every = [ids for sequences, _ in made.values() for ids in sequences[:LOOKED_AT]]
    warn_of_short_documents(every, plan.window, tokenizer.eos_token_id)
    # Another release may ask in other words.
    asking = [ids.tolist() for sequences, _ in made.values() for ids in sequences] if fraction else []
    return HealingText(
        sequences={name: sequences for name, (sequences, _) in made.items()},
        answers=made["lora"][1] if "lora" in made else [],
        asking=asking_text(validation, tokenizer, recipe.seed) if fraction and recipe.heal.answer_weight > 1 else None,
        fit_tokens=fit_tokens,
        tokens=tokens,
        validation=validation,
        fingerprint=fingerprint(*(read.fingerprint for read in (*train.values(), validation)), *asking),
    )


def asking_text(text: Tokens, tokenizer: Any, seed: int) -> Traffic | None:
    """Return sequences that ask for what they said before, with their answers scored; None if they are too short."""
    made, answers = with_recall(list(text.ids), tokenizer, 1.0, seed)
    rows = [(ids, answer.roll(1)) for ids, answer in zip(made, answers, strict=True) if answer.any()]
    return Traffic(torch.stack([ids for ids, _ in rows]), torch.stack([scored for _, scored in rows])) if rows else None


def _request_text(recipe: Recipe, tokenizer: Any, tokens: dict[str, int], fit_tokens: int) -> HealingText:
    """Return the requests of heal.traffic, the same for both stages, each of which ends with a request."""
    validation, requests, found = load_requests(recipe, tokenizer, max(fit_tokens, *tokens.values()))
    ends = [0, *accumulate(len(request.ids) for request in requests)]
    sequences = [torch.tensor(request.ids) for request in requests]
    log.info("healing on requests: %d that hold %d tokens, those of images included", len(requests), ends[-1])
    return HealingText(
        sequences=dict.fromkeys(STAGES, sequences),
        answers=[torch.tensor([*request.scored[1:], False]) for request in requests],
        asking=None,
        fit_tokens=fit_tokens,
        tokens={stage: next(end for end in ends if end >= count) for stage, count in tokens.items()},
        validation=validation,
        fingerprint=found,
        given=[request.reread for request in requests],
    )


def warn_of_short_documents(sequences: Sequence[torch.Tensor], window: int | None, end: int | None) -> None:
    """Warn if sequences `[L]` have barely a token from which a window drops anything: attention is masked between
    documents, so that nothing is learnt of what is lost."""
    if window is None:
        return
    positions = torch.cat([positions_of(ids[None], end)[0] for ids in sequences])
    beyond = float((positions >= window).float().mean())
    if beyond < FEW_BEYOND:
        log.warning(
            "only %.1f %% of the tokens that heal are further than the window of %d from the start of their document; "
            "on the others a window loses nothing. Give %s",
            100 * beyond,
            window,
            "longer documents, longer sequences (heal.sequence_tokens) or heal.retrieval_share"
            if end is not None
            else "longer requests, and raise text.sequence_tokens if it truncates them",
        )


@dataclass(frozen=True)
class Pair:
    """The base and the student on its weights; the student's adapters, and the layers that each stage adapts."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    adapters: PeftModel
    adapted: dict[str, frozenset[str]]


def load_pair(recipe: Recipe, run: Path, plan: PlanFile, base: Base, text: HealingText) -> Pair:
    """Return base and converted model, with the same new adapters on every process; on the CPU if they will be sharded.

    Raise ConfigError for targets that do not exist or leave nothing to train.
    """
    if recipe.heal.shard:
        base = replace(base, runtime=replace(base.runtime, device=torch.device("cpu")))
    teacher = base.load()
    adapted = checked_layers(teacher, plan.layers, recipe.heal)
    log.info("adapters by stage, in layers: %s", describe({stage: adapted[stage] for stage in text.stages}))
    student = shared_student(teacher, run / CONVERTED, plan.layers)
    torch.manual_seed(recipe.seed)
    # A fit alone trains no adapter, and feature maps alone none, but peft needs some.
    names = frozenset[str]().union(*(adapted[stage] for stage in text.stages)) or adapted["attention"] | adapted["lora"]
    return Pair(teacher, student, with_adapters(student, names, recipe.heal.lora_rank), adapted)


def checked_layers(model: PreTrainedModel, layers: list[LayerPlan], heal: Heal) -> dict[str, frozenset[str]]:
    """Return `adapted_layers`; raise ConfigError for targets that do not exist or leave nothing to train."""
    adapted = adapted_layers(model, layers, heal.lora_targets)
    if heal.tokens and not adapted["lora"] and not any(entry.sink for entry in layers):
        raise ConfigError(
            "heal.lora_targets leave stage 2 nothing to train",
            found=f"none of {', '.join(heal.lora_targets or ())} is in a layer from the first changed one up",
            do="name layers of the MLPs too, or set heal.tokens to 0",
        )
    return adapted


def load_healed(recipe: Recipe, run: Path, plan: PlanFile, base: Base, text: HealingText) -> Pair:
    """Return the pair, loaded on this process's CPU with the results in RUN/heal: no device must hold it all."""
    pair = load_pair(recipe, run, plan, base, text)
    for stage in text.stages:
        train_only(pair.student, stage, pair.adapted[stage])
        load_result(stage, Distiller(pair.student, pair.teacher, plan.layers), run / HEAL)
    return pair


def heal_identity(recipe: Recipe, plan: PlanFile, runtime: Runtime) -> dict[str, Any]:
    """Return all that the healed weights depend on, as JSON values; the split of a step into batches does not count."""
    free = {"save_steps", "report_to", "activation_checkpointing", "batch_sequences", "gradient_accumulation", "shard"}
    free |= set() if recipe.heal.traffic else {"traffic"}  # so that work of earlier releases goes on
    settings = recipe.heal.model_dump(mode="json", exclude=free)
    settings["batch_sequences × gradient_accumulation"] = (
        recipe.heal.batch_sequences * recipe.heal.gradient_accumulation
    )
    return {
        "schema_version": 1,
        "plan": plan.hash(),
        "seed": recipe.seed,
        "dtype": runtime.dtype_name,
        "heal": settings,
        "text": recipe.text.model_dump(mode="json"),
    }


def read_identity(file: Path) -> dict[str, Any] | None:
    """Return the identity in a file, None without one."""
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def check_begun(work: Path, identity: dict[str, Any]) -> None:
    """Raise ConfigError if RUN/heal holds work that was started with other settings."""
    there = read_identity(work / IDENTITY)
    if there is None:
        return
    if there != identity:
        old, new = _flat(there), _flat(identity)
        changed = [key for key in {**new, **old} if old.get(key) != new.get(key)]
        raise ConfigError(
            f"{work} was started with other settings",
            found="; ".join(f"{key}: {old.get(key)} there, {new.get(key)} here" for key in changed),
            do=f"use another --run folder, or delete {work}",
        )
    log.info("resuming %s", work)


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """Return the values of an identity by their dotted keys in the recipe."""
    sections = {f"{name}.{key}": value for name in ("heal", "text") for key, value in identity[name].items()}
    return sections | {key: value for key, value in identity.items() if key not in ("heal", "text")}


def check_same_text(work: Path, text: HealingText) -> None:
    """Raise ConfigError if RUN/heal was started on other text than its source has now."""
    file = work / TEXT
    if file.is_file() and json.loads(file.read_text(encoding="utf-8"))["fingerprint"] != text.fingerprint:
        raise ConfigError(
            f"{work} was started on another text",
            found="the tokens from text.source or heal.traffic have changed, or another release made its retrieval "
            "sequences",
            do=f"restore the old text, use another --run folder, or delete {work}",
        )


def train(
    recipe: Recipe,
    folder: Path,
    plan: PlanFile,
    pair: Pair,
    text: HealingText,
    end: int | None,
    device: torch.device,
) -> list[int]:
    """Run all stages, saving each in `folder` at its end; return the layers whose output projection was fitted.

    `end`: the token that ends a document.
    """
    settings, student = recipe.heal, pair.student
    models = student, pair.teacher, plan.layers, end
    logits = LogitDistiller(
        *models,
        temperature=settings.temperature,
        ce_weight=settings.ce_weight,
        checkpointing=settings.activation_checkpointing,
    )
    local = AttentionDistiller(*models)
    distillers = {"attention": local, "lora": logits}
    validation = Validation(logits, text.validation.batches(settings.batch_sequences, device))
    if settings.shard:
        shards = shard(pair.teacher, student, device)
        shards.gather_for(validation, "measure")
        for distiller in distillers.values():
            shards.gather_for(distiller, "forward")
    fitted = []
    if text.fit_tokens:
        with enough_memory(settings):
            sequences = text.sequences["attention"]
            fitted = fit_stage(local, sequences, text.fit_tokens, folder, validation.measure, text.given)
    for stage in text.stages:
        train_only(student, stage, pair.adapted[stage])
        repeats, weights = settings.attention_repeats, None
        if stage == "lora":
            # Of a request its answers alone count, as where layers are measured.
            other, answer = (0.0, 1.0) if text.given else (1.0, settings.answer_weight)
            repeats, weights = 1, [other + (answer - other) * answers for answers in text.answers]
            validation.asking = text.asking.batches(settings.batch_sequences, device) if text.asking else ()
        data = Data(text.sequences[stage], text.tokens[stage], settings, repeats, weights, text.given)
        train_stage(stage, distillers[stage], data, settings, folder, validation.measure)
        local.cache.clear()
    return fitted


@dataclass
class Validation:
    """KL to the base and NLL of the student on batches of held-out text `[B, T]` or of requests, and the KL on the
    answers of text that asks; the base runs on them once."""

    distiller: LogitDistiller
    batches: Sequence[torch.Tensor | Traffic]
    asking: Sequence[Traffic] = ()
    targets: list[Targets] = field(default_factory=list)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Return `validation_kl` and `validation_nll`, in nats per token, of requests per token of an answer; with text
        that asks also `validation_answer_kl`."""
        teacher, student = self.distiller.teacher, self.distiller.student
        found: list[SequenceLosses] = []
        parts = [
            (batch.ids, batch.given, batch.scored) if isinstance(batch, Traffic) else (batch, None, None)
            for batch in (*self.batches, *self.asking)
        ]
        self.targets += [self.distiller.compute_targets(ids, given) for ids, given, _ in parts[len(self.targets) :]]
        for (ids, given, scored), targets in zip(parts, self.targets, strict=True):
            output = self.distiller.student_output(targets)
            found.append(token_losses(teacher, targets.output, ids, output, student, scored))
            check_values("NLL of the base on a validation sequence", found[-1].base_nll, teacher, ids, given)
        count = len(self.batches)
        kl, nll, _ = (torch.cat(values) for values in zip(*found[:count], strict=True))
        values = {"validation_kl": float(kl.mean()), "validation_nll": float(nll.mean())}
        if self.asking:
            values["validation_answer_kl"] = float(torch.cat([losses.kl for losses in found[count:]]).mean())
        return values
