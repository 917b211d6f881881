from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MIXTURES, boosted, families, fitted, layer_plans, row, save_tiny, tiny_model
from transformers import AutoModelForCausalLM

from layerboost.errors import ConfigError
from layerboost.healing.student import ROUTERS, adapted_layers, describe, shared_student, train_only, with_adapters
from layerboost.model.linear import OneDNNLinear
from layerboost.model.modeling import decoder_layers

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
    output = row(model_type).output

    def layer_of(name: str) -> int:
        return next(int(part) for part in name.split(".") if part.isdigit())

    assert {layer_of(name) for name in found["lora"] if name.endswith(f"self_attn.{output}")} == slides
    linear = {
        index
        for index, layer in enumerate(decoder_layers(tiny_model(model_type, layers=5)))
        for name, module in layer.named_modules()
        if isinstance(module, torch.nn.Linear)
        and not {*ROUTERS, "self_attn", row(model_type).mixer} & {*name.split(".")}
    }
    assert len(linear) == 5 or model_type in MIXTURES
    adapted = {layer_of(name) for name in found["lora"] if "self_attn" not in name}
    assert adapted == linear & set(range(min(slides), 5))
    values = [name for name in found["lora"] if name.endswith(("v_proj", "qkv_proj"))]
    assert len(values) == len(slides)


def test_targets_that_do_not_exist_are_named_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="q_prog") as caught:
        adapted_layers(tiny_model(), layer_plans("fSnfs"), ("q_prog", "v_proj"))
    assert "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in str(caught.value)


@pytest.mark.parametrize("model_type", families(experts=True))
def test_a_layer_without_attention_learns_through_linear_layers_or_its_experts_and_never_a_router(
    model_type: str,
) -> None:
    model = tiny_model(model_type, layers=5)
    letters = fitted("nfnnf", model_type)
    removed = {index for index, letter in enumerate(letters) if letter == "n"}
    for targets in (None, (row(model_type).output, "experts")):
        found = adapted_layers(model, layer_plans(letters), targets)
        names = found["attention"] | found["lora"]
        assert {int(name.split(".")[2]) for name in found["attention"]} == removed
        assert not any({*ROUTERS, row(model_type).mixer} & set(name.split(".")) for name in names)
        experts = {int(name.split(".")[2]) for name in found["lora"] if name.endswith(".experts")}
        assert experts >= removed - {0} if targets else experts <= removed
    # A tensor that has the number of experts in its shape is theirs, or a router's.
    count = next(len(each) for name, each in model.named_parameters() if each.dim() == 3 and "experts" in name)
    for name, parameter in decoder_layers(model).named_parameters():
        if count in parameter.shape and parameter.dim() < 3:
            assert ROUTERS & set(name.split(".")) or name.endswith("expert_bias"), name


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("qwen3_moe", "gate"),
        ("qwen2_moe", "shared_expert_gate"),
        ("afmoe", "router"),
        ("hunyuan_v1_moe", "wg"),
        ("phimoe", "router"),
    ],
)
def test_targets_that_are_routers_are_refused(model_type: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f"can be adapted: {name}\nfound: .*experts.*o_proj.*routers are never"):
        adapted_layers(tiny_model(model_type), layer_plans("fffff"), ("v_proj", name))


@pytest.mark.parametrize("model_type", families(experts=True))
def test_the_student_shares_experts_however_its_files_hold_them(model_type: str, tmp_path: Path) -> None:
    letters = fitted("fSns", model_type)
    teacher, checkpoint = tiny_model(model_type, layers=4), boosted(letters, model_type)
    checkpoint.save_pretrained(tmp_path)
    student = shared_student(teacher, tmp_path, layer_plans(letters))
    assert torch.equal(student(IDS).logits, checkpoint(IDS).logits)
    theirs = {parameter.data_ptr() for parameter in teacher.parameters()}
    own = {name.rpartition(".")[2] for name, value in student.named_parameters() if value.data_ptr() not in theirs}
    assert own <= {"sinks"}
    with torch.no_grad():
        next(value for name, value in checkpoint.named_parameters() if value.dim() == 3 and "experts" in name)[0] += 1
    checkpoint.save_pretrained(tmp_path)
    if any("experts.0." in name for name in load_file(tmp_path / "model.safetensors")):
        with pytest.raises(ConfigError, match="has other experts than its base"):
            shared_student(teacher, tmp_path, layer_plans(letters))


@pytest.mark.parametrize("model_type", families(experts=True))
def test_adapters_of_experts_are_merged_and_saved(model_type: str, tmp_path: Path) -> None:
    letters = fitted("fnsf", model_type)
    teacher, student = tiny_model(model_type, layers=4), boosted(letters, model_type).requires_grad_(False)
    plans = layer_plans(letters)
    names = adapted_layers(teacher, plans, None)["lora"] | adapted_layers(teacher, plans, ("experts",))["lora"]
    adapters = with_adapters(student, names, rank=2)
    before = student(IDS).logits
    state = {name: value.clone() for name, value in student.state_dict().items() if "lora_" not in name}
    train_only(student, "lora", names)
    trained = {name: value for name, value in student.named_parameters() if value.requires_grad}
    owners = {name.partition(".lora_")[0].replace(".base_layer", "") for name in trained}
    assert owners == names
    with torch.no_grad():
        for value in trained.values():
            value.add_(torch.randn_like(value) * 0.05)
    changed = student(IDS)
    assert (changed.logits - before).abs().max() > 0.1
    changed.logits.square().mean().backward()
    assert all(value.grad is not None for value in trained.values())
    assert all(value.grad is None for name, value in student.named_parameters() if name not in trained)
    adapters.merge_and_unload()
    kept = {name.replace(".base_layer", ""): value for name, value in state.items()}
    for name, value in student.state_dict().items():
        assert torch.equal(value, kept[name]) or any(name.startswith(f"{owner}.") for owner in names), name
    torch.testing.assert_close(student(IDS).logits, changed.logits, atol=1e-3, rtol=1e-3)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in loaded.state_dict().items())
    # The student's linear layers are computed by oneDNN.
    torch.testing.assert_close(loaded(IDS).logits, student(IDS).logits, atol=1e-4, rtol=1e-4)


def test_what_is_adapted_is_told() -> None:
    found = adapted_layers(tiny_model("qwen3_moe"), layer_plans("fSnff"), None)
    assert describe(found) == (
        "attention: experts in 1, k_proj in 1, o_proj in 1, q_proj in 1, v_proj in 1; "
        "lora: experts in 1, o_proj in 1, v_proj in 1"
    )


def test_only_the_named_adapters_and_the_sinks_are_trained() -> None:
    student = boosted("fSns")
    with_adapters(student, frozenset({"model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"}), rank=2)
    adapters = [m for name, m in student.named_modules() if "lora_" in name and isinstance(m, torch.nn.Linear)]
    assert len(adapters) == 4
    assert {type(module) for module in adapters} == {OneDNNLinear}
    train_only(student, "lora", frozenset({"model.layers.2.mlp.up_proj"}))
    assert {name for name, parameter in student.named_parameters() if parameter.requires_grad} == {
        "model.layers.1.self_attn.sinks",
        "model.layers.2.mlp.up_proj.lora_A.default.weight",
        "model.layers.2.mlp.up_proj.lora_B.default.weight",
    }
