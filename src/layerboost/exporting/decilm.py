"""Llama-shaped checkpoints without sinks as `DeciLMForCausalLM`, which vLLM serves without layerboost.

The tensors are the checkpoint's own. Written against vLLM 0.32's model_executor/models/nemotron_nas.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from layerboost.exporting import configuration_decilm
from layerboost.model.mlp import recorded_widths
from layerboost.model.modeling import base_config, skipped_layers

# By what a family differs from Llama, in settings that vLLM's class reads.
SETTINGS: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {"qkv_bias": True}}
# Keys for boosted checkpoints or the family's own class alone.
DROPPED = (
    "attention_sink_layers",
    "base_layer_types",
    "max_window_layers",
    "per_layer_config",
    "use_sliding_window",
)
WINDOW = ("layer_types", "sliding_window")
# The configuration class that travels in the export.
CONFIGURATION = Path(configuration_decilm.__file__ or "")


def decilm_config(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the plain config of a boosted Llama-shaped config as DeciLM."""
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
        **SETTINGS[config.model_type],
        "model_type": configuration_decilm.DeciLMConfig.model_type,
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{CONFIGURATION.stem}.DeciLMConfig"},
        "block_configs": blocks,
    }
