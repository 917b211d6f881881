"""Models against their base on benchmark items: paired differences; tasks on which layers were chosen are marked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

from layerboost.evaluating.statistics import average_difference, differences, paired
from layerboost.schemas.evaluation import Change, Margin, Task, TaskValue
from layerboost.schemas.run import BASE
from layerboost.schemas.sensitivity import Score
from layerboost.tasks.lm_eval import BenchTask, ItemScores, item_margins, item_scores, task_value

Result = dict[str, Any]
# By task and model.
Scores = dict[str, dict[str, ItemScores]]


def compare_tasks(
    tasks: list[BenchTask], results: Mapping[str, Mapping[str, Result]], selection: list[str]
) -> tuple[dict[str, Task], Task | None]:
    """Return every task over all models, and the average over tasks; `results`: lm-eval's result by task and model.

    Tasks in `selection` chose the layers: they are marked and not in the average, which is None without other tasks.
    """
    scores: Scores = {
        task.name: {model: item_scores(task, result) for model, result in results[task.name].items()} for task in tasks
    }
    compared = {
        task.name: Task(
            metric=task.metric,
            items=task.items,
            selection=chose_layers(task.name, selection),
            models={
                model: TaskValue(
                    value=task_value(task, results[task.name][model]),
                    standard_error=Score.of(list(by_item.values())).standard_error,
                )
                for model, by_item in scores[task.name].items()
            },
            difference=differences(scores[task.name], right_or_wrong=True),
            margin=_margins(task, results[task.name]),
        )
        for task in tasks
    }
    headline = {name: task for name, task in compared.items() if not task.selection}
    return compared, _average(headline, scores) if headline else None


def chose_layers(task: str, selection: list[str]) -> bool:
    """Return whether layers were chosen on this task, on a part of it or on its group."""
    return any(task == name or task.startswith(f"{name}_") or name.startswith(f"{task}_") for name in selection)


def _margins(task: BenchTask, results: Mapping[str, Result]) -> Margin | None:
    """Return the log-probability margin of the right answer; None for a task without a single right choice."""
    margins = {model: item_margins(task, result) for model, result in results.items()}
    if not margins[BASE]:
        return None
    return Margin(
        unit="nats per character" if task.metric == "acc_norm" else "nats",
        models={model: Score.of(list(by_item.values())) for model, by_item in margins.items()},
        difference=differences(margins),
    )


def _average(tasks: Mapping[str, Task], scores: Scores) -> Task:
    """Return the unweighted mean over tasks, as a task; tasks are independent samples."""

    def mean_value(model: str) -> TaskValue:
        values = [task.models[model] for task in tasks.values()]
        error = math.hypot(*(each.standard_error for each in values)) / len(values)
        return TaskValue(value=fmean(each.value for each in values), standard_error=error)

    models = next(iter(tasks.values())).models
    return Task(
        metric="mean over tasks",
        tasks=list(tasks),
        items=sum(task.items for task in tasks.values()),
        models={model: mean_value(model) for model in models},
        difference={
            model: average_difference([paired(scores[name][BASE], scores[name][model]) for name in tasks])
            for model in models
            if model != BASE
        },
    )


def average_against(results: list[tuple[BenchTask, Result, Result]]) -> Change:
    """Return the mean over tasks of the second model minus the first, paired by item, with its interval."""
    return average_difference(
        [paired(item_scores(task, first), item_scores(task, second)) for task, first, second in results]
    )
