"""Every family under every kind of plan: identity, reference, cache, save and load, gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny import HEADS, boosted, layer_plans, tiny_model
from transformers import AutoModelForCausalLM

from layerboost.errors import ConfigError
from layerboost.model.attention import sliding_attention_reference
from layerboost.model.families import FAMILIES
from layerboost.model.modeling import decoder_layers
from layerboost.model.surgery import apply_plan, replaced

PLANS = ["sssss", "SSSSS", "nfsSf", "fsSnn", "nnnnn", "nnfsn"]
IDS = torch.randint(3, 200, (2, 60), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :9] = 0


@pytest.mark.parametrize("family", FAMILIES)
def test_all_full_is_bit_identical(family: str) -> None:
    base = tiny_model(family)
    expected = base(IDS, attention_mask=MASK).logits
    assert torch.equal(apply_plan(base, layer_plans("fffff"))(IDS, attention_mask=MASK).logits, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_as_long_as_the_text_changes_nothing(family: str) -> None:
    base = tiny_model(family)
    expected = base(IDS, attention_mask=MASK).logits[MASK.bool()]
    found = apply_plan(copy.deepcopy(base), layer_plans("sssss", 60))(IDS, attention_mask=MASK).logits[MASK.bool()]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("letters", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_cache_equals_forward_without(family: str, letters: str) -> None:
    model = boosted(letters, family)
    out = model.generate(
        IDS[:, :30], attention_mask=MASK[:, :30], max_new_tokens=25, min_new_tokens=25, do_sample=False,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    mask = torch.cat([MASK[:, :30], torch.ones(2, 25, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(out.sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 29:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("letters", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
def test_chunked_prefill_and_what_the_cache_holds(family: str, letters: str) -> None:
    model = boosted(letters, family)
    first = model(IDS[:, :33], attention_mask=MASK[:, :33], use_cache=True)
    second = model(IDS[:, 33:], attention_mask=MASK, past_key_values=first.past_key_values, use_cache=True)
    whole = model(IDS, attention_mask=MASK, use_cache=False).logits
    found = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(found[MASK.bool()], whole[MASK.bool()], atol=1e-3, rtol=1e-3)
    for letter, layer in zip(letters, second.past_key_values.layers, strict=True):
        held = 0 if layer.keys is None else layer.keys.shape[2]
        assert held == {"f": 60, "s": 15, "S": 15, "n": 0}[letter]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("letters", ["fffff", "nfsSn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_is_bit_identical(family: str, letters: str, tied: bool, tmp_path: Path) -> None:
    model = boosted(letters, family, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "LayerBoostForCausalLM"
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_every_parameter(family: str) -> None:
    model = boosted("nfsSn", family)
    model(IDS, labels=IDS).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_sliding_layers_equal_the_reference(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = boosted("sSfSs", family)
    found = model(IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()]
    monkeypatch.setattr("layerboost.model.modeling.sliding_attention", sliding_attention_reference)
    causal = model(IDS, attention_mask=MASK, use_cache=False).logits[MASK.bool()]
    torch.testing.assert_close(found, causal, atol=1e-3, rtol=1e-3)


def test_removed_attention_leaves_no_weights() -> None:
    names = boosted("nfSfs").state_dict()
    assert not any(name.startswith("model.layers.0.") and ("attn" in name or "input" in name) for name in names)
    assert names["model.layers.2.self_attn.sinks"].shape == (HEADS,)


def test_replaced_is_reversible_and_equals_surgery() -> None:
    base = tiny_model()
    before = base(IDS).logits
    for letter, index in (("n", 0), ("s", 2), ("S", 4)):
        letters = "".join(letter if layer == index else "f" for layer in range(5))
        plan = layer_plans(letters)[index]
        sinks = torch.randn(HEADS) if plan.sink else None
        with replaced(base, index, plan, sinks):
            inside = base(IDS, use_cache=False).logits
        surgery = apply_plan(copy.deepcopy(base), layer_plans(letters), {} if sinks is None else {index: sinks})
        assert torch.equal(inside, surgery(IDS, use_cache=False).logits)
        assert torch.equal(base(IDS).logits, before)
        assert "sinks" not in dict(decoder_layers(base)[index].named_parameters())


def test_static_cache_is_refused_by_name() -> None:
    model = boosted("nffff")
    with pytest.raises(ValueError, match="StaticCache"):
        model.generate(IDS[:1, :8], max_new_tokens=2, cache_implementation="static")


@pytest.mark.parametrize(
    ("letters", "window", "message"),
    [("ffff", 16, "another model"), ("ffffff", 16, "another model"), ("sffff", 600, "context")],
)
def test_plans_that_do_not_fit(letters: str, window: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_plan(tiny_model(), layer_plans(letters, window))


def test_unsupported_families_are_named() -> None:
    model = tiny_model()
    model.config.model_type = "mamba"
    with pytest.raises(ConfigError, match=r"mamba[\s\S]*llama"):
        apply_plan(model, layer_plans("fffff"))
