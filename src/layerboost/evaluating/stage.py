"""evaluate: compare base and changed models on held-out text, lm-eval's tasks and long contexts, item by item."""

from __future__ import annotations

import importlib.metadata
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from layerboost.errors import ConfigError
from layerboost.evaluating.comparison import compare_tasks
from layerboost.evaluating.gate import gate_checks, validate_gate
from layerboost.evaluating.long_context import (
    BATCH_TOKENS,
    compare_positions,
    compare_retrieval,
    position_edges,
    position_losses,
    retrieval_answers,
)
from layerboost.evaluating.quality import base_losses, changed_losses, compare_text, hidden_states, perplexity
from layerboost.evaluating.results import Facts, Results
from layerboost.model.base import Base, find_model
from layerboost.model.checkpoint import check_comparable, check_further
from layerboost.model.modeling import decoder_layers
from layerboost.probes.metrics import check_values
from layerboost.recipe import Recipe
from layerboost.retrieval import Prompts, retrieval_prompts
from layerboost.runtime import Progress, Runtime, log
from layerboost.schemas.artifact import fingerprint, json_text, read_json, write_json
from layerboost.schemas.evaluation import EvalComparison, TextInfo
from layerboost.schemas.run import SENSITIVITY
from layerboost.schemas.sensitivity import Sensitivity
from layerboost.tasks.checks import check_items
from layerboost.tasks.lm_eval import BenchTask, load_bench, run_task, task_value
from layerboost.text import SAMPLES, Tokens, check_samples, load_tokens

BASE = "base"


def check(recipe: Recipe, run: Path, base: Base) -> None:
    """Raise ConfigError for what `run_evaluate` cannot use, apart from text that the model has yet to write."""
    tokenizer, context_tokens = base.tokenizer, base.config.max_position_embeddings
    _check_settings(recipe, context_tokens)
    check_further(recipe.evaluate.checkpoints, run, base)
    check_items(load_bench(recipe.evaluate), tokenizer, context_tokens)
    if recipe.evaluate.perplexity_text or "self" not in recipe.text.sources or (run / SAMPLES).is_file():
        _load_texts(recipe, tokenizer, run)
    else:
        check_samples(recipe.text, _most_tokens(recipe), "held_out")


def _most_tokens(recipe: Recipe) -> int:
    """Return the held-out tokens that the largest part of the evaluation needs."""
    settings = recipe.evaluate
    prompts = settings.retrieval_prompts * max(settings.retrieval_tokens, default=0)
    return max(settings.perplexity_tokens, settings.position_sequences * settings.position_tokens, prompts)


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


def run_evaluate(recipe: Recipe, run: Path, models: Mapping[str, Path], runtime: Runtime) -> EvalComparison:
    """Evaluate `models` (directories by name, with `base`), write RUN/eval/comparison.json and return its content.

    Results already in RUN/eval are reused. One model at a time is in memory, with the head of the base. Raise
    ConfigError for settings, data and models that cannot be used, and for results in RUN/eval made from others.
    """
    if BASE not in models:
        raise ConfigError("nothing to compare with: no model has the name base", found=", ".join(models))
    names = [BASE, *(name for name in models if name != BASE)]
    found = {name: find_model(str(models[name]), runtime, run, recipe.trust_remote_code) for name in names}
    base = found[BASE]
    for name in names[1:]:
        check_comparable(found[name], base)
    _check_settings(recipe, base.config.max_position_embeddings)
    work = _Work(
        recipe=recipe,
        runtime=runtime,
        models=found,
        tasks=load_bench(recipe.evaluate),
        texts=_load_texts(recipe, base.tokenizer, run),
    )
    check_items(work.tasks, base.tokenizer, base.config.max_position_embeddings)
    jobs = {name: _jobs(work, name) for name in names}
    results = Results(run / "eval", {job.file: job.facts for found in jobs.values() for job in found})
    _fill(work, jobs, results)
    comparison = _compare(work, results, _selection(run))
    write_json(run / "eval" / "comparison.json", comparison)
    log.info("wrote %s", run / "eval" / "comparison.json")
    return comparison


@dataclass(frozen=True)
class _Texts:
    """The held-out text, long sequences of it, and retrieval prompts in it; None or empty if not needed."""

    text: Tokens | None
    long: Tokens | None
    prompts: list[Prompts]


@dataclass(frozen=True)
class _Work:
    """The inputs of one evaluation; models by name, the base first."""

    recipe: Recipe
    runtime: Runtime
    models: dict[str, Base]
    tasks: list[BenchTask]
    texts: _Texts

    @cached_property
    def batches(self) -> list[torch.Tensor]:
        """Return the held-out text in batches."""
        assert self.texts.text is not None
        return self.texts.text.batches(max(1, BATCH_TOKENS // self.recipe.text.sequence_tokens))

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


@dataclass(frozen=True)
class _Job:
    """One result file: the facts it must be made from, and the function that makes it from the loaded model."""

    file: str
    facts: Facts
    make: Callable[[PreTrainedModel], str]


def _load_texts(recipe: Recipe, tokenizer: Any, run: Path) -> _Texts:
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
    return _Texts(
        # A standard error over sequences needs two of them.
        text=load(max(settings.perplexity_tokens, 2 * length), length) if settings.perplexity_tokens else None,
        long=load(settings.position_sequences * long, long) if long else None,
        prompts=prompts,
    )


def _selection(run: Path) -> list[str]:
    """Return the tasks on which layers were chosen."""
    file = run / SENSITIVITY
    found = read_json(file, Sensitivity, "layerboost measure").settings.get("tasks") if file.is_file() else None
    return list(found or [])


def _jobs(work: _Work, name: str) -> list[_Job]:
    """Return every result file of one model."""
    texts = work.texts
    made_from: Facts = {"model": work.models[name].fingerprint, "dtype": work.runtime.dtype_name}
    jobs = []
    if texts.text:
        facts = {**made_from, "base": work.models[BASE].fingerprint, "text": texts.text.fingerprint}
        jobs.append(_Job(_text_file(name), facts, lambda model: _text_losses(work, name, model)))
    if texts.long:
        facts = {**made_from, "text": texts.long.fingerprint}
        jobs.append(_Job(_positions_file(name), facts, lambda model: _position_result(work, name, model)))
    if texts.prompts:
        facts = {**made_from, "prompts": fingerprint([prompts.ids.tolist() for prompts in texts.prompts])}
        jobs.append(_Job(_retrieval_file(name), facts, lambda model: _retrieval_result(work, name, model)))
    for task in work.tasks:
        facts = {
            **made_from,
            "limit": work.recipe.evaluate.limit,
            "data": task.data,
            "lm_eval": importlib.metadata.version("lm-eval"),
        }
        jobs.append(_Job(_task_file(name, task), facts, partial(_task_result, work, name, task)))
    return jobs


def _fill(work: _Work, jobs: Mapping[str, list[_Job]], results: Results) -> None:
    """Make every missing result file, loading each model once."""
    for name, handle in work.models.items():
        missing = [job for job in jobs[name] if results.missing(job.file)]
        if not missing:
            log.info("%s: results exist already", name)
            continue
        if name == BASE:
            model = work.base
        else:
            work.free_base(any(job.file == _text_file(name) for job in missing))
            model = handle.load()
        for job in missing:
            results.save(job.file, job.make(model))
        del model  # before the next one is loaded


def _progress(description: str, batches: list[torch.Tensor]) -> Progress:
    return Progress(description, sum(batch.numel() for batch in batches), "tokens")


def _text_losses(work: _Work, name: str, model: PreTrainedModel) -> str:
    """Return KL and NLL of every sequence, as JSON."""
    if name == BASE:
        losses = base_losses(model, work.batches, work.base_hidden)
    else:
        with _progress(f"held-out text: {name}", work.batches) as progress:
            losses = changed_losses(work.base, work.base_hidden, model, work.batches, progress.advance)
    assert work.texts.text is not None
    check_values(f"NLL of {name} on held-out text", losses.nll, model, work.texts.text.ids)
    check_values(f"KL to the base of {name} on held-out text", losses.kl, model, work.texts.text.ids)
    log.info("%s: perplexity %.3f, KL %.4f", name, perplexity(float(losses.nll.mean())), float(losses.kl.mean()))
    return _json(_text_file(name), nll=losses.nll.tolist(), kl=losses.kl.tolist())


def _json(file: str, **values: Any) -> str:
    return json_text({"schema_version": 1, **values}, file, indent=1)


def _position_result(work: _Work, name: str, model: PreTrainedModel) -> str:
    """Return the NLL of every long sequence in every bucket of positions, as JSON."""
    assert work.texts.long is not None
    ids = work.texts.long.ids
    with _progress(f"long text: {name}", [ids]) as progress:
        nll = position_losses(model, ids, progress.advance)
    check_values(f"NLL of {name} by position", torch.tensor(nll).sum(1), model, ids)
    return _json(_positions_file(name), edges=position_edges(ids.shape[1]), nll=nll)


def _retrieval_result(work: _Work, name: str, model: PreTrainedModel) -> str:
    """Return the result of every retrieval prompt, as JSON."""
    prompts = work.texts.prompts
    with _progress(f"retrieval: {name}", [part.ids for part in prompts]) as progress:
        answers = retrieval_answers(model, prompts, progress.advance)
    for answer, row in zip(answers, (row for part in prompts for row in part.ids), strict=True):
        what = f"log-probability of an answer ({answer['kind']}) of {name}"
        check_values(what, torch.tensor([answer["log_probability"]]), model, row[None])
    right = sum(answer["exact"] for answer in answers)
    log.info("%s: %d of %d retrieval prompts answered", name, right, len(answers))
    return _json(_retrieval_file(name), answers=answers)


def _task_result(work: _Work, name: str, task: BenchTask, model: PreTrainedModel) -> str:
    started = time.monotonic()
    with Progress(f"{task.name}: {name}", task.items, "items") as progress:
        result = run_task(
            task, model, work.models[BASE].tokenizer, work.recipe.evaluate.batch_size, progress.advance, name
        )
    value, seconds = task_value(task, json.loads(result)), time.monotonic() - started
    log.info("%s: %s %s %.4f (%d items, %.1f s)", name, task.name, task.metric, value, task.items, seconds)
    return result


def _compare(work: _Work, results: Results, selection: list[str]) -> EvalComparison:
    """Return the content of comparison.json, from the result files alone."""
    settings, names, texts = work.recipe.evaluate, list(work.models), work.texts

    def read(file: Callable[[str], str]) -> dict[str, dict[str, Any]]:
        return {name: results.read(file(name)) for name in names}

    found = {task.name: read(partial(_task_file, task=task)) for task in work.tasks}
    tasks, average = compare_tasks(work.tasks, found, BASE, selection)
    answers = {name: result["answers"] for name, result in read(_retrieval_file).items()} if texts.prompts else {}
    comparison = EvalComparison(
        settings={
            "tasks": list(settings.tasks),
            "limit": settings.limit,
            "bench_data": settings.bench_data,
            "items": {task.name: _items(task) for task in work.tasks},
            "dtype": work.runtime.dtype_name,
            "lm_eval": importlib.metadata.version("lm-eval"),
        },
        models={name: handle.fingerprint for name, handle in work.models.items()},
        selection=selection,
        text=_text_info(work),
        perplexity=compare_text(read(_text_file), BASE) if texts.text else {},
        tasks=tasks,
        average=average,
        positions=compare_positions(read(_positions_file), BASE) if texts.long else None,
        retrieval=compare_retrieval(answers, BASE) if answers else None,
    )
    return comparison.model_copy(update={"gate": gate_checks(comparison, settings)})


def _text_info(work: _Work) -> TextInfo | None:
    if work.texts.text is None:
        return None
    source = work.recipe.evaluate.perplexity_text or f"{work.recipe.text.name} (held-out split)"
    sequences, length = work.texts.text.ids.shape
    return TextInfo(
        source=source,
        tokens=sequences * length,
        sequence_tokens=length,
        fingerprint=work.texts.text.fingerprint,
    )


def _items(task: BenchTask) -> dict[str, Any]:
    """Return the source of a task's items and, for a subset, their numbers."""
    where = {"origin": task.origin, "split": task.split, "fingerprint": task.data}
    return where | ({"samples": task.samples} if task.samples else {})


def _text_file(model: str) -> str:
    return f"{model}.text.json"


def _task_file(model: str, task: BenchTask) -> str:
    return f"{model}.{task.name}.json"


def _positions_file(model: str) -> str:
    return f"{model}.positions.json"


def _retrieval_file(model: str) -> str:
    return f"{model}.retrieval.json"
