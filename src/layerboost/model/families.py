"""Families as data: per Hugging Face `model_type`, where attention and its norms live and what it supports.

Travels inside every boosted checkpoint, so it imports nothing of layerboost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How one `model_type` is built.

    `attention_norms` are the norms of a decoder layer that serve attention alone and go with it; `config_flags` are
    settings its config class needs before it keeps a `sliding_window`.
    """

    model_type: str
    attention: str = "self_attn"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    config_flags: tuple[tuple[str, Any], ...] = ()
    supports: tuple[str, ...] = ("none", "sliding", "sink", "vllm")


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama"),
        Family("qwen2", config_flags=(("use_sliding_window", True),)),
        Family("qwen3", config_flags=(("use_sliding_window", True),)),
        Family("smollm3", config_flags=(("use_sliding_window", True),)),
        Family("granite"),
        Family("olmo2", attention_norms=("post_attention_layernorm",)),
    )
}
