"""Hybrids, whose layers without attention stay as they are: through the stages, and what cannot be done with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import KV_HEADS, OTHERS, QUICK_FAMILIES, RUNTIME, layer_plans, row, save_text, save_tiny, tiny_model

import layerboost as lb
from layerboost.costs.budget import base_kv_bytes, plan_kv_bytes
from layerboost.errors import ConfigError
from layerboost.model.base import find_model
from layerboost.model.checkpoint import save_boosted
from layerboost.model.modeling import decoder_layers
from layerboost.model.surgery import apply_plan, check_plan, family_of, recorded_plan
from layerboost.pipeline import run_stage
from layerboost.probes.calibration import open_measured
from layerboost.recipe import parse_recipe
from layerboost.schemas.plan import PlanFile, counted, counts

# The last one's layers have attention and a state side by side.
HYBRIDS = (*OTHERS, "falcon_h1")
IDS = torch.randint(3, 200, (1, 60), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.pipeline if name in QUICK_FAMILIES else pytest.mark.exhaustive)
        for name in HYBRIDS
    ],
)
def test_the_stages(family: str, tmp_path: Path) -> None:
    """Measured, planned, converted, healed, saved and loaded; what has a state is the base's own."""
    others = [0, 2] if family in OTHERS else []
    base = lb.open_base(save_tiny(tmp_path / "model", family), dtype="float32")
    text = lb.Text(source=str(save_text(tmp_path / "text.jsonl", 12_000)), sequence_tokens=64)
    settings = lb.Measure(windows=(16,), tokens=512, retrieval_prompts=0, batch_sequences=4)
    found = lb.measure(base, text, settings)
    assert found.model.other_layers == others
    assert [len(entry.variants) for entry in found.layers] == [0 if layer in others else 3 for layer in range(4)]
    plan = lb.plan(found, lb.Plan(kv_fraction=0.7, context_tokens=64))
    assert [entry.layer for entry in plan.layers if entry.attention == "other"] == others
    assert 0 < counts(plan.layers)["full"] < 4
    converted = lb.convert(base, plan, text, settings)
    healed = lb.heal(converted, text, lb.Heal(attention_tokens=512, tokens=512, batch_sequences=4, fit_tokens=256))
    healed.save(tmp_path / "healed")
    loaded = find_model(str(tmp_path / "healed"), RUNTIME).load()
    assert torch.equal(loaded(IDS).logits, healed.model(IDS).logits)
    assert not torch.equal(loaded(IDS).logits, converted.model(IDS).logits)
    for layer in others or range(4):
        theirs, ours = (getattr(decoder_layers(model)[layer], row(family).mixer) for model in (base.load(), loaded))
        assert all(torch.equal(theirs.get_parameter(name), value) for name, value in ours.named_parameters())
    out = loaded.generate(IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
                          return_dict_in_generate=True)  # fmt: skip
    whole = loaded(out.sequences, use_cache=False).logits[:, IDS.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, atol=1e-3, rtol=1e-3)
    compared = lb.evaluate({"base": base, "healed": healed}, text, lb.Evaluate(tasks=(), perplexity_tokens=512))
    assert compared.perplexity["healed"].kl


@pytest.mark.parametrize("family", OTHERS)
def test_a_checkpoint_says_what_each_layer_is(family: str, tmp_path: Path) -> None:
    base = find_model(str(save_tiny(tmp_path / "model", family, layers=5)), RUNTIME)
    plan = PlanFile(model=base.info, method="by hand", layers=layer_plans("xSxnf"))
    model = apply_plan(base.load(), plan.layers)
    save_boosted(model, base.tokenizer, plan, tmp_path / "boosted", recipe_yaml="schema_version: 1\n")
    again = find_model(str(tmp_path / "boosted"), RUNTIME)
    assert recorded_plan(again.config) == plan.layers
    assert again.config.layer_types[1:3] == ["sliding_attention", OTHERS[family]]
    assert torch.equal(again.load()(IDS).logits, model(IDS).logits)
    card = (tmp_path / "boosted" / "README.md").read_text()
    assert "Of 5 layers: 1 full, 1 sliding, 1 none, 2 other." in card
    assert "vLLM does not serve this model" in card


def test_layers_whose_types_are_computed_record_a_plan(tmp_path: Path) -> None:
    """What slides is in `full_kv_heads`; each layer's cache has its state, and of keys what its plan lets it hold."""
    letters = "nHsfh"
    base = find_model(str(save_tiny(tmp_path / "model", "falcon_h1", layers=5)), RUNTIME)
    plan = PlanFile(model=base.info, method="by hand", layers=layer_plans(letters))
    model = apply_plan(base.load(), plan.layers)
    save_boosted(model, base.tokenizer, plan, tmp_path / "boosted", recipe_yaml="schema_version: 1\n")
    again = find_model(str(tmp_path / "boosted"), RUNTIME)
    assert recorded_plan(again.config) == plan.layers
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
