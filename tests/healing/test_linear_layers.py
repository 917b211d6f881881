"""What healing trains in layers with linear attention, saves and resumes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_heal import recipe_of
from tiny import RUNTIME, boosted, layer_plans, plan_file, save_text, save_tiny, tiny_model

from layerboost.healing.distillers import AttentionDistiller
from layerboost.model.base import find_model
from layerboost.model.linear_attention import FEATURE_PARAMETERS, LOLCATS_PARAMETERS
from layerboost.model.surgery import output_projection
from layerboost.pipeline import run_stage
from layerboost.schemas.healing import read_metrics
from layerboost.schemas.plan import write_plan
from layerboost.schemas.run import PLAN

IDS = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))
QUERY_KEY_VALUE = ["q_proj", "k_proj", "v_proj"]


def run_of(folder: Path, letters: str, **heal: Any) -> tuple[Path, Any]:
    """A run folder up to the convert stage, and its recipe."""
    save_tiny(folder / "model", layers=len(letters))
    save_text(folder / "text.jsonl")
    (folder / "run").mkdir()
    write_plan(folder / "run" / PLAN, plan_file(letters, 8, find_model(str(folder / "model"), RUNTIME).info))
    recipe = recipe_of(folder, **heal)
    run_stage("convert", recipe, folder / "run")
    return folder / "run", recipe


def changed(run: Path, healed: Path) -> set[str]:
    before, after = (load_file(folder / "model.safetensors") for folder in (run / "converted", healed))
    assert before.keys() == after.keys()
    return {name.removeprefix("model.layers.") for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.pipeline
def test_lolcats_learns_feature_maps_and_then_adapters(tmp_path: Path) -> None:
    targets = [*QUERY_KEY_VALUE, "o_proj"]
    run, recipe = run_of(tmp_path, "fll", fit_tokens=0, attention_lr=1e-2, tokens=200, lora_targets=targets)
    healed = run_stage("heal", recipe, run)
    maps = {f"{layer}.self_attn.{name}" for layer in (1, 2) for name in LOLCATS_PARAMETERS}
    weights = {f"{layer}.self_attn.{name}.weight" for layer in (1, 2) for name in targets}
    assert changed(run, healed) == maps | weights
    first = load_file(run / "heal" / "attention.safetensors")
    assert {name.partition("layers.")[2] for name in first} == maps
    states = load_file(healed / "model.safetensors")
    assert all(torch.equal(value, states[name.removeprefix("student.")]) for name, value in first.items())
    losses = [
        line.loss for line in read_metrics(run / "heal" / "metrics.jsonl") if line.stage == "attention" and line.loss
    ]
    assert losses[-1] < losses[0]

    # Resumed from the results of the stages, and from a checkpoint within the first.
    for lost in ([], [run / "heal" / "attention.safetensors", run / "heal" / "lora.safetensors"]):
        shutil.rmtree(healed)
        for file in lost:
            file.unlink()
        run_stage("heal", recipe, run)
        again = load_file(healed / "model.safetensors")
        assert all(torch.equal(again[name], value) for name, value in states.items())


@pytest.mark.parametrize(("letters", "learned"), [("fl", LOLCATS_PARAMETERS), ("fD", FEATURE_PARAMETERS)])
def test_feature_maps_alone(letters: str, learned: tuple[str, ...], tmp_path: Path) -> None:
    run, recipe = run_of(tmp_path, letters, fit_tokens=0, attention_lr=1e-2, tokens=0)
    assert changed(run, run_stage("heal", recipe, run)) == {f"1.self_attn.{name}" for name in learned}


def test_liger_has_one_stage(tmp_path: Path) -> None:
    """The fit and stage 1 have nothing to do in such a plan, whatever tokens they are given."""
    run, recipe = run_of(tmp_path, "fL", tokens=200, lora_targets=QUERY_KEY_VALUE)
    assert changed(run, run_stage("heal", recipe, run)) == {f"1.self_attn.{name}.weight" for name in QUERY_KEY_VALUE}
    assert {line.stage for line in read_metrics(run / "heal" / "metrics.jsonl")} == {"lora"}


def test_stage_1_compares_heads_before_the_output_projection() -> None:
    """Against the whole base and a student that gets its inputs: mean squared errors over the base's mean square."""
    student, teacher = boosted("flL"), tiny_model(layers=3).requires_grad_(False)
    distiller = AttentionDistiller(student, teacher, layer_plans("flL"))
    losses = distiller.layer_losses(IDS)
    assert list(losses) == [1]
    heads: dict[str, torch.Tensor] = {}
    for name, model in (("base", teacher), ("student", student)):
        projection = output_projection(model, 1)
        projection.register_forward_pre_hook(lambda _, args, name=name: heads.__setitem__(name, args[0]))
        model(IDS, use_cache=False)  # layer 0 is the base's, so the inputs of layer 1 are equal
    error = (heads["student"] - heads["base"]).square().mean((1, 2))
    torch.testing.assert_close(losses[1], (error / heads["base"].square().mean((1, 2))).mean())
    losses[1].backward()
    touched = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert {f"model.layers.1.self_attn.{name}" for name in LOLCATS_PARAMETERS} <= touched
    assert not any("o_proj" in name or "layers.2" in name for name in touched)
