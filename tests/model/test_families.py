"""The grid: every family under every kind of plan; identity, reference, cache, save and load, gradients."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from references import delta_attention_reference, gated_attention_reference, lolcats_attention_reference
from tiny import (
    HEADS,
    IMAGE_TOKEN,
    MODEL_TYPES,
    QUICK_FAMILIES,
    ROPE,
    SLIDING_BASES,
    WINDOW,
    boosted,
    families,
    fitted,
    image_prompt,
    layer_plans,
    row,
    tiny_model,
    tower_parameters,
)
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from layerboost.model import modeling
from layerboost.model.attention import sliding_attention_reference, window_mask
from layerboost.model.caches import SPARE_TOKENS
from layerboost.model.families import FAMILIES, WRAPPERS
from layerboost.model.linear_attention import FEATURE_PARAMETERS, LOLCATS_PARAMETERS
from layerboost.model.modeling import architecture_of, auto_class, base_layer_types, decoder_layers
from layerboost.model.stream import head_logits
from layerboost.model.surgery import apply_plan, output_projection

PLANS = {
    "all-full": "fffff",
    "all-sliding": "sSsSS",
    "mixed": "SfnsS",
    "first-none": "nnSsf",
    "last-none": "fsSfn",
    "kv-heads": "HhnSh",
    "kv-heads-alone": "hHhHH",
    "linear": "lLfSD",
    "linear-alone": "LlDlD",
}
LENGTH = 60
IDS = torch.randint(3, 200, (2, LENGTH), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(IDS)
MASK[1, :9] = 0
SEEN = MASK.bool()
POSITIONS = (MASK.cumsum(1) - 1).clamp(min=0)
LABELS = IDS.clone()
LABELS[1, :10] = -100  # what the last padding token would predict, too

grid = pytest.mark.parametrize(
    ("family", "letters"),
    [
        pytest.param(
            family,
            fitted(letters, family),
            id=f"{family}-{plan}",
            marks=() if family in QUICK_FAMILIES or plan == "mixed" else pytest.mark.exhaustive,
        )
        for family in MODEL_TYPES
        for plan, letters in PLANS.items()
        if row(family).linear or "linear" not in plan
    ],
)


def run(model: PreTrainedModel, **kwargs: Any) -> Any:
    return model(IDS, attention_mask=MASK, position_ids=POSITIONS, use_cache=False, **kwargs)


def silenced(model: PreTrainedModel, letters: str) -> PreTrainedModel:
    """A stock model in which, by its weights, the attention of `none` layers adds nothing."""
    for index, letter in enumerate(letters):
        if letter == "n":
            for parameter in output_projection(model, index).parameters():
                torch.nn.init.zeros_(parameter)
    return model


def naive_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **kwargs: Any
) -> Any:
    """The O(T²) strategy under an explicit mask, or the recurrent one token by token."""
    documents = SEEN.long() - 1
    if module.letter == "l":
        out = lolcats_attention_reference(query, key, value, module.maps, WINDOW, documents, kwargs["scaling"])
        return out.transpose(1, 2), None
    if module.letter in "LD":
        # Queries and keys before their rotary embedding, as the projections or their norms gave them.
        plain = [each.view(*query.shape[::2], -1, query.shape[3]).transpose(1, 2) for each in module.plain]
        near = sliding_attention_reference(query, key, value, WINDOW, None, SEEN[:, None, None], kwargs["scaling"])
        if module.letter == "L":
            features = [each.softmax(-1) for each in plain]
            far = gated_attention_reference(features[0], features[1], value, F.logsigmoid(plain[1]) / 16, documents)
            return (near / 2 + far / 2).transpose(1, 2), None
        gates = torch.einsum("bhtd,hdo->obht", F.pad(F.normalize(plain[1], dim=-1), (0, 1), value=1.0), module.maps[3])
        features = [F.normalize(each @ weight, dim=-1) for each, weight in zip(plain, module.maps[:2], strict=True)]
        log_decay, rate = F.logsigmoid(gates[0]) / 16, gates[1].sigmoid()
        far = delta_attention_reference(features[0], features[1], value, log_decay, rate, documents)
        mix = module.maps[2].sigmoid()[:, None, None]
        return (mix * near + (1 - mix) * far).transpose(1, 2), None
    causal = window_mask(LENGTH, LENGTH, LENGTH, query.device) & SEEN[:, None, None, :]
    windowed, sinks = module.windowed, None
    if module.sinks is not None:
        sinks = torch.zeros(HEADS).masked_scatter(windowed, module.sinks)
    out, full = (
        sliding_attention_reference(query, key, value, window, logits, causal, kwargs["scaling"], kwargs.get("softcap"))
        for window, logits in ((WINDOW, sinks), (LENGTH, None))
    )
    return torch.where(windowed[:, None, None], out, full).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("naive", naive_attention)


def reference(family: str, letters: str, like: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """The stock model with the weights of a boosted one: nothing removed, sliding layers under the naive strategy."""
    model = silenced(tiny_model(family, len(letters), **changes), letters)
    for letter, layer, other in zip(letters, decoder_layers(model), decoder_layers(like), strict=True):
        if letter in "sShHlLD":
            attention: Any = layer.self_attn
            attention.letter = letter
            if letter in "lD":
                names = LOLCATS_PARAMETERS if letter == "l" else FEATURE_PARAMETERS
                attention.maps = tuple(other.get_parameter(f"self_attn.{name}").detach() for name in names)
            if letter in "LD":
                attention.plain = [None, None]
                for index, name in enumerate("qk"):
                    source = getattr(attention, f"{name}_norm", None) or attention.get_submodule(f"{name}_proj")
                    source.register_forward_hook(
                        lambda _, __, out, index=index, module=attention: module.plain.__setitem__(index, out)
                    )
            attention.config = copy.copy(attention.config)
            attention.config._attn_implementation = "naive"
            attention.sinks = other.get_parameter("self_attn.sinks").detach() if letter in "SH" else None
            attention.windowed = torch.tensor(
                {"h": [True] * 2 + [False] * 2, "H": [False] * 2 + [True] * 2}.get(letter, [True] * HEADS)
            )
    return model


@grid
def test_identity(family: str, letters: str) -> None:
    """All full: the base bit for bit. A window as long as the text is full attention; no attention adds nothing."""
    changes = {"sliding_window": LENGTH} if family in SLIDING_BASES else {}
    base = silenced(tiny_model(family, **changes), letters)
    expected = run(base).logits[SEEN]
    hidden = base.get_decoder()(IDS, attention_mask=MASK, position_ids=POSITIONS).last_hidden_state
    torch.testing.assert_close(head_logits(base, hidden)[SEEN], expected)
    exact = letters.lower().replace("d", "l")
    found = run(apply_plan(base, layer_plans(exact, LENGTH))).logits[SEEN]
    if not set(letters) - {*"fx"}:
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@grid
def test_reference(family: str, letters: str) -> None:
    model = boosted(letters, family)
    found = run(model).logits[SEEN]
    torch.testing.assert_close(found, run(reference(family, letters, model)).logits[SEEN], atol=1e-4, rtol=1e-3)
    if set(letters) - {*"fx"}:
        base = run(tiny_model(family)).logits[SEEN]
        assert (found - base).abs().max() > 0.1  # the plan does change the model


@grid
def test_cache(family: str, letters: str) -> None:
    """Batches with left padding, in one prefill and in chunks, well past the window; each layer holds what it may."""
    model, prompt, new = boosted(letters, family), 30, 25
    types = base_layer_types(tiny_model(family).config.get_text_config())
    for chunk in (None, 13):
        out = model.generate(
            IDS[:, :prompt], attention_mask=MASK[:, :prompt], max_new_tokens=new, min_new_tokens=new, do_sample=False,
            output_logits=True, return_dict_in_generate=True, prefill_chunk_size=chunk,
        )  # fmt: skip
        mask = torch.cat([MASK[:, :prompt], torch.ones(2, new, dtype=torch.long)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        whole = model(out.sequences, attention_mask=mask, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(torch.stack(out.logits, 1), whole[:, prompt - 1 : -1], atol=1e-3, rtol=1e-3)
        for letter, kind, layer in zip(letters, types, out.past_key_values.layers, strict=True):
            if letter == "x":  # a state
                assert not hasattr(layer, "keys")
                continue
            held = 0 if layer.keys is None else layer.keys.shape[2]
            full = WINDOW - 1 if kind == "sliding_attention" else prompt + new - 1
            assert held == (0 if letter == "n" else WINDOW - 1 if letter in "sSlLD" else full)
            if letter in "hH":
                slides = set(letters) & {*"sS"} or "sliding_attention" in types or row(family).computed_types
                near = WINDOW - 1 if slides else min(full, WINDOW - 1 + SPARE_TOKENS)
                assert (layer.keys.shape[1], layer.windowed.keys.shape[1:3]) == (1, (1, near))


def test_the_cache_of_a_prompt_frees_what_the_window_drops() -> None:
    layers = boosted("sSHn")(IDS).past_key_values.layers
    for layer in (*layers[:2], layers[2].windowed):
        for held in (layer.keys, layer.values):
            assert held.untyped_storage().nbytes() == held.nbytes == held.shape.numel() * 4
            assert held.shape[2] == WINDOW - 1


def comparable(config: Any) -> dict[str, Any]:
    """What a config says, but for the type that loading writes into each part of a wrapper's."""
    found = {**config.to_diff_dict(), "model_type": None}
    for part in ("text_config", "vision_config"):
        found.get(part, {}).pop("dtype", None)
    return found


@grid
def test_save_and_load(family: str, letters: str, tmp_path: Path) -> None:
    for tied in (False, True):
        model = boosted(letters, family, tie_word_embeddings=tied)
        model.save_pretrained(tmp_path)
        loaded = auto_class(model.config).from_pretrained(tmp_path)
        assert type(loaded).__name__ == architecture_of(family)
        # Transformers' name for a Mistral with `layer_types` is Ministral.
        there, here = (comparable(each.config) for each in (loaded, model))
        assert there == here
        assert torch.equal(run(loaded).logits, run(model).logits)


@grid
def test_gradients(family: str, letters: str) -> None:
    """Every parameter of the language model has a gradient, and it is the reference's."""
    model = boosted(letters, family)
    stock = reference(family, letters, model)
    for each in (model, stock):
        run(each, labels=LABELS).loss.backward()
    expected = {name: parameter.grad for name, parameter in stock.named_parameters()}
    tower = tower_parameters(model)
    for name, parameter in model.named_parameters():
        if name in tower:
            continue
        if parameter.requires_grad:
            assert parameter.grad is not None, name
        else:  # biases of routers, which choose experts and do nothing else
            assert name.endswith(("expert_bias", "e_score_correction_bias"))
            continue
        if not name.endswith(("sinks", *FEATURE_PARAMETERS)):
            assert (parameter.grad - expected[name]).norm() < 1e-3 * expected[name].norm(), name


def test_rows_say_what_serves_them_or_why_nothing_does() -> None:
    for each in (*FAMILIES.values(), *WRAPPERS.values()):
        assert bool(each.vllm) != bool(each.vllm_lacks)
    wrapped = {inside for wrapper in WRAPPERS.values() for inside in wrapper.inside}
    alone = {name for name, family in FAMILIES.items() if "inside a wrapper alone" not in family.vllm_lacks}
    assert FAMILIES.keys() - alone == wrapped - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()


# Every wrapper with every language model that its row names.
INSIDE = [(wrapper, family) for wrapper, row in WRAPPERS.items() for family in row.inside]
# Settings by which real models of a family differ in more than sizes from its tiny one.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "EXAONE 4 1.2B": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 5}),
    "StableLM 2 1.6B": ("stablelm", {"use_parallel_residual": False, "qk_layernorm": False, "use_qkv_bias": True}),
    "HyperCLOVA X without post-norms": ("hyperclovax", {"use_post_norm": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_a_family(variant: str, tmp_path: Path) -> None:
    (family, changes), letters = VARIANTS[variant], PLANS["mixed"]
    model = boosted(letters, family, **changes)
    found = run(model).logits
    expected = run(reference(family, letters, model, **changes)).logits
    torch.testing.assert_close(found[SEEN], expected[SEEN], atol=1e-4, rtol=1e-3)
    model.save_pretrained(tmp_path)
    assert torch.equal(run(AutoModelForCausalLM.from_pretrained(tmp_path)).logits, found)


images = pytest.mark.parametrize(
    "wrapper",
    [pytest.param(name, marks=pytest.mark.exhaustive if name == "qwen3_5_moe" else ()) for name in WRAPPERS],
)


@images
def test_images_identity_and_reference(wrapper: str, tmp_path: Path) -> None:
    """With an image in the prompt: all full is the base bit for bit, a plan is the reference's, and so when loaded."""
    prompt, letters = image_prompt(wrapper, IDS) | {"attention_mask": MASK}, fitted(PLANS["mixed"], wrapper)
    base = tiny_model(wrapper)
    expected = base(**prompt).logits
    assert (base(IDS, attention_mask=MASK).logits - expected)[:, -1].abs().max() > 0.1  # the image matters
    assert torch.equal(apply_plan(base, layer_plans(fitted("fffff", wrapper)))(**prompt).logits, expected)
    model = boosted(letters, wrapper)
    found = model(**prompt).logits
    expected = reference(wrapper, letters, model)(**prompt).logits
    if wrapper != "gemma3":  # the naive strategy is causal
        torch.testing.assert_close(found[SEEN], expected[SEEN], atol=1e-4, rtol=1e-3)
    model.save_pretrained(tmp_path)
    assert torch.equal(auto_class(model.config).from_pretrained(tmp_path)(**prompt).logits, found)


@pytest.mark.parametrize("letters", ["sss", "hfs"])
def test_images_that_see_themselves_both_ways(letters: str) -> None:
    """Gemma 3's full layers under a window, half as long as an image, are its own sliding layers."""
    window, rope = 2, {"full_attention": ROPE, "sliding_attention": ROPE}
    prompt = image_prompt("gemma3", IDS) | {"attention_mask": MASK}
    settings: dict[str, Any] = {"rope_parameters": rope, "sliding_window": window}
    base = tiny_model("gemma3", 3, **settings, layer_types=["full_attention"] * 3)
    kinds = ["full_attention" if letter == "f" else "sliding_attention" for letter in letters]
    stock = tiny_model("gemma3", 3, **settings, layer_types=kinds)
    full = base(**prompt).logits
    found = apply_plan(base, layer_plans(letters.replace("h", "s"), window))(**prompt).logits
    torch.testing.assert_close(found[SEEN], stock(**prompt).logits[SEEN], atol=1e-4, rtol=1e-3)
    assert (found - full)[SEEN].abs().max() > 0.1
    if "h" in letters:  # a window as long as the text: the full heads and the others are full attention
        base = tiny_model("gemma3", 3, **settings, layer_types=["full_attention"] * 3)
        found = apply_plan(base, layer_plans(letters, LENGTH))(**prompt).logits
        torch.testing.assert_close(found[SEEN], full[SEEN], atol=1e-4, rtol=1e-3)


@images
def test_images_and_the_cache(wrapper: str) -> None:
    """Generation after an image, past the window, gives what one pass without a cache does."""
    model, start, new = boosted(fitted(PLANS["mixed"], wrapper), wrapper), 30, 25
    whole = image_prompt(wrapper, IDS) | {"attention_mask": MASK}
    whole = {name: value for name, value in whole.items() if name != "input_ids"}
    rows = {name: value[:, :start] if value.shape == MASK.shape else value for name, value in whole.items()}
    out = model.generate(
        image_prompt(wrapper, IDS)["input_ids"][:, :start], **rows, max_new_tokens=new, min_new_tokens=new,
        do_sample=False, output_logits=True, return_dict_in_generate=True, suppress_tokens=[IMAGE_TOKEN],
    )  # fmt: skip
    length = start + new
    rows = {name: value[:, :length] if value.shape == MASK.shape else value for name, value in whole.items()}
    expected = model(out.sequences, **rows, use_cache=False).logits
    torch.testing.assert_close(torch.stack(out.logits, 1), expected[:, start - 1 : -1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("inside", [pair for pair in INSIDE if pair[1] != WRAPPERS[pair[0]].inside[0]], ids="-".join)
def test_every_language_model_of_a_wrapper(inside: tuple[str, str], tmp_path: Path) -> None:
    wrapper, family = inside
    letters = fitted(PLANS["mixed"], family)
    model, prompt = boosted(letters, wrapper, inside=family), image_prompt(wrapper, IDS) | {"attention_mask": MASK}
    found = model(**prompt).logits
    expected = reference(wrapper, letters, model, inside=family)(**prompt).logits
    torch.testing.assert_close(found[SEEN], expected[SEEN], atol=1e-4, rtol=1e-3)
    model.save_pretrained(tmp_path)
    assert torch.equal(auto_class(model.config).from_pretrained(tmp_path)(**prompt).logits, found)


@pytest.mark.parametrize("family", families(others=False))
def test_sliding_layers_ask_for_no_square_mask(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a layer that runs the stock attention no `[B, 1, T, T]` mask is made, padding or not."""
    if family == "gemma3":
        pytest.skip("the wrapper makes the masks, in which images see themselves whole")
    slides = [kind == "sliding_attention" for kind in base_layer_types(tiny_model(family).config.get_text_config())]
    model = boosted("".join("n" if native else "s" for native in slides), family)
    seen = []
    forward = modeling.sliding_attention_forward

    def spy(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        seen.append(tuple(mask.shape))
        return forward(module, query, key, value, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, modeling.SLIDING, spy)
    run(model)
    assert seen == [(2, 1, 1, LENGTH)] * slides.count(False)
