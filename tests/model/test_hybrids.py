"""Hybrids, whose layers without attention stay as they are: through the stages, and what cannot be done with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import (
    KV_HEADS,
    OTHERS,
    QUICK_FAMILIES,
    RUNTIME,
    check_generation,
    convert,
    layer_plans,
    row,
    save_text,
    save_tiny,
    tiny_model,
)
from transformers import PreTrainedModel

import layerboost as lb
from layerboost.costs.budget import base_kv_bytes, plan_kv_bytes
from layerboost.errors import ConfigError
from layerboost.model.base import find_model
from layerboost.model.modeling import decoder_layers
from layerboost.model.surgery import check_plan, family_of, recorded_plan
from layerboost.pipeline import run_stage
from layerboost.probes.calibration import open_measured
from layerboost.recipe import parse_recipe
from layerboost.schemas.plan import PlanFile, counted, counts
from layerboost.schemas.sensitivity import Sensitivity

# The last one's layers have attention and a state side by side.
HYBRIDS = (*OTHERS, "falcon_h1")
IDS = torch.randint(3, 200, (1, 60), generator=torch.Generator().manual_seed(1))


def check_stages(
    folder: Path, model: Path, prompt: dict[str, torch.Tensor]
) -> tuple[Sensitivity, PlanFile, PreTrainedModel]:
    """Measure, plan, convert, heal, save, load and evaluate; return the scores, the plan and the model."""
    base = lb.open_base(model, dtype="float32")
    text = lb.Text(source=str(save_text(folder / "text.jsonl", 12_000)), sequence_tokens=64)
    settings = lb.Measure(windows=(16,), tokens=512, retrieval_prompts=0, batch_sequences=4)
    found = lb.measure(base, text, settings)
    plan = lb.plan(found, lb.Plan(kv_fraction=0.7, context_tokens=64))
    converted = lb.convert(base, plan, text, settings)
    healed = lb.heal(converted, text, lb.Heal(attention_tokens=512, tokens=512, batch_sequences=4, fit_tokens=256))
    healed.save(folder / "healed")
    loaded = find_model(str(folder / "healed"), RUNTIME).load()
    assert torch.equal(loaded(**prompt).logits, healed.model(**prompt).logits)
    assert not torch.equal(loaded(**prompt).logits, converted.model(**prompt).logits)
    compared = lb.evaluate({"base": base, "healed": healed}, text, lb.Evaluate(tasks=(), perplexity_tokens=512))
    assert compared.perplexity["healed"].kl
    return found, plan, loaded


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.pipeline if name in QUICK_FAMILIES else pytest.mark.exhaustive)
        for name in HYBRIDS
    ],
)
def test_the_stages(family: str, tmp_path: Path) -> None:
    """What has a state is the base's own."""
    others, model = [0, 2] if family in OTHERS else [], save_tiny(tmp_path / "model", family)
    found, plan, loaded = check_stages(tmp_path, model, {"input_ids": IDS})
    assert found.model.other_layers == others
    assert [len(entry.variants) for entry in found.layers] == [0 if layer in others else 3 for layer in range(4)]
    assert [entry.layer for entry in plan.layers if entry.attention == "other"] == others
    assert 0 < counts(plan.layers)["full"] < 4
    base = find_model(str(model), RUNTIME).load()
    for layer in others or range(4):
        theirs, ours = (getattr(decoder_layers(each)[layer], row(family).mixer) for each in (base, loaded))
        assert all(torch.equal(theirs.get_parameter(name), value) for name, value in ours.named_parameters())
    check_generation(loaded, IDS, 6)


@pytest.mark.parametrize("family", OTHERS)
def test_a_checkpoint_says_what_each_layer_is(family: str, tmp_path: Path) -> None:
    base = find_model(str(save_tiny(tmp_path / "model", family, layers=5)), RUNTIME)
    model = convert(base, "xSxnf", tmp_path / "boosted")
    again = find_model(str(tmp_path / "boosted"), RUNTIME)
    assert recorded_plan(again.config) == layer_plans("xSxnf")
    assert again.config.layer_types[1:3] == ["sliding_attention", OTHERS[family]]
    assert torch.equal(again.load()(IDS).logits, model(IDS).logits)
    card = (tmp_path / "boosted" / "README.md").read_text()
    assert "Of 5 layers: 1 full, 1 sliding, 1 none, 2 other." in card
    assert "vLLM does not serve this model" in card


def test_layers_whose_types_are_computed_record_a_plan(tmp_path: Path) -> None:
    """What slides is in `full_kv_heads`; each layer's cache has its state, and of keys what its plan lets it hold."""
    letters = "nHsfh"
    base = find_model(str(save_tiny(tmp_path / "model", "falcon_h1", layers=5)), RUNTIME)
    model = convert(base, letters, tmp_path / "boosted")
    again = find_model(str(tmp_path / "boosted"), RUNTIME)
    assert recorded_plan(again.config) == layer_plans(letters)
    assert again.config.full_kv_heads == {"1": [0], "2": [], "4": [1]}
    assert again.config.layer_types == ["hybrid"] * 5
    whole = again.load()(IDS)
    assert torch.equal(whole.logits, model(IDS).logits)
    past = whole.past_key_values
    assert all(layer.recurrent_states[0].any() for layer in past.layers)
    held = [0 if layer.keys is None else layer.keys.shape[2] for layer in past.layers]
    assert held == [0, 60, 15, 60, 60]
    past.reset()
    torch.testing.assert_close(model(IDS, past_key_values=past).logits, whole.logits)
    past.reorder_cache(torch.tensor([0, 0]))
    assert {layer.recurrent_states[0].shape[0] for layer in past.layers} == {2}


@pytest.mark.parametrize(
    ("letters", "message"),
    [
        ("fsxsf", r"layer 0 of this qwen3_next model is of type linear_attention\nfound: a plan that makes it full"),
        ("xsnsf", r"layer 2 [^$]+makes it none\ndo: leave it as it is \(other\)"),
        ("xxxsf", r"layer 1 [^$]+ of type full_attention\nfound: a plan that makes it other\ndo: [^$]+\(full\)"),
    ],
)
def test_plans_that_a_hybrid_cannot_take(letters: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_plan(tiny_model("qwen3_next").config, layer_plans(letters))


def test_kv_bytes_are_those_of_layers_with_attention(tmp_path: Path) -> None:
    facts = find_model(str(save_tiny(tmp_path, "qwen3_next", layers=5)), RUNTIME).info
    assert (facts.attention_layers, facts.other_layers) == ([1, 3, 4], [0, 2])
    token = 2 * KV_HEADS * 32 * 4
    assert base_kv_bytes(facts, 100) == 3 * 100 * token
    assert plan_kv_bytes(facts, layer_plans("xsxnf"), 100) == (16 + 100) * token
    assert counted(layer_plans("xsxnf")) == "1 full, 1 sliding, 1 none, 2 other"


def test_a_model_without_any_attention() -> None:
    with pytest.raises(ConfigError, match="no layer with attention\nfound: granitemoehybrid"):
        family_of(tiny_model("granitemoehybrid", 2, layer_types=["linear_attention"] * 2).config)


def test_whole_plans_are_measured(tmp_path: Path) -> None:
    """As plan.method=greedy does: sinks are fitted in layers with attention alone."""
    values = {
        "model": str(save_tiny(tmp_path / "model", "qwen3_next")),
        "text": {"source": str(save_text(tmp_path / "text.jsonl", 12_000)), "sequence_tokens": 64},
        "measure": {"windows": [16], "tokens": 256, "retrieval_prompts": 0},
        "plan": {"method": "greedy", "kv_fraction": 0.7, "search_tokens": 256, "context_tokens": 64},
    }
    recipe, run = parse_recipe(values, "the test"), tmp_path / "run"
    measured = open_measured(recipe, run, run_stage("measure", recipe, run), [16], RUNTIME)
    assert measured(layer_plans("xSxf"))["kl"] > 0
