"""Families as data: per Hugging Face `model_type`, where attention and its norms live and what serves it.

Travels inside every boosted checkpoint, so it imports nothing of layerboost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

TRANSFORMERS_BACKEND = "Transformers backend"


@dataclass(frozen=True)
class Family:
    """How one `model_type` is built.

    `attention_norms` are the norms of a decoder layer that serve attention alone and go with it; `config_flags` are
    settings its config class needs before it keeps a `sliding_window`; `attn_implementation` is the stock backend to
    load it with where the default one leaves something out; `rotary_by_type` says that a layer's type decides on its
    rotary embedding too, not on its window alone; `vllm` says which classes serve it, empty if none does.
    """

    model_type: str
    attention: str = "self_attn"
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    config_flags: tuple[tuple[str, Any], ...] = ()
    attn_implementation: str | None = None
    rotary_by_type: bool = False
    vllm: str = TRANSFORMERS_BACKEND


AROUND = ("input_layernorm", "post_attention_layernorm")
AFTER = ("post_attention_layernorm",)
SLIDING_FLAG = (("use_sliding_window", True),)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", vllm="Llama classes"),
        Family("qwen2", config_flags=SLIDING_FLAG),
        Family("qwen3", vllm="Qwen3 classes", config_flags=SLIDING_FLAG),
        # Transformers loads a Mistral with `layer_types`, which a boosted one has, as a Ministral.
        Family("mistral"),
        Family("ministral"),
        Family("phi3"),
        # The stock SDPA path drops the soft-cap of the scores.
        Family("gemma2", attention_norms=AROUND, attn_implementation="eager"),
        Family("gemma3_text", attention_norms=AROUND, rotary_by_type=True),
        Family("olmo2", attention_norms=AFTER),
        Family("olmo3", attention_norms=AFTER, rotary_by_type=True),
        Family("smollm3", config_flags=SLIDING_FLAG),
        Family("granite"),
        # Attention and MLP run side by side behind one norm, which the MLP still needs.
        Family("cohere2", attention_norms=(), rotary_by_type=True),
    )
}
