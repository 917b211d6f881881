"""Llama-shaped checkpoints as GraniteSWA, a stock architecture with windows per layer and sinks.

Every layer of it has sinks and a window or none. A sink of −1e30 takes nothing; a layer without attention becomes a
sliding layer whose output projection is zero, exact but for the window of keys and values that it holds.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedConfig

from layerboost.model.files import Tensors
from layerboost.model.modeling import skipped_layers

NO_SINK = -1e30
# The window of layers without attention if no layer slides: vLLM's smallest block.
LEAST_WINDOW = 16
# Granite's multipliers, which are neutral in other families.
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")


def granite_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the plain config of a boosted Llama-shaped config as GraniteSWA."""
    skipped, layers = set(skipped_layers(config)), config.num_hidden_layers
    head_dim = _head_dim(config)
    sliding = [index in skipped or kind == "sliding_attention" for index, kind in enumerate(layer_kinds(config))]
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
        "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters",
    )  # fmt: skip
    theta = config.rope_parameters["rope_theta"]
    rotated = getattr(config, "no_rope_layers", None)  # SmolLM3's: 1 for a layer that rotates
    return {
        "architectures": ["GraniteSWAForCausalLM"],
        "model_type": "granite_swa",
        "dtype": config.to_dict().get("dtype"),
        **{name: getattr(config, name) for name in same},
        **{name: getattr(config, name, 1.0) for name in MULTIPLIERS},
        "head_dim": head_dim,
        "attention_multiplier": getattr(config, "attention_multiplier", head_dim**-0.5),
        "attention_bias": _has_bias(config),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
        "sliding_window": window_of(config),
        "layer_rope_theta": [theta if rotated is None or rotated[index] else 0 for index in range(layers)],
    }


def granite_tensors(config: PreTrainedConfig, tensors: Tensors) -> Tensors:
    """Return the tensors of a boosted checkpoint with those that GraniteSWA has besides."""
    some = next(iter(tensors.values()))
    found, heads, head_dim = dict(tensors), config.num_attention_heads, _head_dim(config)
    sizes = {"q_proj": heads * head_dim, "o_proj": config.hidden_size}
    sizes |= dict.fromkeys(("k_proj", "v_proj"), config.num_key_value_heads * head_dim)
    inputs = dict.fromkeys(sizes, config.hidden_size) | {"o_proj": heads * head_dim}
    none = max(NO_SINK, torch.finfo(some.dtype).min)
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        found.setdefault(f"{name}.self_attn.sinks", some.new_full((heads,), none))
        found.setdefault(f"{name}.input_layernorm.weight", some.new_ones(config.hidden_size))
        for part, size in sizes.items():
            found.setdefault(f"{name}.self_attn.{part}.weight", some.new_zeros(size, inputs[part]))
            if _has_bias(config):
                found.setdefault(f"{name}.self_attn.{part}.bias", some.new_zeros(size))
    return found


def window_of(config: PreTrainedConfig) -> int:
    """Return the window of all layers that slide."""
    return int(config.sliding_window) if "sliding_attention" in layer_kinds(config) else LEAST_WINDOW


def layer_kinds(config: PreTrainedConfig) -> list[str]:
    """Return the attention of each layer; a stock Llama has no list of it."""
    kinds: list[str] | None = getattr(config, "layer_types", None)
    return kinds or ["full_attention"] * config.num_hidden_layers


def _head_dim(config: PreTrainedConfig) -> int:
    """Return the size of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _has_bias(config: PreTrainedConfig) -> bool:
    """Return whether a family's projections have biases: Qwen2's always, on q, k and v."""
    return bool(config.model_type == "qwen2" or getattr(config, "attention_bias", False))
