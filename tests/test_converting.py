from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import RUNTIME, layer_plans, plan_file, save_text, save_tiny

from layerboost.costs.budget import plan_parameters
from layerboost.errors import ConfigError
from layerboost.model.base import find_model
from layerboost.model.surgery import Thinned
from layerboost.model.thinning import thin_mlps
from layerboost.pipeline import run_stage
from layerboost.planning.choices import predict
from layerboost.recipe import Recipe, parse_recipe
from layerboost.schemas.plan import write_plan
from layerboost.schemas.run import PLAN


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    values = {
        "model": str(folder / "model"),
        "text": {"source": str(folder / "text.jsonl"), "sequence_tokens": 48},
        "measure": {"windows": [8], "tokens": 192},
        **changes,
    }
    return parse_recipe(values, "the test")


def test_a_checkpoint_of_the_same_plan_stays_and_one_of_another_dtype_does_not(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", layers=3)
    save_text(tmp_path / "text.jsonl")
    run = tmp_path / "run"
    run.mkdir()
    write_plan(run / PLAN, plan_file("fSn", 8, find_model(str(tmp_path / "model"), RUNTIME).info))
    weights = run / "converted" / "model.safetensors"
    for dtype, made in (("float32", True), ("float32", False), ("bfloat16", True)):
        before = weights.stat().st_mtime_ns if weights.exists() else 0
        run_stage("convert", recipe_of(tmp_path, dtype=dtype), run)
        assert (weights.stat().st_mtime_ns > before) == made
        assert {str(value.dtype) for value in load_file(weights).values()} == {f"torch.{dtype}"}


def test_the_converted_mlps_are_those_that_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(tmp_path / "model", layers=3)
    save_text(tmp_path / "text.jsonl")
    seen: dict[tuple[int, int], Thinned] = {}

    def remember(*given: Any) -> dict[tuple[int, int], Thinned]:
        seen.update(thin_mlps(*given))
        return seen

    monkeypatch.setattr("layerboost.measuring.stage.thin_mlps", remember)
    measure = {"windows": [8], "tokens": 192, "retrieval_prompts": 0, "components": ["attention", "mlp"]}
    recipe, run = recipe_of(tmp_path, measure=measure, plan={"parameter_fraction": 0.8}), tmp_path / "run"
    sensitivity = run_stage("measure", recipe, run)
    planned = run_stage("plan", recipe, run)
    assert planned.valid_prediction.parameter_fraction <= 0.8
    layers = layer_plans("tuo", 8)
    write_plan(run / PLAN, plan_file("tuo", 8, sensitivity.model))
    converted = run_stage("convert", recipe, run)
    states, base = (load_file(folder / "model.safetensors") for folder in (converted, tmp_path / "model"))
    left, whole = (sum(value.numel() for value in each.values()) for each in (states, base))
    assert left / whole == pytest.approx(predict(sensitivity, layers, recipe.plan).parameter_fraction)
    for layer in range(3):
        found, name = seen[layer, 48], f"model.layers.{layer}.mlp"
        assert torch.equal(states[f"{name}.down_proj.weight"], found.output)
        for part in ("gate_proj", "up_proj"):
            assert torch.equal(states[f"{name}.{part}.weight"], base[f"{name}.{part}.weight"][found.neurons])
    # The same settings go on, others do not.
    assert run_stage("measure", recipe, run) == sensitivity
    other = recipe_of(tmp_path, measure={**measure, "mlp_widths": [0.5]})
    with pytest.raises(ConfigError, match=r"mlp_widths: \[64, 48, 32\] there, \[48\] here"):
        run_stage("measure", other, run)


def test_the_card_says_how_many_parameters_are_left(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", layers=3)
    save_text(tmp_path / "text.jsonl")
    facts, run = find_model(str(tmp_path / "model"), RUNTIME).info, tmp_path / "run"
    layers = layer_plans("ftm")
    write_plan(run / PLAN, plan_file("ftm", model=facts))
    converted = run_stage("convert", recipe_of(tmp_path), run)
    files = (converted, tmp_path / "model")
    left, whole = (sum(value.numel() for value in load_file(file / "model.safetensors").values()) for file in files)
    assert plan_parameters(facts, layers) / facts.parameters == pytest.approx(left / whole)
    assert f"It has {left / whole:.0%} of the base's parameters" in (converted / "README.md").read_text()
