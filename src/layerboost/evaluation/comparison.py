"""Models against their base over benchmark items: every difference paired, the tasks that chose layers set apart."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from layerboost.evaluation.statistics import average_difference, difference, mean_and_error, paired
from layerboost.evaluation.tasks import BenchTask, ItemScores, item_margins, item_scores, task_value

Result = dict[str, Any]


def compare_tasks(
    tasks: list[BenchTask], results: Mapping[str, Mapping[str, Result]], base: str, selection: list[str]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Every task over all models, and the average over tasks; `results`: lm-eval's result by task and model.

    Tasks in `selection` chose the layers: they are marked and not in the average, which is None when no other is left.
    """
    compared, differences = {}, {}
    for task in tasks:
        scores = {model: item_scores(task, result) for model, result in results[task.name].items()}
        compared[task.name] = {
            "metric": task.metric,
            "items": task.items,
            "selection": chose_layers(task.name, selection),
            "models": {
                model: {
                    "value": task_value(task, results[task.name][model]),
                    "standard_error": mean_and_error(list(found.values()))["standard_error"],
                }
                for model, found in scores.items()
            },
            "difference": _differences(scores, base, right_or_wrong=True),
            "margin": _margins(task, results[task.name], base),
        }
        differences[task.name] = {
            model: paired(scores[base], found) for model, found in scores.items() if model != base
        }
    headline = [name for name, task in compared.items() if not task["selection"]]
    return compared, _average(
        {name: compared[name] for name in headline}, {name: differences[name] for name in headline}
    )


def chose_layers(task: str, selection: list[str]) -> bool:
    """Whether layers were chosen on this task, on a part of it or on the group it is a part of."""
    return any(task == name or task.startswith(f"{name}_") or name.startswith(f"{task}_") for name in selection)


def _differences(
    scores: Mapping[str, ItemScores], base: str, right_or_wrong: bool = False
) -> dict[str, dict[str, float]]:
    return {
        model: difference(paired(scores[base], found), right_or_wrong)
        for model, found in scores.items()
        if model != base
    }


def _margins(task: BenchTask, results: Mapping[str, Result], base: str) -> dict[str, Any] | None:
    """The log-probability margin of the right answer; None for a task that has no single right choice."""
    margins = {model: item_margins(task, result) for model, result in results.items()}
    if not margins[base]:
        return None
    return {
        "unit": "nats per character" if task.metric == "acc_norm" else "nats",
        "models": {model: mean_and_error(list(found.values())) for model, found in margins.items()},
        "difference": _differences(margins, base),
    }


def _average(tasks: Mapping[str, dict[str, Any]], differences: Mapping[str, dict[str, list[float]]]) -> Any:
    """The plain mean over tasks, in the shape of one; tasks are independent samples."""
    if not tasks:
        return None
    first = next(iter(tasks.values()))

    def mean_value(model: str) -> dict[str, float]:
        found = [task["models"][model] for task in tasks.values()]
        error = sum(each["standard_error"] ** 2 for each in found) ** 0.5 / len(found)
        return {"value": fmean(each["value"] for each in found), "standard_error": error}

    return {
        "metric": "mean over tasks",
        "tasks": list(tasks),
        "items": sum(task["items"] for task in tasks.values()),
        "models": {model: mean_value(model) for model in first["models"]},
        "difference": {
            model: average_difference([found[model] for found in differences.values()]) for model in first["difference"]
        },
    }


def average_against(results: list[tuple[BenchTask, Result, Result]]) -> dict[str, float]:
    """The mean over tasks of second model less first, paired by item, with its interval."""
    return average_difference(
        [paired(item_scores(task, first), item_scores(task, second)) for task, first, second in results]
    )
