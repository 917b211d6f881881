"""Linear attention against its recurrent references: values, gradients, states, documents; what it is at its limits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from references import delta_attention_reference, gated_attention_reference, lolcats_attention_reference
from tiny import boosted, info, layer_plans, tiny_model
from torch.nn import functional as F
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from layerboost.costs.budget import base_kv_bytes, plan_kv_bytes
from layerboost.model.attention import sliding_attention_reference
from layerboost.model.linear_attention import (
    FEATURES,
    GATED_BLOCK,
    LOLCATS_PARAMETERS,
    delta_attention,
    documents_of,
    gated_attention,
    hedgehog,
    lolcats_attention,
    lolcats_state,
)
from layerboost.model.modeling import decoder_layers
from layerboost.schemas.plan import LayerPlan

SIZE = 8
# batch, query heads, key heads, tokens
SHAPES = {"heads": (2, 2, 2, 20), "grouped": (2, 6, 2, 33), "one-key-head": (1, 4, 1, 40), "short": (2, 4, 2, 5)}
WINDOWS = {"window-1": 1, "window-5": 5, "window-16": 16, "window-beyond-text": 64}
PLACES = ("one-document", "left-padding", "packed")
Maps = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def tensors(shape: str) -> list[torch.Tensor]:
    """Query, key and value in double precision, which want gradients."""
    batch, heads, key_heads, tokens = SHAPES[shape]
    torch.manual_seed(0)
    made = [torch.randn(batch, count, tokens, SIZE, dtype=torch.float64) for count in (heads, key_heads, key_heads)]
    return [(tensor * 2).requires_grad_() for tensor in made]


def maps_for(heads: int) -> Maps:
    """Feature maps far from their beginning."""
    made = (torch.randn(heads, SIZE, FEATURES) * 0.4, torch.randn(heads, SIZE, FEATURES) * 0.4, torch.randn(heads))
    query, key, mix = (each.double().requires_grad_() for each in made)
    return query, key, mix


def documents(shape: str, place: str) -> torch.Tensor | None:
    batch, _, _, tokens = SHAPES[shape]
    if place == "one-document":
        return None
    if place == "hole":
        found = torch.zeros(batch, tokens, dtype=torch.long)
        found[0, 2:4] = -1
        return found
    if place == "left-padding":
        found = torch.zeros(batch, tokens, dtype=torch.long)
        found[-1, : min(9, tokens - 2)] = -1
        return found
    return (torch.arange(tokens) // 7 * 7).expand(batch, -1)


def outcome(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], places: Any) -> list[torch.Tensor]:
    """Output and gradients of a loss over the queries that are no padding."""
    out = function()
    seen = 1.0 if places is None else (places >= 0)[:, None, :, None]
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    # No key is beyond a window that is longer than a document.
    gradients = torch.autograd.grad((out * seen * weights).sum(), inputs, allow_unused=True, materialize_grads=True)
    return [(out * seen).detach(), *gradients]


@pytest.mark.parametrize(("shape", "window", "place"), itertools.product(SHAPES, WINDOWS, PLACES))
def test_lolcats(shape: str, window: str, place: str) -> None:
    query, key, value = tensors(shape)
    maps, places, length = maps_for(query.shape[1]), documents(shape, place), WINDOWS[window]
    inputs = [query, key, value, *maps]
    for fast, slow in zip(
        outcome(lambda: lolcats_attention(query, key, value, maps, length, places), inputs, places),
        outcome(lambda: lolcats_attention_reference(query, key, value, maps, length, places), inputs, places),
        strict=True,
    ):
        torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize(("shape", "place"), itertools.product(SHAPES, PLACES))
def test_gated(shape: str, place: str) -> None:
    query, key, value = tensors(shape)
    # Gates that forget all and nothing are among them.
    gate = (-torch.rand(key.shape, dtype=torch.float64) * torch.tensor([0.0, 0.1, 1, 50] * 2)).requires_grad_()
    places, inputs = documents(shape, place), [query, key, value, gate]
    for fast, slow in zip(
        outcome(lambda: gated_attention(query, key, value, gate, places)[0], inputs, places),
        outcome(lambda: gated_attention_reference(query, key, value, gate, places), inputs, places),
        strict=True,
    ):
        torch.testing.assert_close(fast, slow)


def delta_inputs(shape: str) -> dict[str, torch.Tensor]:
    """What `delta_attention` takes: directions, values, decays and rates near their limits among them."""
    query, key, value = (each.detach() for each in tensors(shape))
    log_decay = (
        -torch.rand(key.shape[:3], dtype=torch.float64) * torch.tensor([0.0, 0.1, 1, 20, 0.01] * 8)[: key.shape[2]]
    )
    rate = torch.rand(key.shape[:3], dtype=torch.float64).round(decimals=1)
    made = {"query": F.normalize(query, dim=-1), "key": F.normalize(key, dim=-1), "value": value}
    return {name: each.requires_grad_() for name, each in (made | {"log_decay": log_decay, "rate": rate}).items()}


@pytest.mark.parametrize(("shape", "place"), itertools.product(SHAPES, (*PLACES, "hole")))
def test_delta(shape: str, place: str) -> None:
    places, given = documents(shape, place), delta_inputs(shape)
    inputs = list(given.values())
    for fast, slow in zip(
        outcome(lambda: delta_attention(**given, documents=places)[0], inputs, places),
        outcome(lambda: delta_attention_reference(**given, documents=places), inputs, places),
        strict=True,
    ):
        torch.testing.assert_close(fast, slow)


@torch.no_grad()
def test_the_delta_rule_reads_what_it_wrote() -> None:
    """At a rate of 1 and without decay, a query equal to the last key reads that key's value, whatever came before."""
    given = delta_inputs("grouped")
    key, value, rate = given["key"], given["value"], torch.ones_like(given["rate"])
    out, _ = delta_attention(key, key, value, torch.zeros_like(rate), rate)
    torch.testing.assert_close(out, value)


def test_delta_is_the_rule_of_transformers() -> None:
    given = {name: each.detach().float() for name, each in delta_inputs("heads").items()}
    out, state = delta_attention(**given)
    query, key, value, log_decay, rate = (each.transpose(1, 2) for each in given.values())
    theirs, last = torch_recurrent_gated_delta_rule(query, key, value, log_decay, rate, output_final_state=True)
    torch.testing.assert_close(out, theirs.transpose(1, 2) * SIZE**0.5, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("place", PLACES[:2])
@pytest.mark.parametrize("parts", [(33,), (1,) * 33, (20, 13), (3, 17, 1, 1, 11)])
@torch.no_grad()
def test_a_text_in_parts_is_the_text(parts: tuple[int, ...], place: str) -> None:
    """Each part gets the keys that its window holds, and the state of what is older."""
    (query, key, value), window = tensors("grouped"), 5
    maps, places = maps_for(query.shape[1]), documents("grouped", place)
    gate = -torch.rand(key.shape, dtype=torch.float64)
    whole = lolcats_attention(query, key, value, maps, window, places)
    gated = gated_attention(query, key, value, gate, places)[0]
    corrected = delta_inputs("grouped")
    delta = delta_attention(**corrected, documents=places)[0]
    state = gated_state = delta_state = None
    start, seen = 0, slice(None) if places is None else places[-1] >= 0
    found: list[list[torch.Tensor]] = [[], [], []]
    for length in parts:
        end = start + length
        held = slice(max(0, start - window + 1), end)
        keys = None if places is None else places[:, held]
        part = query[:, :, start:end], key[:, :, held], value[:, :, held]
        found[0].append(lolcats_attention(*part, maps, window, keys, state))
        state = lolcats_state(*part[1:], maps[1], window, keys, state)
        q, k, v, g = (each[:, :, start:end] for each in (query, key, value, gate))
        own = None if places is None else places[:, start:end]
        out, gated_state = gated_attention(q, k, v, g, own, gated_state)
        found[1].append(out)
        pieces = {name: each[:, :, start:end] for name, each in corrected.items()}
        out, delta_state = delta_attention(**pieces, documents=own, state=delta_state)
        found[2].append(out)
        start = end
    for parts_out, expected in zip(found, (whole, gated, delta), strict=True):
        torch.testing.assert_close(torch.cat(parts_out, 2)[-1][:, seen], expected[-1][:, seen])


def test_lolcats_with_all_tokens_in_its_window_is_softmax_attention() -> None:
    query, key, value = (each.detach() for each in tensors("grouped"))
    found = lolcats_attention(query, key, value, maps_for(6), 33)
    torch.testing.assert_close(found, sliding_attention_reference(query, key, value, 33))


def test_features_are_two_distributions() -> None:
    features = hedgehog(torch.randn(2, 2, 1, 9, SIZE), torch.randn(6, SIZE, FEATURES))
    assert features.shape == (2, 2, 3, 9, 2 * FEATURES)
    torch.testing.assert_close(features.unflatten(-1, (2, -1)).sum(-1), torch.ones(2, 2, 3, 9, 2))


def test_documents_of_the_masks_that_transformers_makes() -> None:
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    padded = causal & (torch.arange(6) >= 2)
    packed = causal & (torch.arange(6)[:, None] // 3 == torch.arange(6) // 3)
    found = documents_of(torch.stack([causal, padded, packed])[:, None], 6)
    assert found is not None
    assert found.tolist() == [[0] * 6, [-1, -1, 2, 2, 2, 2], [0, 0, 0, 3, 3, 3]]
    rows = documents_of(padded[None, None, 4:], 2)
    assert rows is not None
    assert rows.tolist() == [[-1, -1, 0, 0, 0, 0]]
    assert documents_of(None, 6) is None


@pytest.mark.parametrize("letter", ["l", "L", "D"])
def test_half_precision_follows_float32(letter: str) -> None:
    ids = torch.randint(3, 200, (2, 60), generator=torch.Generator().manual_seed(1))
    model = boosted(f"f{letter}f")
    expected = model(ids).logits
    found = model.to(torch.bfloat16)(ids).logits
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.1 * expected.norm()


def test_feature_maps_start_the_same_in_every_model() -> None:
    one, other, below = (
        {name: decoder_layers(boosted("ll"))[layer].get_parameter(f"self_attn.{name}") for name in LOLCATS_PARAMETERS}
        for layer in (1, 1, 0)
    )
    assert all(torch.equal(one[name], other[name]) for name in LOLCATS_PARAMETERS)
    assert torch.equal(one["feature_map_q"], one["feature_map_k"])
    assert not torch.equal(one["feature_map_q"], below["feature_map_q"])
    assert one["window_mix"].sigmoid().tolist() == pytest.approx([0.1] * 4, abs=1e-5)


@pytest.mark.parametrize(("feature_map", "window"), [("lolcats", 259), ("liger", 96), ("delta", 96)])
def test_state_bytes(feature_map: Any, window: int) -> None:
    """With the heads of SmolLM2-135M a layer holds as much as a window of as many tokens."""
    model = info(1).model_copy(update={"heads": 9, "kv_heads": 3, "head_dim": 64})
    linear = LayerPlan(layer=0, attention="linear", window=64, feature_map=feature_map)
    sliding = LayerPlan(layer=0, attention="sliding", window=window)
    assert plan_kv_bytes(model, [linear], 1024) == plan_kv_bytes(model, [sliding], 1024) < base_kv_bytes(model, 1024)


@pytest.mark.parametrize("letters", ["lff", "Lff", "Dff"])
def test_the_cache_holds_what_is_counted(letters: str) -> None:
    """The state and, of the window, all but the token that comes next."""
    model = boosted(letters)
    ids = torch.randint(3, 200, (1, 3 * GATED_BLOCK))
    layer = model(ids).past_key_values.layers[0]
    shape = info(1).model_copy(update={"bytes_per_element": 4})
    next_token = shape.kv_bytes_per_token
    held = sum(each.untyped_storage().nbytes() for each in (layer.keys, layer.values, layer.state)) + next_token
    assert held == plan_kv_bytes(shape, layer_plans(letters[:1]), len(ids[0]))


@pytest.mark.parametrize("letters", ["lf", "Lf", "Df"])
def test_beams_take_their_states_with_them(letters: str) -> None:
    model, ids = boosted(letters), torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(1))
    settings = {"num_beams": 3, "max_new_tokens": 8, "do_sample": False}
    cached, plain = (model.generate(ids, use_cache=use_cache, **settings) for use_cache in (True, False))
    assert torch.equal(cached, plain)


def test_a_family_without_it_is_refused_by_name() -> None:
    from layerboost.errors import ConfigError
    from layerboost.model.surgery import check_plan

    with pytest.raises(ConfigError, match="cannot have linear attention") as refused:
        check_plan(tiny_model("gemma2", 2).config, layer_plans("ll"))
    assert refused.value.found.startswith("gemma2; it is tested on llama")
