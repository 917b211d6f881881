"""Evaluate: base and changed models on held-out text and on lm-eval's tasks, compared item by item."""

from __future__ import annotations

import importlib.metadata
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from layerboost.artifacts import write_json
from layerboost.errors import ConfigError
from layerboost.evaluation.quality import (
    average_tasks,
    base_losses,
    changed_losses,
    compare_task,
    hidden_states,
    mean_and_error,
)
from layerboost.evaluation.results import Facts, Results
from layerboost.evaluation.tasks import BenchTask, load_bench, run_task, task_value
from layerboost.model.checkpoint import Source, find_model, load_model, load_tokenizer, model_fingerprint
from layerboost.recipe import Recipe
from layerboost.runtime import Progress, Runtime, log
from layerboost.text import SAMPLES, Tokens, load_tokens

BASE = "base"


def validate_evaluate(recipe: Recipe, tokenizer: Any, run: Path) -> None:
    """Read everything but the models that `run_evaluate` reads, so that a mistake shows before hours of compute.

    Raises ConfigError. Text that the model has yet to write (source `self`) is not looked for.
    """
    load_bench(recipe.evaluate)
    if recipe.evaluate.perplexity_text or recipe.text.source != "self" or (run / SAMPLES).is_file():
        _load_text(recipe, tokenizer, run)


def run_evaluate(recipe: Recipe, run: Path, models: Mapping[str, Path], runtime: Runtime) -> dict[str, Any]:
    """Evaluate `models` (directories by name, `base` among them) and write RUN/eval/comparison.json; returns it.

    Results already in RUN/eval are kept. Besides the base, one model at a time is in memory. Raises ConfigError for
    settings, data and models that cannot be used, and for results in RUN/eval that were made from others.
    """
    if BASE not in models:
        raise ConfigError("nothing to compare with: no model is named base", found=", ".join(models))
    names = [BASE, *(name for name in models if name != BASE)]
    sources = {name: find_model(str(models[name]), run) for name in names}
    tokenizer = load_tokenizer(sources[BASE], recipe.trust_remote_code)
    work = _Work(
        recipe=recipe,
        runtime=runtime,
        sources=sources,
        fingerprints={name: model_fingerprint(source) for name, source in sources.items()},
        tokenizer=tokenizer,
        tasks=load_bench(recipe.evaluate),
        text=_load_text(recipe, tokenizer, run),
    )
    results = Results(run / "eval", _wanted(work))
    _fill(work, results)
    comparison = _compare(work, results)
    write_json(run / "eval" / "comparison.json", comparison)
    log.info("wrote %s", run / "eval" / "comparison.json")
    return comparison


@dataclass(frozen=True)
class _Work:
    """What one evaluation is about; models by name, the base first."""

    recipe: Recipe
    runtime: Runtime
    sources: dict[str, Source]
    fingerprints: dict[str, str]
    tokenizer: Any
    tasks: list[BenchTask]
    text: Tokens | None

    @property
    def dtype(self) -> str:
        return str(self.runtime.dtype).removeprefix("torch.")


def _load_text(recipe: Recipe, tokenizer: Any, run: Path) -> Tokens | None:
    settings = recipe.evaluate
    if settings.perplexity_tokens == 0:
        return None
    # A standard error over sequences needs two of them.
    tokens = max(settings.perplexity_tokens, 2 * recipe.text.sequence_tokens)
    if settings.perplexity_text:
        text = recipe.text.model_copy(update={"source": settings.perplexity_text})
        return load_tokens(text, tokenizer, "all", tokens, run=run)
    return load_tokens(recipe.text, tokenizer, "held_out", tokens, run=run)


def _wanted(work: _Work) -> dict[str, Facts]:
    """Every result file by name, with what it must have been made from."""
    prints, wanted = work.fingerprints, {}
    for name, model in prints.items():
        if work.text:
            about: Facts = {"model": model, "base": prints[BASE], "text": work.text.fingerprint, "dtype": work.dtype}
            wanted[_text_file(name)] = about
        for task in work.tasks:
            wanted[_task_file(name, task)] = {
                "model": model,
                "limit": work.recipe.evaluate.limit,
                "data": task.data,
                "dtype": work.dtype,
                "lm_eval": importlib.metadata.version("lm-eval"),
            }
    return wanted


def _fill(work: _Work, results: Results) -> None:
    """Make every result file that is missing, each model loaded once."""
    batch_size, trust = work.recipe.evaluate.batch_size, work.recipe.trust_remote_code
    texts = [name for name in work.sources if work.text and results.missing(_text_file(name))]
    todo = {name: [task for task in work.tasks if results.missing(_task_file(name, task))] for name in work.sources}
    batches = work.text.batches(batch_size) if work.text else []
    base: PreTrainedModel | None = None
    hidden: list[torch.Tensor] = []
    if texts or todo[BASE]:
        base = load_model(work.sources[BASE], work.runtime, trust)
    if base is not None and texts:
        with Progress("held-out text: base", sum(batch.numel() for batch in batches), "tokens") as progress:
            hidden = hidden_states(base, batches, progress.advance)
    for name, source in work.sources.items():
        if name not in texts and not todo[name]:
            log.info("%s: results are there already", name)
            continue
        model = base if name == BASE else load_model(source, work.runtime, trust)
        assert model is not None
        if name in texts:
            assert base is not None
            results.save(_text_file(name), _text_losses(name, model, base, hidden, batches))
        for task in todo[name]:
            results.save(_task_file(name, task), _task_result(name, model, work.tokenizer, task, batch_size))
        del model  # before the next one is loaded


def _text_losses(
    name: str,
    model: PreTrainedModel,
    base: PreTrainedModel,
    hidden: list[torch.Tensor],
    batches: list[torch.Tensor],
) -> str:
    """KL and NLL of every sequence, as JSON."""
    if name == BASE:
        losses = base_losses(base, batches, hidden)
    else:
        with Progress(f"held-out text: {name}", sum(batch.numel() for batch in batches), "tokens") as progress:
            losses = changed_losses(base, hidden, model, batches, progress.advance)
    nll = float(losses.nll.mean())
    log.info("%s: perplexity %.3f, KL %.4f", name, math.exp(nll), float(losses.kl.mean()))
    return json.dumps({"schema_version": 1, "nll": losses.nll.tolist(), "kl": losses.kl.tolist()}, indent=1)


def _task_result(name: str, model: PreTrainedModel, tokenizer: Any, task: BenchTask, batch_size: int) -> str:
    started = time.monotonic()
    with Progress(f"{task.name}: {name}", task.items, "items") as progress:
        result = run_task(task, model, tokenizer, batch_size, progress.advance)
    value, seconds = task_value(task, json.loads(result)), time.monotonic() - started
    log.info("%s: %s %s %.4f (%d items, %.1f s)", name, task.name, task.metric, value, task.items, seconds)
    return result


def _compare(work: _Work, results: Results) -> dict[str, Any]:
    """The content of comparison.json, from the result files alone."""
    settings, names = work.recipe.evaluate, list(work.sources)
    tasks = {
        task.name: compare_task(task, {name: results.read(_task_file(name, task)) for name in names}, BASE)
        for task in work.tasks
    }
    losses = {name: results.read(_text_file(name)) for name in names} if work.text else {}
    return {
        "schema_version": 1,
        "settings": {
            "tasks": list(settings.tasks),
            "limit": settings.limit,
            "bench_data": settings.bench_data,
            "items": {task.name: _items(task) for task in work.tasks},
            "dtype": work.dtype,
            "lm_eval": importlib.metadata.version("lm-eval"),
        },
        "models": work.fingerprints,
        "text": _text_info(work),
        "perplexity": {name: _perplexity(found, losses[BASE]) for name, found in losses.items()},
        "tasks": tasks,
        "average": average_tasks(tasks),
    }


def _perplexity(losses: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    nll = mean_and_error(losses["nll"])
    paired = [own - other for own, other in zip(losses["nll"], base["nll"], strict=True)]
    return {
        "perplexity": math.exp(nll["mean"]),
        "nll": nll,
        "nll_difference": mean_and_error(paired),
        "kl": mean_and_error(losses["kl"]),
    }


def _text_info(work: _Work) -> dict[str, Any] | None:
    if work.text is None:
        return None
    source = work.recipe.evaluate.perplexity_text or f"{work.recipe.text.source} (held-out split)"
    sequences, length = work.text.ids.shape
    return {
        "source": source,
        "tokens": sequences * length,
        "sequence_tokens": length,
        "fingerprint": work.text.fingerprint,
    }


def _items(task: BenchTask) -> dict[str, Any]:
    """Where a task's items are from and, in a subset, which they are."""
    where = {"origin": task.origin, "split": task.split, "fingerprint": task.data}
    return where | ({"samples": task.samples} if task.samples else {})


def _text_file(model: str) -> str:
    return f"{model}.text.json"


def _task_file(model: str, task: BenchTask) -> str:
    return f"{model}.{task.name}.json"
