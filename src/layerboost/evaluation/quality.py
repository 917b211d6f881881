"""Models against their base: losses on held-out text, and paired differences over benchmark items."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean, stdev
from typing import Any

import torch
from transformers import PreTrainedModel

from layerboost.errors import GateMissed
from layerboost.evaluation.tasks import BenchTask, ItemScores, item_scores, task_value
from layerboost.recipe import Evaluate
from layerboost.sensitivity.metrics import SequenceLosses, token_losses


@torch.inference_mode()
def hidden_states(
    model: PreTrainedModel, batches: list[torch.Tensor], advance: Callable[[float], None]
) -> list[torch.Tensor]:
    """Normed final hidden states of every batch of ids `[B, T]`: `[B, T, D]` in main memory.

    `advance` is called with the tokens done since the last call.
    """
    found = []
    for batch in batches:
        found.append(_decode(model, batch).cpu())
        advance(batch.numel())
    return found


@torch.inference_mode()
def base_losses(model: PreTrainedModel, batches: list[torch.Tensor], hidden: list[torch.Tensor]) -> SequenceLosses:
    """NLL of the base over all sequences, `[N]` in nats per token; its KL to itself is 0 by definition."""
    nll = torch.cat(
        [
            token_losses(model, states.to(model.device), batch.to(model.device), [])[0].cpu()
            for batch, states in zip(batches, hidden, strict=True)
        ]
    )
    return SequenceLosses(kl=torch.zeros_like(nll), nll=nll)


@torch.inference_mode()
def changed_losses(
    base: PreTrainedModel,
    base_hidden: list[torch.Tensor],
    changed: PreTrainedModel,
    batches: list[torch.Tensor],
    advance: Callable[[float], None],
) -> SequenceLosses:
    """KL(base ‖ changed) and NLL of the changed model over all sequences, `[N]` in nats per token."""
    parts = []
    for batch, states in zip(batches, base_hidden, strict=True):
        other = _decode(changed, batch)
        _, [losses] = token_losses(base, states.to(base.device), batch.to(base.device), [other], changed)
        parts.append(losses)
        advance(batch.numel())
    return SequenceLosses(torch.cat([part.kl for part in parts]).cpu(), torch.cat([part.nll for part in parts]).cpu())


def mean_and_error(values: list[float]) -> dict[str, float]:
    """Mean and its standard error; an error of 0 where one value alone tells nothing about it."""
    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": fmean(values), "standard_error": error}


def compare_task(task: BenchTask, results: Mapping[str, dict[str, Any]], base: str) -> dict[str, Any]:
    """One task over all models: lm-eval's value of each, and each difference from the base, paired item by item.

    `results`: lm-eval's result by model. Standard errors are those of a mean over items.
    """
    scores = {model: item_scores(task, result) for model, result in results.items()}
    return {
        "metric": task.metric,
        "items": task.items,
        "models": {
            model: {
                "value": task_value(task, result),
                "standard_error": mean_and_error(list(scores[model].values()))["standard_error"],
            }
            for model, result in results.items()
        },
        "difference": {
            model: paired_difference(scores[base], found) for model, found in scores.items() if model != base
        },
    }


def paired_difference(base: ItemScores, changed: ItemScores) -> dict[str, float]:
    """Mean over items of changed minus base, with the standard error of that mean. Both must hold the same items."""
    assert base.keys() == changed.keys()
    return mean_and_error([changed[item] - base[item] for item in base])


def check_gate(comparison: Mapping[str, Any], settings: Evaluate) -> None:
    """Raise GateMissed when the last changed model lost more than the recipe allows.

    The gate looks at the means; whether the sample could have seen the loss is what their standard errors tell.
    """
    model = [name for name in comparison["models"] if name != "base"][-1:]
    missed = []
    for name in model:
        kl = comparison["perplexity"].get(name, {}).get("kl", {}).get("mean")
        if settings.max_kl is not None and kl is not None and kl > settings.max_kl:
            missed.append(f"KL {kl:.4f} of {name}, at most {settings.max_kl}")
        difference = (comparison["average"] or {}).get("difference", {}).get(name)
        if settings.max_average_drop is not None and difference and -difference["mean"] > settings.max_average_drop:
            missed.append(
                f"average accuracy of {name} falls by {-difference['mean']:.4f}, at most {settings.max_average_drop}"
            )
    if missed:
        raise GateMissed(
            "the quality gate was missed", found="; ".join(missed), do="heal longer or plan a larger budget"
        )


def average_tasks(tasks: Mapping[str, dict[str, Any]]) -> dict[str, Any] | None:
    """The plain mean over tasks, in the shape of one; tasks are independent samples. None without tasks."""
    if not tasks:
        return None
    first = next(iter(tasks.values()))

    def combined(kind: str, key: str, model: str) -> dict[str, float]:
        found = [task[kind][model] for task in tasks.values()]
        error = sum(each["standard_error"] ** 2 for each in found) ** 0.5 / len(found)
        return {key: fmean(each[key] for each in found), "standard_error": error}

    return {
        "metric": "mean over tasks",
        "items": sum(task["items"] for task in tasks.values()),
        "models": {model: combined("models", "value", model) for model in first["models"]},
        "difference": {model: combined("difference", "mean", model) for model in first["difference"]},
    }


def _decode(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = model.get_decoder()(input_ids=batch.to(model.device), use_cache=False).last_hidden_state
    return hidden
