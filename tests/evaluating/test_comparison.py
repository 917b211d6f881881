from __future__ import annotations

import json
from typing import Any

import pytest
from tiny_bench import tiny_model, tiny_tokenizer, write_bench

from layerboost.evaluating.comparison import chose_layers, compare_tasks
from layerboost.recipe import Evaluate
from layerboost.tasks.lm_eval import load_bench, run_task

NAMES = ("piqa", "arc_easy")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], dict[str, dict[str, Any]]]:
    """Two tasks and lm-eval's results of two models."""
    bench = write_bench(tmp_path_factory.mktemp("bench"))
    tasks = load_bench(Evaluate(tasks=NAMES, bench_data=str(bench)))
    tokenizer, models = tiny_tokenizer(), {"base": tiny_model(0), "healed": tiny_model(1)}
    results = {
        task.name: {
            name: json.loads(run_task(task, model, tokenizer, "auto", lambda items: None))
            for name, model in models.items()
        }
        for task in tasks
    }
    return tasks, results


def test_margins_and_scores_stand_side_by_side(found: tuple[list[Any], dict[str, dict[str, Any]]]) -> None:
    compared, average = compare_tasks(*found, [])
    assert average is not None
    assert average.tasks == list(NAMES)
    assert average.items == 24
    values = [compared[name].difference["healed"].mean for name in NAMES]
    assert average.difference["healed"].mean == pytest.approx(sum(values) / 2)
    for task, unit in zip(compared.values(), ("nats", "nats per character"), strict=True):
        assert task.margin
        assert task.margin.unit == unit
        means = [task.margin.models[model].mean for model in ("base", "healed")]
        assert task.margin.difference["healed"].mean == pytest.approx(means[1] - means[0])
        # Scores of 12 items are coarse; margins of two random models always differ.
        assert task.margin.difference["healed"].standard_error > 0


def test_tasks_that_chose_layers_are_not_in_the_headline(found: tuple[list[Any], dict[str, dict[str, Any]]]) -> None:
    compared, average = compare_tasks(*found, ["arc_easy"])
    assert {name: task.selection for name, task in compared.items()} == {"piqa": False, "arc_easy": True}
    assert average is not None
    assert average.tasks == ["piqa"]
    assert average.models["base"].value == compared["piqa"].models["base"].value
    assert compare_tasks(*found, list(NAMES))[1] is None


def test_parts_and_groups_of_a_selection_task_count_too() -> None:
    assert chose_layers("mmlu_anatomy", ["mmlu"])
    assert chose_layers("mmlu", ["mmlu_anatomy"])
    assert not chose_layers("arc_easy", ["arc_challenge"])


def test_automatic_batches_give_the_scores_of_single_items(
    found: tuple[list[Any], dict[str, dict[str, Any]]],
) -> None:
    tasks, results = found
    alone = json.loads(run_task(tasks[0], tiny_model(0), tiny_tokenizer(), 1, lambda items: None))
    assert results["piqa"]["base"]["config"]["batch_size"] == "auto"
    for one, many in zip(alone["samples"]["piqa"], results["piqa"]["base"]["samples"]["piqa"], strict=True):
        assert [float(pair[0]) for pair in one["filtered_resps"]] == pytest.approx(
            [float(pair[0]) for pair in many["filtered_resps"]], abs=1e-4
        )
