"""Sink logits: the fit against the error of a sliding attention's own projected output."""

from __future__ import annotations

import pytest
import torch
from tiny import HEADS, families, tiny_model

from layerboost.model.attention import sliding_attention_reference
from layerboost.model.modeling import attention_layers
from layerboost.model.sinks import calibrate_sinks, fit, head_outputs, terms
from layerboost.schemas.plan import LayerPlan

IDS = torch.randint(3, 200, (3, 48), generator=torch.Generator().manual_seed(1))


def drawn() -> tuple[torch.Tensor, ...]:
    """Queries of 4 heads, keys and values of 2, and their output projection."""
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(4, 40, 16, generator=draw) * 3
    key, value = torch.randn(2, 40, 16, generator=draw), torch.randn(2, 40, 16, generator=draw)
    return query, key, value, torch.randn(24, 64, generator=draw)


def test_the_fitted_sinks_bring_the_output_nearest_to_full_attention() -> None:
    query, key, value, project = drawn()
    outputs = head_outputs(query[None], key[None], value[None], 8, 0.25)
    sinks = fit(terms(*outputs, project), torch.arange(4))

    def added(window: int, sinks: torch.Tensor | None) -> torch.Tensor:
        out = sliding_attention_reference(query[None], key[None], value[None], window, sinks=sinks, scaling=0.25)[0]
        return out.transpose(0, 1).flatten(1) @ project.T

    full = added(40, None)
    torch.testing.assert_close(outputs[0].flatten(1) @ project.T, full)

    def error(sinks: torch.Tensor | None) -> float:
        return float((added(8, sinks) - full).square().sum())

    assert error(sinks) < 0.98 * min(error(None), error(outputs[3][0]))
    for head in range(4):
        for step in (-0.5, 0.5):
            moved = sinks.clone()
            moved[head] += step
            assert error(moved) >= error(sinks) * (1 - 1e-5)


def test_sinks_of_some_heads_are_fitted_with_the_others_exact() -> None:
    query, key, value, project = drawn()
    outputs = head_outputs(query[None], key[None], value[None], 8, 0.25)
    found = fit(terms(*outputs, project), torch.tensor([2, 3]))
    # The same two heads with a projection of their own.
    alone = head_outputs(query[None, 2:], key[None, 1:], value[None, 1:], 8, 0.25)
    torch.testing.assert_close(found, fit(terms(*alone, project[:, 32:]), torch.arange(2)))


def test_softcapped_scores_are_fitted_as_the_model_sees_them() -> None:
    query, key, value = torch.randn(3, 2, 30, 8), torch.randn(3, 1, 30, 8), torch.randn(3, 1, 30, 8)
    plain, capped = head_outputs(query, key, value, 8, 1.0)[2], head_outputs(query, key, value, 8, 1.0, softcap=1e4)[2]
    torch.testing.assert_close(plain, capped, atol=1e-3, rtol=1e-3)
    assert head_outputs(query, key, value, 8, 1.0, softcap=0.5)[2].max() <= 0.5 + torch.log(torch.tensor(8.0))


@pytest.mark.parametrize("family", families())
def test_one_pass_gives_every_layer_and_window_and_leaves_the_model_as_it_was(family: str) -> None:
    base = tiny_model(family)
    layers = attention_layers(base.config.get_text_config())[::2]
    before = base(IDS).logits
    sinks = calibrate_sinks(base, list(IDS.split(2)), layers, [8, 16])
    assert set(sinks.terms) == {(layer, window) for layer in layers for window in (8, 16)}
    for layer, window in sinks.terms:
        for full, heads in (((), HEADS), ((1,), HEADS // 2)):
            found = sinks(LayerPlan(layer=layer, attention="sliding", window=window, sink=True, full_kv_heads=full))
            assert found.shape == (heads,)
            assert found.isfinite().all()
    assert torch.equal(base(IDS).logits, before)
