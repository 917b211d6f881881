"""Models against their base on benchmark items: paired differences; tasks on which layers were chosen are marked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from layerboost.evaluating.statistics import average_difference, paired, weighted_mean
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
                    standard_error=_score(task, by_item).standard_error,
                )
                for model, by_item in scores[task.name].items()
            },
            difference=_differences([task], scores, right_or_wrong=True),
            margin=_margins(task, results[task.name]),
        )
        for task in tasks
    }
    headline = [task for task in tasks if not compared[task.name].selection]
    return compared, _average(headline, compared, scores) if headline else None


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
        models={model: _score(task, by_item) for model, by_item in margins.items()},
        difference=_differences([task], {task.name: margins}, right_or_wrong=False),
    )


def _score(task: BenchTask, by_item: ItemScores) -> Score:
    """Return the mean of a task's items, weighted as lm-eval weights them."""
    samples = [Score.of(list(part.values())) for part in task.samples_of(by_item)]
    return weighted_mean(samples, [1 / len(samples)] * len(samples))


def _average(tasks: Sequence[BenchTask], compared: Mapping[str, Task], scores: Scores) -> Task:
    """Return the unweighted mean over tasks, as a task; tasks are independent samples."""

    def mean_value(model: str) -> TaskValue:
        values = [compared[task.name].models[model] for task in tasks]
        error = math.hypot(*(each.standard_error for each in values)) / len(values)
        return TaskValue(value=fmean(each.value for each in values), standard_error=error)

    return Task(
        metric="mean over tasks",
        tasks=[task.name for task in tasks],
        items=sum(task.items for task in tasks),
        models={model: mean_value(model) for model in compared[tasks[0].name].models},
        difference=_differences(tasks, scores, right_or_wrong=True),
    )


def _differences(tasks: Sequence[BenchTask], scores: Scores, right_or_wrong: bool) -> dict[str, Change]:
    """Return each model's difference from the base, the mean over tasks."""
    return {
        model: _difference(
            [(task, scores[task.name][BASE], scores[task.name][model]) for task in tasks], right_or_wrong
        )
        for model in scores[tasks[0].name]
        if model != BASE
    }


def average_against(results: list[tuple[BenchTask, Result, Result]]) -> Change:
    """Return the mean over tasks of the second model minus the first, paired by item, with its interval."""
    return _difference(
        [(task, item_scores(task, first), item_scores(task, second)) for task, first, second in results], True
    )


def _difference(tasks: Sequence[tuple[BenchTask, ItemScores, ItemScores]], right_or_wrong: bool) -> Change:
    """Return the mean over tasks of second minus first, the items of each weighted as lm-eval weights them."""
    samples: list[list[float]] = []
    weights: list[float] = []
    for task, first, second in tasks:
        parts = list(zip(task.samples_of(first), task.samples_of(second), strict=True))
        samples += [paired(*part) for part in parts]
        weights += [1 / (len(tasks) * len(parts))] * len(parts)
    return average_difference(samples, right_or_wrong, weights)
