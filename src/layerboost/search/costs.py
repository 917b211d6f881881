"""What strategies cost: bytes of KV cache per request."""

from __future__ import annotations

from collections.abc import Sequence

from layerboost.artifacts import LayerPlan, ModelInfo, Strategy


def layer_kv_bytes(model: ModelInfo, attention: Strategy, window: int | None, context_tokens: int) -> int:
    """Bytes one layer holds for one request of `context_tokens`: all of it, its window, or nothing."""
    held = {"full": context_tokens, "sliding": min(window or 0, context_tokens), "none": 0}[attention]
    return held * model.kv_bytes_per_token


def plan_kv_bytes(model: ModelInfo, layers: Sequence[LayerPlan], context_tokens: int) -> int:
    """Bytes a whole plan holds for one request of `context_tokens`."""
    return sum(layer_kv_bytes(model, entry.attention, entry.window, context_tokens) for entry in layers)


def base_kv_bytes(model: ModelInfo, context_tokens: int) -> int:
    """Bytes the base holds for one request of `context_tokens`."""
    return model.layers * layer_kv_bytes(model, "full", None, context_tokens)
