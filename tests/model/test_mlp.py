"""Thinned and removed MLPs: against masked stock models, in the cache, on disk, in gradients."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import boosted, check_generation, families, fitted, layer_plans, plan_file, save_checkpoint, tiny_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from layerboost.errors import ConfigError
from layerboost.model.base import parameter_facts
from layerboost.model.mlp import mlp_output, recorded_widths, thin
from layerboost.model.modeling import decoder_layers
from layerboost.model.surgery import (
    Thinned,
    apply_plan,
    check_plan,
    recorded_plan,
    replaced,
    windows_alone,
    without_states,
)
from layerboost.schemas.plan import LayerPlan

IDS = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(1))
LETTERS = "ftomz"
HALF = torch.arange(96).view(-1, 2)[:, 1]  # every second neuron

grid = pytest.mark.parametrize("family", families(mlps=True))


def output_of(model: PreTrainedModel, layer: int) -> Any:
    found: Any = decoder_layers(model)[layer]
    return mlp_output(found.mlp)


def thinned(family: str, letters: str = LETTERS) -> PreTrainedModel:
    """A boosted model with the odd neurons, their columns scaled."""
    letters = fitted(letters, family)
    base = tiny_model(family, len(letters))
    plans = layer_plans(letters)
    given = {
        plan.layer: Thinned(HALF, 1.1 * output_of(base, plan.layer).weight.detach()[:, HALF])
        for plan in plans
        if plan.mlp_width
    }
    return apply_plan(base, plans, thinned=given)


def masked(family: str, letters: str = LETTERS) -> PreTrainedModel:
    """The stock model whose weights do the same: other neurons, MLPs and attention add nothing."""
    letters = fitted(letters, family)
    base = tiny_model(family, len(letters))
    for layer, letter in enumerate(letters):
        output = output_of(base, layer)
        if letter in "tuoy":
            keep = torch.zeros(96)
            keep[HALF] = 1.1
            output.weight.data *= keep
        if letter in "mzY":
            for parameter in output.parameters():
                torch.nn.init.zeros_(parameter)
    attention = fitted("".join("n" if letter in "oz" else "f" for letter in letters), family)
    return apply_plan(base, layer_plans(attention))


@grid
def test_a_thinned_forward_equals_a_masked_one(family: str) -> None:
    model, reference = thinned(family), masked(family)
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, atol=1e-4, rtol=1e-3)
    assert (model(IDS).logits - tiny_model(family)(IDS).logits).abs().max() > 0.05
    assert {layer: output_of(model, layer).in_features for layer in (0, 1, 2)} == {0: 96, 1: 48, 2: 48}


@grid
def test_cached_generation_equals_the_forward_pass(family: str) -> None:
    check_generation(thinned(family), IDS, 6)


@grid
def test_saved_and_loaded_with_the_same_logits_and_no_other_weights(family: str, tmp_path: Path) -> None:
    model = thinned(family)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    letters = fitted(LETTERS, family)
    assert recorded_plan(loaded.config) == layer_plans(letters)
    facts = parameter_facts(tiny_model(family).config)
    removed = 2 * (48 * facts["neuron_parameters"] + facts["mlp_parameters"])
    removed += sum(letter in "oz" for letter in letters) * facts["attention_parameters"]
    assert sum(parameter.numel() for parameter in loaded.parameters()) == facts["parameters"] - removed


@grid
def test_gradients(family: str) -> None:
    """Those of a masked model, of every parameter that is used."""
    model, reference = thinned(family, "ftfot"), masked(family, "ftfot")
    for each in (model, reference):
        each(IDS, labels=IDS).loss.backward()
    expected = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if parameter.shape == expected[name].shape:
            assert (parameter.grad - expected[name]).norm() < 1e-3 * expected[name].norm(), name


@grid
def test_a_layer_replaced_for_a_while_is_the_thinned_model_and_then_the_base(family: str) -> None:
    base = tiny_model(family)
    before = base(IDS).logits
    for letters in (fitted("ffftf", family), fitted("fffmf", family)):
        plan = layer_plans(letters)[3]
        given = Thinned(HALF, output_of(base, 3).weight.detach()[:, HALF] * 1.1) if plan.mlp_width else None
        with replaced(base, 3, plan, thinned=given):
            inside = base(IDS, use_cache=False).logits
        assert torch.equal(base(IDS).logits, before)
        surgery = apply_plan(copy.deepcopy(base), layer_plans(letters), thinned={3: given} if given else {})
        assert torch.equal(inside, surgery(IDS, use_cache=False).logits)


def test_windows_and_thinned_mlps_go_together(tmp_path: Path) -> None:
    model = boosted("fuSut")
    check_generation(model, IDS, 6)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)


def test_linear_layers_with_thinned_mlps_become_windows() -> None:
    letters, half = "ftloL", {"mlp": "thin", "mlp_width": 48}
    layers = layer_plans(letters)
    layers[2] = LayerPlan(**layers[2].model_dump() | half)
    model = apply_plan(tiny_model(layers=5), layers)
    cut = without_states(model, windows_alone(layers))
    assert recorded_plan(cut.config) == windows_alone(layers)
    wanted = apply_plan(tiny_model(layers=5), windows_alone(layers))
    assert torch.equal(cut(IDS).logits, wanted(IDS).logits)


def test_the_config_says_it_in_hugging_faces_keys() -> None:
    config = boosted("ftomz").config
    assert config.to_dict()["per_layer_config"] == {
        "1": {"intermediate_size": 48},
        "2": {"skip": ["attention"], "intermediate_size": 48},
        "3": {"skip": ["mlp"]},
        "4": {"skip": ["attention", "mlp"]},
    }
    assert recorded_widths(config) == {1: 48, 2: 48, 3: 0, 4: 0}
    assert recorded_widths(tiny_model().config) == {}


def test_a_checkpoint_loads_by_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = boosted("ftoum")
    save_checkpoint(tmp_path / "out", model, plan_file("ftoum"))
    monkeypatch.syspath_prepend(tmp_path / "out")
    own: Any = importlib.import_module("modeling_layerboost")
    loaded = own.LayerBoostForCausalLM.from_pretrained(tmp_path / "out")
    assert type(loaded).__module__ == "modeling_layerboost"
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "MLPs: 3 thin, 1 none" in card
    assert "| 1 | full |  |  | thin 48 |" in card


def test_what_cannot_be_thinned_is_refused() -> None:
    config = tiny_model().config
    with pytest.raises(ConfigError, match="layer 1: a thinned MLP has fewer neurons than the base's"):
        check_plan(config, [plan.model_copy(update={"mlp_width": 96 if plan.mlp_width else None})
                            for plan in layer_plans("ftfff")])  # fmt: skip
    mixture = tiny_model("qwen3_moe").config
    with pytest.raises(
        ConfigError, match="MLPs that are mixtures of experts, or of a form of their own, cannot be thinned"
    ):
        check_plan(mixture, layer_plans("ffffm"))
    with pytest.raises(ConfigError, match=r"or of a form of their own[^$]+lfm2, layer 1"):
        check_plan(tiny_model("lfm2", 4).config, layer_plans("xmxf"))
    assert "mlp_width" not in parameter_facts(mixture)
    assert mlp_output(torch.nn.ModuleDict({"gate": torch.nn.Linear(4, 4)})) is None


def test_a_thinned_mlp_shares_what_is_not_cut() -> None:
    mlp: Any = decoder_layers(tiny_model())[0].mlp
    found: Any = thin(mlp, HALF)
    assert found.act_fn is mlp.act_fn
    assert torch.equal(found.up_proj.weight, mlp.up_proj.weight[HALF])
    assert mlp.up_proj.out_features == 96
