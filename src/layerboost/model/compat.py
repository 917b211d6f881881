"""Plans without sinks of Llama-shaped models as `DeciLMForCausalLM`, which vLLM serves without layerboost.

Written against vLLM 0.32's model_executor/models/nemotron_nas.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from layerboost.errors import ConfigError
from layerboost.files import new_folder
from layerboost.model import configuration_decilm
from layerboost.model.card import CARD
from layerboost.model.integrity import check_checkpoint, read_config
from layerboost.model.modeling import base_layer_types, skipped_layers
from layerboost.schemas.plan import PlanFile, read_plan
from layerboost.schemas.run import PLAN

# Families that differ from Llama only by these settings, which vLLM's class reads.
LLAMA_SHAPED: dict[str, dict[str, Any]] = {"llama": {}, "qwen2": {"qkv_bias": True}}
# Keys for boosted checkpoints or the family's own class alone.
DROPPED = (
    "attention_sink_layers",
    "max_window_layers",
    "per_layer_config",
    "use_sliding_window",
)
WINDOW = ("layer_types", "sliding_window")
NOT_COPIED = {CARD, "config.json", "heal.json", "modeling_layerboost.py"}
CONFIGURATION = "configuration_decilm.py"


def check_compat(config: PreTrainedConfig, plan: PlanFile) -> None:
    """Raise ConfigError for what `DeciLMForCausalLM` cannot express; `config`: of the base or a boosted checkpoint."""
    found = None
    sinks = [entry.layer for entry in plan.layers if entry.sink]
    heads = [entry.layer for entry in plan.layers if entry.full_kv_heads]
    if config.model_type not in LLAMA_SHAPED:
        found = f"family {config.model_type}; Llama-shaped are {', '.join(LLAMA_SHAPED)}"
    elif sinks:
        found = f"sinks in layers {', '.join(map(str, sinks))}"
    elif heads:
        found = f"full KV heads in sliding layers {', '.join(map(str, heads))}"
    elif "sliding_attention" in base_layer_types(config):
        found = f"a base with sliding layers, window {config.sliding_window}"
    elif not plan.layers[0].strategy.keeps_weights:
        found = "no attention in layer 0, which vLLM's class needs"
    if found:
        raise ConfigError(
            "this plan cannot be written as DeciLMForCausalLM",
            found=found,
            do="use another format (`layerboost export`), or serve the checkpoint with layerboost installed",
        )


def export_compat(folder: Path, target: Path) -> None:
    """Write a boosted checkpoint as `target`, a `DeciLMForCausalLM` checkpoint with the same tensors.

    Atomic. Raise ConfigError as `check_checkpoint` and `check_compat` do, LayerboostError if the disk is full.
    """
    check_checkpoint(folder)
    config, plan = read_config(folder, str(folder)), read_plan(folder / PLAN)
    check_compat(config, plan)
    with new_folder(target) as new:
        for file in folder.iterdir():
            if file.is_file() and file.name not in NOT_COPIED:
                shutil.copy(file, new)
        assert configuration_decilm.__file__
        shutil.copy(configuration_decilm.__file__, new / CONFIGURATION)
        (new / "config.json").write_text(json.dumps(_decilm(config), indent=2) + "\n")
        (new / CARD).write_text(_card((folder / CARD).read_text()))


def _decilm(config: PreTrainedConfig) -> dict[str, Any]:
    dropped = DROPPED if "sliding_attention" in config.layer_types else DROPPED + WINDOW
    plain = {key: value for key, value in config.to_dict().items() if key not in dropped}
    skipped = set(skipped_layers(config))
    group = config.num_attention_heads // config.num_key_value_heads
    blocks = [
        {
            "attention": {
                "no_op": layer in skipped,
                "n_heads_in_group": None if layer in skipped else group,
                "replace_with_linear": False,
            },
            "ffn": {"no_op": False, "intermediate_size": config.intermediate_size, "replace_with_linear": False},
        }
        for layer in range(config.num_hidden_layers)
    ]
    return {
        **plain,
        **LLAMA_SHAPED[config.model_type],
        "model_type": configuration_decilm.DeciLMConfig.model_type,
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": f"{Path(CONFIGURATION).stem}.DeciLMConfig"},
        "block_configs": blocks,
    }


def _card(boosted: str) -> str:
    """Return the boosted checkpoint's card with another way to load and serve it."""
    head, _, rest = boosted.partition("## Load")
    _, plan, tail = rest.partition("## The plan")
    return head + _SERVE + plan + tail


_SERVE = """## Serve

This checkpoint has the form of vLLM's `DeciLMForCausalLM`, so layerboost is not needed. Transformers has no such class;
it loads the checkpoint from which this one was exported. The remote code is the configuration class next to this card.

```console
vllm serve PATH --trust-remote-code
```

"""
