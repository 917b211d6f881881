"""Layers whose KV heads differ, as several attention modules; vLLM's own are in test_vllm.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import WINDOW, layer_plans, tiny_model
from torch import nn

from layerboost.costs import memory
from layerboost.model.surgery import boosted_config
from layerboost.schemas.plan import LayerPlan
from layerboost.vllm_plugin.heads import check_ranks, head_windows, make_attention, module_heads


def config(*full: tuple[int, ...], kv_heads: int = 4) -> Any:
    """A config whose layers keep these of 4 KV heads full."""
    plan = [
        LayerPlan(layer=layer, attention="sliding", window=WINDOW, sink=True, full_kv_heads=heads)
        for layer, heads in enumerate(full)
    ]
    return boosted_config(tiny_model(layers=len(full), num_key_value_heads=kv_heads).config, plan)


class Module(nn.Module):
    """Stands for vLLM's attention: the sum of queries and keys, times ten for a full head, plus the sinks."""

    def __init__(self, num_kv_heads: int, prefix: str, **settings: Any) -> None:
        super().__init__()
        self.heads, self.prefix, self.settings = num_kv_heads, prefix, settings

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        assert key.shape[1] == value.shape[1] == self.heads * 2
        groups = query.shape[1] // key.shape[1]
        repeated = key.unflatten(1, (self.heads, 1, 2)).expand(-1, -1, groups, -1).flatten(1)
        window, sinks = self.settings["per_layer_sliding_window"], self.settings.get("sinks")
        out: torch.Tensor = (query + repeated) * (10 if window is None else 1)
        return out if sinks is None else out.add(sinks.repeat_interleave(2))


@pytest.mark.parametrize(("full", "modules"), [((1,), 4), ((0, 2), 2), ((0, 1), 2), ((2, 0, 3), 4)])
def test_every_head_reaches_its_module_and_its_place(full: tuple[int, ...], modules: int) -> None:
    found = config(full)
    sinks = torch.arange(100.0, 100 + 4 - len(full))
    attention = make_attention(found, 0, 4, 4, sinks, "model.layers.0.self_attn.attn", Module)
    assert len(attention.part_modules) == modules
    names = [module.prefix for module in attention.part_modules]
    assert len(set(names)) == modules
    assert all(sum(part.isdigit() for part in name.split(".")) == 1 for name in names)
    query, key, value = torch.randn(5, 8), torch.randn(5, 8), torch.randn(5, 8)
    expected = query + key
    windowed = [head for head in range(4) if head not in full]
    for head in range(4):
        columns = slice(2 * head, 2 * head + 2)
        expected[:, columns] *= 10 if head in full else 1
        if head in windowed:
            expected[:, columns] += sinks[windowed.index(head)]
    torch.testing.assert_close(attention(query, key, value), expected)


def test_whole_layers_stay_one_module() -> None:
    found = boosted_config(tiny_model(layers=3).config, layer_plans("fsn"))
    assert isinstance(make_attention(found, 0, 4, 2, None, "0.attn", Module), Module)
    assert make_attention(found, 1, 4, 2, None, "1.attn", Module).settings["per_layer_sliding_window"] == WINDOW


@pytest.mark.parametrize("full", [[(1,), ()], [(0, 2), (1, 3)], [(0, 1), (2,)], [(), ()]])
def test_modules_are_those_of_the_memory_arithmetic(full: list[tuple[int, ...]]) -> None:
    found = config(*full)
    plan = [
        LayerPlan(layer=layer, attention="sliding", window=WINDOW, full_kv_heads=heads)
        for layer, heads in enumerate(full)
    ]
    assert module_heads(found) == memory.module_heads(4, plan)
    kinds = [window for layer in range(len(full)) for window in head_windows(found, layer)]
    size = module_heads(found)
    assert memory.cached(plan, 4, size) == (kinds.count(None) // size, kinds.count(WINDOW) // size)


def test_ranks_must_have_the_same_kinds_of_heads() -> None:
    check_ranks(config((0, 2)), 2)
    assert module_heads(config((0, 2)), 2) == 1
    check_ranks(config((0, 1)), 1)
    for full, ranks in (((0, 1), 2), ((1,), 2), ((0,), 4), ((0, 2), 3)):
        with pytest.raises(ValueError, match=r"layer 0 keeps KV heads .* its ranks would differ"):
            check_ranks(config(full), ranks)
