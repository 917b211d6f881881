"""Surgery apart from the grid of test_families.py: reversible, refused, odd caches, what is removed."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import (
    HEADS,
    RUNTIME,
    SLIDING_BASES,
    WINDOW,
    boosted,
    check_generation,
    families,
    fitted,
    layer_plans,
    row,
    save_tiny,
    sinks_of,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM, DynamicCache

from layerboost.errors import ConfigError
from layerboost.model.base import find_model
from layerboost.model.modeling import CACHE, base_layer_types, decoder_layers
from layerboost.model.surgery import apply_plan, captured_attention, check_plan, check_windows, replaced
from layerboost.schemas.plan import LayerPlan

IDS = torch.randint(3, 200, (2, 60), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", families())
def test_replaced_is_reversible_and_equals_surgery(family: str) -> None:
    base = tiny_model(family)
    before = base(IDS).logits
    linear = (("l", 1), ("L", 2)) if row(family).linear else ()
    for letter, index in (("n", 0), ("n", 1), ("s", 2), ("S", 3), ("S", 4), ("h", 0), ("H", 2), *linear):
        letters = fitted("".join(letter if layer == index else "f" for layer in range(5)), family)
        plan = layer_plans(letters)[index]
        sinks = torch.randn(sinks_of(plan)) if plan.sink else None
        with replaced(base, index, plan, sinks):
            inside = base(IDS, use_cache=False).logits
        assert torch.equal(inside, before) == (not set(letters) - {*"fx"})
        surgery = apply_plan(copy.deepcopy(base), layer_plans(letters), {} if sinks is None else {index: sinks})
        assert torch.equal(inside, surgery(IDS, use_cache=False).logits)
        assert torch.equal(base(IDS).logits, before)
        assert "sinks" not in dict(decoder_layers(base)[index].named_parameters())


@pytest.mark.parametrize("family", ["mistral", "ministral3", "phi3", "starcoder2"])
@pytest.mark.parametrize("letters", ["fffff", "nfnff"])
def test_bases_in_which_every_layer_slides(family: str, letters: str) -> None:
    """As the first Mistral and Phi-3 mini: layers keep the base's window, in the forward pass and in the cache."""
    base = tiny_model(family, sliding_window=WINDOW)
    assert (base(IDS).logits - tiny_model(family, sliding_window=None)(IDS).logits).abs().max() > 0.1
    for letter, layer in zip(letters, decoder_layers(base), strict=True):
        if letter == "n":
            for parameter in layer.get_submodule("self_attn.o_proj").parameters():
                torch.nn.init.zeros_(parameter)
    expected = base(IDS).logits
    model = apply_plan(base, layer_plans(letters))
    out = model(IDS)
    assert torch.equal(out.logits, expected)
    held = [0 if layer.keys is None else layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert held == [0 if letter == "n" else WINDOW - 1 for letter in letters]


ONE_WINDOW = {"layer_types": ["sliding_attention"] * 5, "use_sliding_window": True}


@pytest.mark.parametrize("window", [512, 1000])
@pytest.mark.parametrize("family", ["mistral", "phi3", "qwen2", "ministral", "gemma2"])
def test_a_window_no_shorter_than_the_context_is_none(family: str, window: int, tmp_path: Path) -> None:
    """As in Phi-3.5-mini and Ministral-8B: its layers take any window, and slide like those of a model without one."""
    types: dict[str, Any] = {} if family in ("mistral", "phi3") else ONE_WINDOW
    base = tiny_model(family, sliding_window=window, **types)
    assert set(base_layer_types(base.config)) == {"full_attention"}
    check_windows(base.config, [16, 64])
    other = tiny_model(family, sliding_window=None if not types else 512, layer_types=["full_attention"] * 5)
    other.load_state_dict(base.state_dict())
    assert torch.equal(base(IDS).logits, other(IDS).logits)
    ours, theirs = (apply_plan(model, layer_plans("fsSnf")) for model in (base, other))
    assert torch.equal(ours(IDS).logits, theirs(IDS).logits)
    ours.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(IDS).logits, ours(IDS).logits)


@pytest.mark.parametrize("family", ["gemma3_text", "olmo3", "cohere2"])
def test_no_advice_that_cannot_be_followed(family: str) -> None:
    """The type of their layers says more than a window: one that drops nothing stays theirs."""
    config = tiny_model(family, sliding_window=1024).config
    with pytest.raises(ConfigError, match="use another model: this one's own window drops nothing"):
        check_windows(config, [16])


@pytest.mark.parametrize("letters", ["nnnnn", "nnfsn", "nnSnn", "nnHnn", "sHnsS"])
def test_few_layers_with_attention(letters: str) -> None:
    check_generation(boosted(letters), IDS)


def test_a_conversation_through_a_chat_template() -> None:
    """Turn after turn on one cache, past the window: the logits of the whole text read at once."""
    model, tokenizer = boosted("nSfHn"), tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role == 'user' and 'w3 ' or '' }}{{ m.content }}"
        "{{ m.role == 'user' and ' w4 ' or ' ' }}{% endfor %}"
    )
    messages, past = [], None
    for turn in range(3):
        messages.append({"role": "user", "content": " ".join(f"w{10 * turn + word + 6}" for word in range(9))})
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=False)
        out = check_generation(model, ids, 7, attention_mask=torch.ones_like(ids), past_key_values=past)
        past = out.past_key_values
        messages.append({"role": "assistant", "content": tokenizer.decode(out.sequences[0, ids.shape[1] :])})
    assert ids.shape[1] > 2 * WINDOW


@pytest.mark.parametrize("full", [(0,), (1,), (0, 2), (2, 0)])
def test_kv_heads_wherever_they_are(full: tuple[int, ...]) -> None:
    """A full KV head reads everything and a windowed one its window: by silencing the others, heads of whole layers."""
    shape: dict[str, Any] = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
    plan = LayerPlan(layer=0, attention="sliding", window=WINDOW, full_kv_heads=full)
    whole = {True: layer_plans("f")[0], False: layer_plans("s")[0]}
    for head in range(3):
        base = tiny_model(layers=1, **shape)
        silent = torch.ones(3, 64, dtype=torch.bool)
        silent[head] = False
        base.get_parameter("model.layers.0.self_attn.o_proj.weight").data[:, silent.flatten()] = 0
        expected = apply_plan(copy.deepcopy(base), [whole[head in full]])(IDS).logits
        mixed = apply_plan(base, [plan])
        torch.testing.assert_close(mixed(IDS).logits, expected, atol=1e-5, rtol=1e-4)
        check_generation(mixed, IDS)


def test_beams_and_repeated_batches_keep_both_kinds_of_heads() -> None:
    model = boosted("fHhn")
    beams = model.generate(IDS, max_new_tokens=8, num_beams=3, do_sample=False)
    with torch.no_grad():
        again = model.generate(IDS, max_new_tokens=8, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(beams, again)
    cache = model(IDS).past_key_values
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    mixed = cache.layers[1]
    assert (len(mixed.keys), len(mixed.windowed.keys), cache.get_seq_length()) == (2, 2, 60)
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize(
    ("heads", "message"), [((2,), r"layer 1 has KV heads 0 to 1; got full_kv_heads 2"), ((0, 5), "KV heads 0 to 1")]
)
def test_kv_heads_that_do_not_exist(heads: tuple[int, ...], message: str) -> None:
    plan = layer_plans("ffff")
    plan[1] = LayerPlan(layer=1, attention="sliding", window=WINDOW, full_kv_heads=heads)
    with pytest.raises(ConfigError, match=message):
        apply_plan(tiny_model(layers=4), plan)


def test_all_kv_heads_full_is_full_attention() -> None:
    plan = layer_plans("ffff")
    plan[1] = LayerPlan(layer=1, attention="sliding", window=WINDOW, sink=True, full_kv_heads=(1, 0))
    base = tiny_model(layers=4)
    expected = base(IDS).logits
    model = apply_plan(base, plan)
    assert torch.equal(model(IDS).logits, expected)
    assert (model.config.layer_types[1], hasattr(model.config, "full_kv_heads")) == ("full_attention", False)


def test_removed_attention_leaves_no_weights() -> None:
    names = boosted("nfSfs").state_dict()
    assert not any(name.startswith("model.layers.0.") and ("attn" in name or "input" in name) for name in names)
    assert names["model.layers.2.self_attn.sinks"].shape == (HEADS,)


def test_norms_that_serve_the_mlp_too_stay() -> None:
    assert "model.layers.0.input_layernorm.weight" in boosted("nffff", "cohere2").state_dict()
    gemma = boosted("nffff", "gemma3_text").state_dict()
    assert not any(name.startswith("model.layers.0.") and "attention" in name for name in gemma)
    assert "model.layers.0.pre_feedforward_layernorm.weight" in gemma


def test_use_cache_can_be_switched_off_after_loading() -> None:
    model = boosted("nSffs")
    assert model(IDS).past_key_values is not None
    model.config.use_cache = False
    assert model(IDS).past_key_values is None


@pytest.mark.parametrize("given", ["by-position", "past_key_values", CACHE])
def test_a_decoder_takes_a_cache_by_every_name(given: str) -> None:
    model = boosted("nSfhL")
    decoder, half, cache = model.get_decoder(), IDS.shape[1] // 2, DynamicCache()
    decoder(IDS[:, :half], **{CACHE: cache})
    mask = torch.ones_like(IDS)
    if given == "by-position":
        out = decoder(IDS[:, half:], mask, None, cache)
    else:
        out = decoder(IDS[:, half:], mask, **{given: cache})
    assert cache.get_seq_length() == IDS.shape[1]
    whole = decoder(IDS).last_hidden_state[:, half:]
    torch.testing.assert_close(out.last_hidden_state, whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("letters", ["nffff", "sffff"])
def test_static_cache_is_refused_by_name(letters: str) -> None:
    with pytest.raises(ValueError, match="StaticCache"):
        boosted(letters).generate(IDS[:1, :8], max_new_tokens=2, cache_implementation="static")


def test_attention_weights_are_refused_by_name() -> None:
    """Those of the other layers would stand in the places of these."""
    model = boosted("fSn")
    with pytest.raises(ValueError, match="returns no attention weights"):
        model(IDS, output_attentions=True)
    with pytest.raises(ValueError, match="returns no attention weights"):
        model.generate(IDS, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2)


def test_documents_that_only_flash_attention_tells_apart_are_refused() -> None:
    model = boosted("fSn")
    positions = torch.cat([torch.arange(20), torch.arange(40)])[None]
    apart = torch.cat([model(IDS[:1, :20]).logits, model(IDS[:1, 20:]).logits], dim=1)
    assert torch.allclose(model(IDS[:1], position_ids=positions, use_cache=False).logits, apart, atol=1e-5)
    model.model.config._attn_implementation_internal = "flash_attention_2"
    for given in ({"position_ids": positions}, {"cu_seq_lens_q": torch.tensor([0, 20, 60])}):
        with pytest.raises(ValueError, match="packed text apart by a mask"):
            model(IDS[:1], **given)


@pytest.mark.parametrize(
    ("letters", "window", "message"),
    [("ffff", 16, "another model"), ("ffffff", 16, "another model"), ("sffff", 600, "context")],
)
def test_plans_that_do_not_fit(letters: str, window: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_plan(tiny_model(), layer_plans(letters, window))


@pytest.mark.parametrize("family", SLIDING_BASES)
def test_one_window_and_the_bases_own(family: str) -> None:
    config = tiny_model(family).config.get_text_config()
    slides = [kind == "sliding_attention" for kind in base_layer_types(config)]
    first, full = slides.index(True), slides.index(False)

    def plan(layer: int, letter: str, window: int) -> None:
        letters = "".join("n" if letter == "S" and s else "f" for s in slides)
        check_plan(config, layer_plans(letters[:layer] + letter + letters[layer + 1 :], window))

    with pytest.raises(
        ConfigError, match=rf"layer {first} already slides in {config.model_type}, with a window of {WINDOW}"
    ):
        plan(first, "s", WINDOW)
    with pytest.raises(
        ConfigError, match=rf"layer {full}: a config has one window, and layer {first} keeps the base's"
    ):
        plan(full, "s", WINDOW // 2)
    plan(full, "s", WINDOW)
    plan(full, "S", WINDOW // 2)  # no layer keeps the base's window


def test_windows_that_no_plan_can_have_are_not_measured() -> None:
    check_windows(tiny_model().config, [8, 16])
    gemma = tiny_model("gemma3_text").config
    check_windows(gemma, [WINDOW])
    with pytest.raises(ConfigError, match=rf"slide already[\s\S]*windows 8, {WINDOW}; the base's is {WINDOW}"):
        check_windows(gemma, [8, WINDOW])


def test_files_record_which_layers_slide_in_the_base(tmp_path: Path) -> None:
    info = find_model(str(save_tiny(tmp_path, "gemma3_text")), RUNTIME).info
    assert (info.sliding_layers, info.sliding_window) == ([0, 1, 3], WINDOW)


def test_unsupported_models_are_named() -> None:
    model = tiny_model()
    model.config.model_type = "mamba"
    with pytest.raises(ConfigError, match=r"mamba \(no attention\)[\s\S]*layerboost ls families"):
        apply_plan(model, layer_plans("fffff"))
    model = tiny_model("gemma3_text")
    model.config.use_bidirectional_attention = True
    with pytest.raises(ConfigError, match="bidirectional"):
        apply_plan(model, layer_plans("fffff"))


def test_a_captured_model_is_not_kept_alive() -> None:
    model = tiny_model()
    expected = model(IDS).logits
    seen: list[int] = []
    with captured_attention(model, [1, 3], lambda layer, *_: seen.append(layer)):
        assert torch.equal(model(IDS).logits, expected)
    assert seen == [1, 3]
    assert torch.equal(model(IDS).logits, expected)
    assert seen == [1, 3]
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
