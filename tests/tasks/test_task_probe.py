"""The benchmark metric against lm-eval's own runs on changed models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from tiny import layer_plans
from tiny_bench import rows, tiny_model, tiny_tokenizer, write_jsonl
from transformers import PreTrainedModel

from layerboost.errors import ConfigError, LayerboostError
from layerboost.measuring.sweep import candidates, sweep
from layerboost.model.stream import LayerStream
from layerboost.model.surgery import apply_plan
from layerboost.probes.probe import TextProbe
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.sensitivity import LayerSensitivity
from layerboost.tasks.lm_eval import BenchTask, load_task, run_task, task_value
from layerboost.tasks.probe import TaskProbe, load_choices

NAMES = ["arc_easy", "mmlu", "openbookqa"]
WINDOW = 4


def sinks(_: LayerPlan) -> torch.Tensor:
    return torch.tensor([1.0, -1.0, 2.0, 0.0])


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    for name, count in (("arc_easy", 40), ("mmlu", 2), ("openbookqa", 23)):
        write_jsonl(folder / f"{name}_validation.jsonl", rows(name, count))
    return folder


def lm_evals(tasks: list[BenchTask], model: PreTrainedModel, tokenizer: Any) -> float:
    """The mean over tasks as a full run of lm-eval reports it."""
    found = [(task, json.loads(run_task(task, model, tokenizer, 8, lambda _: None))) for task in tasks]
    return fmean(task_value(task, result) for task, result in found)


def changed(plan: list[LayerPlan]) -> PreTrainedModel:
    return apply_plan(tiny_model(), plan, {entry.layer: sinks(entry) for entry in plan if entry.sink})


def test_drops_are_lm_evals_own(bench: Path) -> None:
    tokenizer, tasks = tiny_tokenizer(), load_choices(NAMES, str(bench), 12)
    probe = TaskProbe(LayerStream(tiny_model(), sinks), tokenizer, tasks, 400)
    base = lm_evals(tasks, tiny_model(), tokenizer)
    assert fmean(score.mean for score in probe.base_tasks().values()) == pytest.approx(base, abs=1e-12)
    found: list[LayerSensitivity] = []
    ids = torch.randint(3, 200, (2, 20))
    options = candidates(tiny_model().config, (WINDOW,))
    sweep([TextProbe(probe.streams.stream, [ids]), probe], options, [], lambda layers: found.extend(layers[-1:]))
    drops = set()
    for entry in found:
        for variant in entry.variants:
            plan = layer_plans("ff")
            plan[entry.layer] = LayerPlan(
                layer=entry.layer, attention=variant.attention, window=variant.window, sink=variant.sink
            )
            drop = base - lm_evals(tasks, changed(plan), tokenizer)
            assert variant.scores["benchmark"].mean == pytest.approx(drop, abs=1e-12)
            assert variant.scores["benchmark"].count == sum(task.items for task in tasks)
            assert "kl" in variant.scores
            drops.add(round(drop, 6))
    assert len(drops) > 3


def test_choices_that_share_an_input_are_computed_once(bench: Path) -> None:
    tasks = load_choices(["mmlu_anatomy"], str(bench), None)
    probe = TaskProbe(LayerStream(tiny_model()), tiny_tokenizer(), tasks, 400)
    assert sum(len(batch.numbers) for batch in probe.batches) == 4 * tasks[0].items
    assert sum(len(batch.ids) for batch in probe.batches) == tasks[0].items


def test_tasks_without_choices_are_refused(monkeypatch: pytest.MonkeyPatch, bench: Path) -> None:
    def generated(*_: Any, **__: Any) -> BenchTask:
        task = load_task("arc_easy", str(bench), 2)
        for leaf in task.leaves.values():
            leaf.OUTPUT_TYPE = "generate_until"
        return task

    monkeypatch.setattr("layerboost.tasks.probe.load_task", generated)
    with pytest.raises(ConfigError, match=r"arc_easy is not multiple choice(.|\n)*generate_until"):
        load_choices(["arc_easy"], str(bench), 2)


def test_likelihoods_that_are_not_finite_are_no_accuracy(bench: Path) -> None:
    """lm-eval takes the first NaN for the best choice, and a layer would seem to lose nothing."""
    tasks, tokenizer, ids = load_choices(["arc_easy"], str(bench), 4), tiny_tokenizer(), torch.randint(3, 200, (2, 20))
    stream = LayerStream(tiny_model(), lambda _: torch.full((4,), math.nan))
    probe = TaskProbe(stream, tokenizer, tasks, 400)
    [found] = probe.losses([layer_plans("fS", WINDOW)])
    assert found["benchmark"].isnan().all()
    with pytest.raises(
        LayerboostError, match=r"(kl|benchmark) of layer 0 made sliding .* is nan(.|\n)*the base is finite"
    ):
        sweep([TextProbe(stream, [ids]), probe], candidates(tiny_model().config, (WINDOW,)), [], lambda layers: None)
    broken = tiny_model()
    with torch.no_grad():
        broken.model.layers[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(LayerboostError, match=r"arc_easy of the base is nan\nfound: first in layer 1 "):
        TaskProbe(LayerStream(broken), tokenizer, tasks, 400)
