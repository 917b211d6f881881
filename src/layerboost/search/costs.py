"""What strategies cost: bytes of KV cache per request."""

from __future__ import annotations

from collections.abc import Sequence

from layerboost.artifacts import LayerPlan, ModelInfo


def layer_kv_bytes(model: ModelInfo, entry: LayerPlan, context_tokens: int) -> int:
    """Bytes one layer holds for one request: all of `context_tokens`, its window or the base's, or nothing."""
    if entry.attention == "none":
        return 0
    window = model.sliding_window if entry.layer in model.sliding_layers else entry.window
    return min(window or context_tokens, context_tokens) * model.kv_bytes_per_token


def plan_kv_bytes(model: ModelInfo, layers: Sequence[LayerPlan], context_tokens: int) -> int:
    """Bytes a whole plan holds for one request of `context_tokens`."""
    return sum(layer_kv_bytes(model, entry, context_tokens) for entry in layers)


def base_kv_bytes(model: ModelInfo, context_tokens: int) -> int:
    """Bytes the base holds for one request of `context_tokens`."""
    full = [LayerPlan(layer=layer, attention="full") for layer in range(model.layers)]
    return plan_kv_bytes(model, full, context_tokens)
