"""vLLM's prefix cache of a model with sliding layers: what it keeps, so that requests find a shared prefix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from layerboost.schemas.plan import LayerPlan

# vLLM asks for a multiple of its blocks, all of whose usual sizes divide this number.
STEP_TOKENS = 1024


def retained_tokens(window: int) -> int:
    """Return after how many tokens of a prompt the next window is kept in vLLM's prefix cache: at least four windows,
    so that what is kept stays a fraction, and a multiple of STEP_TOKENS."""
    return STEP_TOKENS * -(-4 * window // STEP_TOKENS)


def prefix_flag(config: Mapping[str, Any], layers: Sequence[LayerPlan]) -> dict[str, str]:
    """Return the flag with which vLLM keeps windows of an export in its prefix cache, for the second request to find.

    For boosted checkpoints the plugin sets it. `config`: the export's; none if no layer of it slides.
    """
    kinds = config.get("layer_types", ())
    if "sliding_attention" not in kinds:
        return {}
    kept = [kind for kind, entry in zip(kinds, layers, strict=True) if entry.strategy.keeps_weights]
    full = "full_attention" in kept
    return {"--prefix-cache-retention-interval": str(retained_tokens(config["sliding_window"])) if full else "None"}
