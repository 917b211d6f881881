from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import boosted, families, fitted, layer_plans, save_tiny, tiny_model

from layerboost.errors import ConfigError
from layerboost.healing.student import adapted_layers, shared_student, train_only, with_adapters
from layerboost.model.families import FAMILIES
from layerboost.model.linear import OneDNNLinear

IDS = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))
MLP = ("gate_proj", "up_proj", "down_proj")


def test_the_student_is_the_checkpoint_on_the_teachers_own_weights(tmp_path: Path) -> None:
    teacher, checkpoint = tiny_model(layers=4), boosted("fSns")
    with torch.no_grad():
        checkpoint.model.layers[0].mlp.up_proj.weight += 0.1  # a checkpoint may differ from its base
    checkpoint.save_pretrained(tmp_path)
    student = shared_student(teacher, tmp_path, layer_plans("fSns"))
    assert torch.equal(student(IDS).logits, checkpoint(IDS).logits)
    theirs = {parameter.data_ptr() for parameter in teacher.parameters()}
    own = {name for name, parameter in student.named_parameters() if parameter.data_ptr() not in theirs}
    assert own == {"model.layers.1.self_attn.sinks", "model.layers.0.mlp.up_proj.weight"}
    assert not any(parameter.requires_grad for parameter in student.parameters())
    assert torch.equal(teacher(IDS).logits, tiny_model(layers=4)(IDS).logits)


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path, letters="ffns")
    with pytest.raises(ConfigError, match="weights of its plan"):
        shared_student(tiny_model(layers=4), tmp_path, layer_plans("fSns"))  # no sinks in it
    with pytest.raises(ConfigError, match="weights of its plan"):
        shared_student(tiny_model(layers=4), tmp_path, layer_plans("fnns"))  # attention it should not have
    file = tmp_path / "model.safetensors"
    save_file({name: value[:1] for name, value in load_file(file).items()}, file)
    with pytest.raises(ConfigError, match="weights of its plan"):
        shared_student(tiny_model(layers=4), tmp_path, layer_plans("ffns"))


def test_adapters_go_where_they_can_matter() -> None:
    found = adapted_layers(tiny_model(layers=5), layer_plans("fSnfs"), None)
    attention = {f"model.layers.{layer}.self_attn.{name}_proj" for layer in (1, 4) for name in "qkvo"}
    assert found["attention"] == attention | {f"model.layers.2.mlp.{name}" for name in MLP}
    lora = {f"model.layers.{layer}.self_attn.{name}_proj" for layer in (1, 4) for name in "vo"}
    assert found["lora"] == lora | {f"model.layers.{layer}.mlp.{name}" for layer in (1, 2, 3, 4) for name in MLP}


def test_a_layer_with_another_mlp_is_adapted_whole_and_a_missing_mlp_is_not() -> None:
    found = adapted_layers(tiny_model(layers=5), layer_plans("ftomz"), None)
    attention = {f"model.layers.{layer}.self_attn.{name}_proj" for layer in (1, 3) for name in "qkvo"}
    mlps = {f"model.layers.{layer}.mlp.{name}" for layer in (1, 2) for name in MLP}
    assert found == {"attention": attention | mlps, "lora": mlps}


def test_the_student_has_the_thinned_mlps_of_the_checkpoint(tmp_path: Path) -> None:
    teacher, checkpoint = tiny_model(layers=4), boosted("ftum")
    with torch.no_grad():
        checkpoint.model.layers[1].mlp.down_proj.weight += 0.1
    checkpoint.save_pretrained(tmp_path)
    student = shared_student(teacher, tmp_path, layer_plans("ftum"))
    assert torch.equal(student(IDS).logits, checkpoint(IDS).logits)
    assert torch.equal(teacher(IDS).logits, tiny_model(layers=4)(IDS).logits)


def test_named_targets_take_the_place_of_the_default_in_full_layers_too() -> None:
    found = adapted_layers(tiny_model(layers=5), layer_plans("fSnfs"), ("q_proj", "up_proj"))["lora"]
    assert found == {
        *(f"model.layers.{layer}.self_attn.q_proj" for layer in (1, 3, 4)),
        *(f"model.layers.{layer}.mlp.up_proj" for layer in (1, 2, 3, 4)),
    }


@pytest.mark.parametrize("model_type", families())
def test_every_family_has_something_to_adapt(model_type: str) -> None:
    letters = fitted("ffsss", model_type)
    found = adapted_layers(tiny_model(model_type, layers=5), layer_plans(letters), None)
    slides = {index for index, letter in enumerate(letters) if letter == "s"}
    output = FAMILIES[model_type].output
    assert {int(name.split(".")[2]) for name in found["lora"] if name.endswith(f"self_attn.{output}")} == slides
    assert {int(name.split(".")[2]) for name in found["lora"] if ".mlp." in name} == set(range(min(slides), 5))
    values = [name for name in found["lora"] if name.endswith(("v_proj", "qkv_proj"))]
    assert len(values) == len(slides)


def test_targets_that_do_not_exist_are_named_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="q_prog") as caught:
        adapted_layers(tiny_model(), layer_plans("fSnfs"), ("q_prog", "v_proj"))
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(caught.value)


def test_only_the_named_adapters_and_the_sinks_are_trained() -> None:
    student = boosted("fSns")
    with_adapters(student, frozenset({"model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"}), rank=2)
    adapters = [m for name, m in student.named_modules() if "lora_" in name and isinstance(m, torch.nn.Linear)]
    assert len(adapters) == 4
    assert {type(module) for module in adapters} == {OneDNNLinear}
    train_only(student, frozenset({"model.layers.2.mlp.up_proj"}))
    assert {name for name, parameter in student.named_parameters() if parameter.requires_grad} == {
        "model.layers.1.self_attn.sinks",
        "model.layers.2.mlp.up_proj.lora_A.default.weight",
        "model.layers.2.mlp.up_proj.lora_B.default.weight",
    }
