"""evaluate: compare base and changed models on held-out text, lm-eval's tasks and long contexts, item by item."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from layerboost.errors import ConfigError
from layerboost.evaluating.comparison import compare_tasks
from layerboost.evaluating.gate import gate_checks, validate_gate
from layerboost.evaluating.held_out import (
    BATCH_TOKENS,
    compare_positions,
    compare_retrieval,
    compare_text,
    hidden_states,
    position_edges,
    position_losses,
    retrieval_answers,
    text_losses,
)
from layerboost.evaluating.results import Facts, Results, read_result
from layerboost.model.base import Base
from layerboost.model.checkpoint import check_comparable, check_extra_checkpoints
from layerboost.model.modeling import decoder_layers
from layerboost.probes.metrics import check_values
from layerboost.recipe import Recipe
from layerboost.retrieval import Prompts, retrieval_prompts
from layerboost.runtime import Progress, log
from layerboost.schemas.artifact import fingerprint, json_text, read_json, write_json
from layerboost.schemas.evaluation import EvalComparison, TextInfo, perplexity
from layerboost.schemas.run import BASE, SENSITIVITY
from layerboost.schemas.sensitivity import Sensitivity
from layerboost.tasks.checks import check_items
from layerboost.tasks.lm_eval import BenchTask, load_bench, run_task, task_value
from layerboost.text import SAMPLES, Tokens, check_samples, load_tokens


def check(recipe: Recipe, run: Path, base: Base) -> None:
    """Raise ConfigError for what `run_evaluate` cannot use, apart from text that the model has yet to write."""
    _check_settings(recipe, base.config.max_position_embeddings)
    check_extra_checkpoints(recipe.evaluate.checkpoints, run, base)
    check_items(load_bench(recipe.evaluate), base.tokenizer, base.config.max_position_embeddings)
    if recipe.evaluate.perplexity_text or "self" not in recipe.text.sources or (run / SAMPLES).is_file():
        _load_texts(recipe, base.tokenizer, run)
    else:
        settings = recipe.evaluate
        prompts = settings.retrieval_prompts * max(settings.retrieval_tokens, default=0)
        most = max(settings.perplexity_tokens, settings.position_sequences * settings.position_tokens, prompts)
        check_samples(recipe.text, most, "held_out")


def _check_settings(recipe: Recipe, context_tokens: int) -> None:
    validate_gate(recipe.evaluate)
    held_out = recipe.text.sequence_tokens if recipe.evaluate.perplexity_tokens else 0
    longest = max(held_out, recipe.evaluate.position_tokens, *recipe.evaluate.retrieval_tokens)
    if longest > context_tokens:
        raise ConfigError(
            "text.sequence_tokens, evaluate.position_tokens and evaluate.retrieval_tokens must be within the model's "
            "context",
            found=f"{longest:,} tokens, a context of {context_tokens:,}",
        )


def run_evaluate(recipe: Recipe, run: Path, models: Mapping[str, Base]) -> EvalComparison:
    """Evaluate `models` (by name, with `base`), write RUN/eval/comparison.json and return its content.

    Results already in RUN/eval are reused. One model at a time is in memory, with the head of the base. Raise
    ConfigError for settings, data and models that cannot be used, and for results in RUN/eval made from others.
    """
    base = models[BASE]
    for name, model in models.items():
        if name != BASE:
            check_comparable(model, base)
    _check_settings(recipe, base.config.max_position_embeddings)
    tasks = load_bench(recipe.evaluate)
    texts = _load_texts(recipe, base.tokenizer, run)
    work = _Work(recipe, {BASE: base, **models}, {task.name: task for task in tasks}, *texts)
    check_items(tasks, base.tokenizer, base.config.max_position_embeddings)
    required = {(name, part): facts for name in work.models for part, facts in _facts(work, name).items()}
    folder = run / "eval"
    _fill(work, Results(folder, required))
    comparison = _compare(work, folder, _selection(run))
    write_json(folder / "comparison.json", comparison)
    log.info("wrote %s", folder / "comparison.json")
    return comparison


@dataclass(frozen=True)
class _Work:
    """The inputs of one evaluation: models by name, the base first; tasks by name; texts, if they are needed."""

    recipe: Recipe
    models: dict[str, Base]
    tasks: dict[str, BenchTask]
    text: Tokens | None
    long: Tokens | None
    prompts: list[Prompts]

    @cached_property
    def batches(self) -> list[torch.Tensor]:
        """Return the held-out text in batches."""
        assert self.text is not None
        return self.text.batches(max(1, BATCH_TOKENS // self.recipe.text.sequence_tokens))

    @cached_property
    def base(self) -> PreTrainedModel:
        """Return the base, loaded on first use."""
        return self.models[BASE].load()

    @cached_property
    def base_hidden(self) -> list[torch.Tensor]:
        """Return the base's hidden states over the held-out text."""
        with _progress("held-out text: base", self.batches) as progress:
            return hidden_states(self.base, self.batches, progress.advance)

    def free_base(self, compares_text: bool) -> None:
        """Free the base before another model loads: comparing text needs only its hidden states and its head."""
        if compares_text:
            assert self.base_hidden
            del decoder_layers(self.base)[:]
        elif "base_hidden" not in self.__dict__:
            self.__dict__.pop("base", None)


def _load_texts(recipe: Recipe, tokenizer: Any, run: Path) -> tuple[Tokens | None, Tokens | None, list[Prompts]]:
    """Return the held-out text, long sequences of it, and retrieval prompts in it; None or empty if not needed."""
    settings = recipe.evaluate

    def load(tokens: int, length: int) -> Tokens:
        text = recipe.text.model_copy(update={"sequence_tokens": length})
        if settings.perplexity_text:
            text = text.model_copy(update={"source": settings.perplexity_text})
        return load_tokens(text, tokenizer, "all" if settings.perplexity_text else "held_out", tokens, run=run)

    length, long = recipe.text.sequence_tokens, settings.position_tokens
    prompts = []
    for size in settings.retrieval_tokens:
        filler = load(settings.retrieval_prompts * size, size).ids.flatten()
        prompts += [
            retrieval_prompts(tokenizer, filler, form, size, settings.retrieval_prompts, recipe.seed)
            for form in settings.retrieval_forms
        ]
    # A standard error over sequences needs two of them.
    held_out = load(max(settings.perplexity_tokens, 2 * length), length) if settings.perplexity_tokens else None
    return held_out, load(settings.position_sequences * long, long) if long else None, prompts


def _selection(run: Path) -> list[str]:
    """Return the tasks on which layers were chosen."""
    file = run / SENSITIVITY
    tasks = read_json(file, Sensitivity, "layerboost measure").settings.get("tasks") if file.is_file() else None
    return list(tasks or [])


def _facts(work: _Work, name: str) -> dict[str, Facts]:
    """Return what each result of one model must be made from, by part: text, positions, retrieval or a task."""
    parts: dict[str, Facts] = {}
    if work.text:
        parts["text"] = {"base": work.models[BASE].fingerprint, "text": work.text.fingerprint}
    if work.long:
        parts["positions"] = {"text": work.long.fingerprint}
    if work.prompts:
        parts["retrieval"] = {
            "evaluate.retrieval_forms": [prompts.kind for prompts in work.prompts],
            "prompts": fingerprint([prompts.ids.tolist() for prompts in work.prompts]),
        }
    limits = {"limit": work.recipe.evaluate.limit, "lm_eval": importlib.metadata.version("lm-eval")}
    parts |= {task.name: limits | {"data": task.data} for task in work.tasks.values()}
    model = work.models[name]
    return {part: {"model": model.fingerprint, "dtype": model.runtime.dtype_name, **parts[part]} for part in parts}


def _fill(work: _Work, results: Results) -> None:
    """Make every missing result file, loading each model once."""
    for name, handle in work.models.items():
        missing = results.missing(name)
        if not missing:
            log.info("%s: results exist already", name)
            continue
        if name == BASE:
            model = work.base
        else:
            work.free_base("text" in missing)
            model = handle.load()
        for part in missing:
            results.save(name, part, _result(work, name, part, model))
        del model  # before the next one is loaded


def _result(work: _Work, name: str, part: str, model: PreTrainedModel) -> str:
    """Return the content of one result file, as JSON."""
    if part in work.tasks:
        return _task_result(work, name, work.tasks[part], model)
    measure = {"text": _text_losses, "positions": _position_result, "retrieval": _retrieval_result}[part]
    return json_text({"schema_version": 1, **measure(work, name, model)}, f"{part} of {name}", indent=1)


def _progress(description: str, batches: list[torch.Tensor]) -> Progress:
    return Progress(description, sum(batch.numel() for batch in batches), "tokens")


def _text_losses(work: _Work, name: str, model: PreTrainedModel) -> dict[str, Any]:
    """Return NLL and KL of every sequence."""
    hidden, changed = work.base_hidden, None if name == BASE else model
    with _progress(f"losses on held-out text: {name}", work.batches) as progress:
        losses = text_losses(work.base, hidden, changed, work.batches, progress.advance)
    assert work.text is not None
    check_values(f"NLL of {name} on held-out text", losses.nll, model, work.text.ids)
    check_values(f"KL to the base of {name} on held-out text", losses.kl, model, work.text.ids)
    log.info("%s: perplexity %.3f, KL %.4f", name, perplexity(float(losses.nll.mean())), float(losses.kl.mean()))
    return {"nll": losses.nll.tolist(), "kl": losses.kl.tolist()}


def _position_result(work: _Work, name: str, model: PreTrainedModel) -> dict[str, Any]:
    """Return the NLL of every long sequence in every bucket of positions."""
    assert work.long is not None
    ids = work.long.ids
    with _progress(f"long text: {name}", [ids]) as progress:
        nll = position_losses(model, ids, progress.advance)
    check_values(f"NLL of {name} by position", torch.tensor(nll).sum(1), model, ids)
    return {"edges": position_edges(ids.shape[1]), "nll": nll}


def _retrieval_result(work: _Work, name: str, model: PreTrainedModel) -> dict[str, Any]:
    """Return the result of every retrieval prompt."""
    with _progress(f"retrieval: {name}", [part.ids for part in work.prompts]) as progress:
        answers = retrieval_answers(model, work.prompts, progress.advance)
    for answer, row in zip(answers, (row for part in work.prompts for row in part.ids), strict=True):
        what = f"log-probability of an answer ({answer['kind']}) of {name}"
        check_values(what, torch.tensor([answer["log_probability"]]), model, row[None])
    right = sum(answer["exact"] for answer in answers)
    log.info("%s: %d of %d retrieval prompts answered", name, right, len(answers))
    return {"answers": answers}


def _task_result(work: _Work, name: str, task: BenchTask, model: PreTrainedModel) -> str:
    started = time.monotonic()
    tokenizer, batch_size = work.models[BASE].tokenizer, work.recipe.evaluate.batch_size
    with Progress(f"{task.name}: {name}", task.items, "items") as progress:
        result = run_task(task, model, tokenizer, batch_size, progress.advance, name)
    value, seconds = task_value(task, json.loads(result)), time.monotonic() - started
    log.info("%s: %s %s %.4f (%d items, %.1f s)", name, task.name, task.metric, value, task.items, seconds)
    return result


def _compare(work: _Work, folder: Path, selection: list[str]) -> EvalComparison:
    """Return the content of comparison.json, from the result files in `folder` alone."""
    settings = work.recipe.evaluate

    def read(part: str) -> dict[str, dict[str, Any]]:
        return {name: read_result(folder, name, part) for name in work.models}

    tasks, average = compare_tasks(list(work.tasks.values()), {name: read(name) for name in work.tasks}, selection)
    answers = {name: result["answers"] for name, result in read("retrieval").items()} if work.prompts else {}
    comparison = EvalComparison(
        settings={
            "tasks": list(settings.tasks),
            "limit": settings.limit,
            "bench_data": settings.bench_data,
            "items": {name: _items(task) for name, task in work.tasks.items()},
            "dtype": work.models[BASE].runtime.dtype_name,
            "lm_eval": importlib.metadata.version("lm-eval"),
        },
        models={name: model.fingerprint for name, model in work.models.items()},
        selection=selection,
        text=_text_info(work.recipe, work.text) if work.text else None,
        perplexity=compare_text(read("text")) if work.text else {},
        tasks=tasks,
        average=average,
        positions=compare_positions(read("positions")) if work.long else None,
        retrieval=compare_retrieval(answers) if answers else None,
    )
    return comparison.model_copy(update={"gate": gate_checks(comparison, settings)})


def _text_info(recipe: Recipe, text: Tokens) -> TextInfo:
    source = recipe.evaluate.perplexity_text or f"{recipe.text.name} (held-out split)"
    length = text.ids.shape[1]
    return TextInfo(source=source, tokens=text.tokens, sequence_tokens=length, fingerprint=text.fingerprint)


def _items(task: BenchTask) -> dict[str, Any]:
    """Return the source of a task's items and, for a subset, their numbers."""
    where = {"origin": task.origin, "split": task.split, "fingerprint": task.data}
    return where | ({"samples": task.samples} if task.samples else {})
