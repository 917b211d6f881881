"""Llama-shaped checkpoints as stock classes: GraniteSWA with windows per layer and sinks, mlx-lm's Llama, and DeciLM.

Every layer of a GraniteSWA has sinks and a window or none. A sink of −1e30 takes nothing; a layer without attention
becomes a sliding layer whose output projection is zero, exact but for the window of keys and values that it holds.
mlx-lm's Llama class has the same form without sinks. DeciLM has absent attention, and no sinks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from layerboost.exporting import configuration_decilm
from layerboost.exporting.tensors import head_dim, slides_where_possible, whole_tensors, window_of
from layerboost.model.files import Tensors
from layerboost.model.mlp import recorded_widths
from layerboost.model.modeling import base_config, skipped_layers

NO_SINK = -1e30
# Granite's multipliers, which are neutral in other families.
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")
# By what a family differs from Llama, in settings that vLLM's DeciLM reads.
DECILM_SETTINGS: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {"qkv_bias": True}}
# Keys for boosted checkpoints or the family's own class alone.
DROPPED = ("attention_sink_layers", "base_layer_types", "max_window_layers", "per_layer_config", "use_sliding_window")
WINDOW = ("layer_types", "sliding_window")
# The configuration class that travels in an export as DeciLM.
CONFIGURATION = Path(configuration_decilm.__file__ or "")


def granite_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the plain config of a boosted Llama-shaped config as GraniteSWA."""
    theta = config.rope_parameters["rope_theta"]
    return {
        "architectures": ["GraniteSWAForCausalLM"],
        "model_type": "granite_swa",
        **llama_settings(config),
        "rope_parameters": config.rope_parameters,
        **{name: getattr(config, name, 1.0) for name in MULTIPLIERS},
        "attention_multiplier": getattr(config, "attention_multiplier", head_dim(config) ** -0.5),
        "layer_rope_theta": [theta if rotates else 0 for rotates in rotating_layers(config)],
    }


def mlx_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the plain config of a boosted Llama-shaped config as mlx-lm's Llama class reads it, windows included."""
    rope = {**config.rope_parameters}
    theta = rope.pop("rope_theta")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **llama_settings(config),
        "rope_theta": theta,
        "rope_scaling": None if rope["rope_type"] == "default" else rope,
    }


def decilm_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the plain config of a boosted Llama or Qwen2 as DeciLM, with the checkpoint's own tensors.

    Written against vLLM 0.32's model_executor/models/nemotron_nas.py, which serves it.
    """
    dropped = DROPPED if "sliding_attention" in config.layer_types else DROPPED + WINDOW
    plain = {key: value for key, value in config.to_dict().items() if key not in dropped}
    skipped, widths, full = set(skipped_layers(config)), recorded_widths(config), base_config(config).intermediate_size
    group = config.num_attention_heads // config.num_key_value_heads
    blocks = [
        {
            "attention": {
                "no_op": layer in skipped,
                "n_heads_in_group": None if layer in skipped else group,
                "replace_with_linear": False,
            },
            "ffn": {"no_op": False, "intermediate_size": widths.get(layer, full), "replace_with_linear": False},
        }
        for layer in range(config.num_hidden_layers)
    ]
    return {
        **plain,
        **DECILM_SETTINGS[config.model_type],
        "model_type": configuration_decilm.DeciLMConfig.model_type,
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CONFIGURATION.stem}.DeciLMConfig"},
        "block_configs": blocks,
    }


def llama_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """Return what is set alike in both: Llama's settings, and windows by layer."""
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
        "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings",
    )  # fmt: skip
    sliding = slides_where_possible(config)
    return {
        "dtype": config.to_dict().get("dtype"),
        **{name: getattr(config, name) for name in same},
        "head_dim": head_dim(config),
        "attention_bias": has_bias(config),
        "mlp_bias": getattr(config, "mlp_bias", False),
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in sliding],
        "sliding_window": window_of(config),
    }


def granite_tensors(config: PreTrainedConfig, tensors: Tensors) -> Tensors:
    """Return the tensors of a boosted checkpoint with those that GraniteSWA has besides."""
    some = next(iter(tensors.values()))
    found = llama_tensors(config, tensors)
    none = max(NO_SINK, torch.finfo(some.dtype).min)
    for layer in range(config.num_hidden_layers):
        sinks = some.new_full((config.num_attention_heads,), none)
        found.setdefault(f"model.layers.{layer}.self_attn.sinks", sinks)
    return found


def llama_tensors(config: PreTrainedConfig, tensors: Tensors) -> Tensors:
    """Return the tensors under Llama's names: with biases, o_proj has one too, which Qwen2 lacks."""
    found = whole_tensors(config, tensors)
    if has_bias(config):
        zeros = next(iter(tensors.values())).new_zeros(config.hidden_size)
        for layer in range(config.num_hidden_layers):
            found.setdefault(f"model.layers.{layer}.self_attn.o_proj.bias", zeros.clone())
    return found


def has_bias(config: PreTrainedConfig) -> bool:
    """Return whether a family's projections have biases: Qwen2's always, on q, k and v."""
    return bool(config.model_type == "qwen2" or getattr(config, "attention_bias", False))


def rotating_layers(config: PreTrainedConfig) -> list[bool]:
    """Return whether each layer has a rotary embedding: all but some of SmolLM3's."""
    rotated = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers
    return [bool(each) for each in rotated]
