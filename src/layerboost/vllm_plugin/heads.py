"""Layers whose KV heads differ: several of vLLM's attention modules, each of KV heads of one kind.

Each has a KV cache of its own, so that vLLM frees what falls out of a head's window. All modules of a model have the
same number of KV heads, layers of one kind included: vLLM groups its caches by their size, and pads them otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from layerboost.model.caches import take_heads
from layerboost.model.modeling import recorded_full_heads


def head_windows(config: Any, layer: int) -> list[int | None]:
    """Return the window of each KV head of a layer with attention; None for a full one."""
    slides = config.layer_types[layer] == "sliding_attention"
    full = recorded_full_heads(config).get(layer, [] if slides else range(config.num_key_value_heads))
    return [None if head in full else config.sliding_window for head in range(config.num_key_value_heads)]


def module_heads(config: Any, ranks: int = 1) -> int:
    """Return the KV heads of each attention module on one of `ranks` tensor-parallel ranks."""
    local = config.num_key_value_heads // ranks
    counts = [len(full) // ranks for full in recorded_full_heads(config).values()]
    return math.gcd(local, *counts) if counts else local


def check_ranks(config: Any, ranks: int) -> None:
    """Raise ValueError if tensor parallelism would give the ranks different KV heads of a layer."""
    heads = config.num_key_value_heads
    for layer, full in recorded_full_heads(config).items():
        kinds = [head in full for head in range(heads)]
        if heads % ranks or kinds != kinds[: heads // ranks] * ranks:
            raise ValueError(
                f"layer {layer} keeps KV heads {', '.join(map(str, full))} of {heads} full: with "
                f"--tensor-parallel-size {ranks} its ranks would differ, which vLLM cannot serve; use "
                "--data-parallel-size, or a plan in which each rank has the same"
            )


def make_attention(
    config: Any,
    layer: int,
    num_heads: int,
    num_kv_heads: int,
    sinks: torch.Tensor | None,
    prefix: str,
    attention: Callable[..., Any],
) -> Any:
    """Return the attention of a layer on this rank, which has `num_heads` of its query heads and `num_kv_heads` of its
    KV heads.

    `attention`: vLLM's class, with the arguments that all modules have; `sinks`: of the query heads with a window.
    """
    groups = num_heads // num_kv_heads

    def module(kv_heads: int, name: str, window: int | None, own: torch.Tensor | None) -> Any:
        given = {} if own is None else {"sinks": own}
        heads = {"num_heads": kv_heads * groups, "num_kv_heads": kv_heads}
        return attention(**heads, prefix=name, per_layer_sliding_window=window, **given)

    windows = head_windows(config, layer)[:num_kv_heads]
    size = module_heads(config, config.num_key_value_heads // num_kv_heads or 1)
    if size == num_kv_heads:
        return module(num_kv_heads, prefix, windows[0], sinks)
    kinds = [[head for head, window in enumerate(windows) if (window is None) == full] for full in (True, False)]
    parts = [heads[start : start + size] for heads in kinds for start in range(0, len(heads), size)]
    modules = []
    for heads in parts:
        window, own = windows[heads[0]], None
        if sinks is not None and window is not None:
            start = kinds[1].index(heads[0]) * groups
            own = sinks[start : start + size * groups]
        # vLLM reads the layer's number from the name, and no other: `heads_0` is none.
        modules.append(module(size, f"{prefix}.heads_{heads[0]}", window, own))
    return SplitAttention(parts, modules)


class SplitAttention(nn.Module):
    """Several of vLLM's attention modules in the place of one: queries, keys and values are `[T, H·D]`."""

    def __init__(self, parts: Sequence[list[int]], modules: Sequence[nn.Module]) -> None:
        """`parts`: the KV heads of each module."""
        super().__init__()
        order = [head for heads in parts for head in heads]
        self.parts, self.inverse = list(parts), sorted(range(len(order)), key=order.__getitem__)
        self.part_modules = nn.ModuleList(modules)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Return `[T, H·D]`, the heads in their order."""
        states = [each.unflatten(-1, (len(self.inverse), -1)) for each in (query, key, value)]
        outputs = [
            module(*(take_heads(each, heads).flatten(1) for each in states)).unflatten(-1, (len(heads), -1))
            for heads, module in zip(self.parts, self.part_modules, strict=True)
        ]
        joined = torch.cat(outputs, dim=1)
        if self.inverse != sorted(self.inverse):
            joined = joined[:, self.inverse]
        return joined.flatten(1)
