"""Boosted Llama and Qwen3 on vLLM's own classes, so that base and boosted are served by the same code.

Written against vLLM 0.32. What its classes lack are sinks, windows of single KV heads, layers without attention and
MLPs of other widths, and Qwen3's the window of each layer, which Llama's reads from `layer_types`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import extract_layer_index, maybe_prefix
from vllm.model_executor.utils import set_weight_attrs

from layerboost.model.mlp import NoMLP, recorded_widths
from layerboost.model.modeling import recorded_full_heads, skipped_layers
from layerboost.vllm_plugin.heads import head_windows, make_attention


class BoostedLlama(LlamaForCausalLM):
    """A Llama whose layers have full, sliding or no attention, or both kinds of KV heads, as its config says."""

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None) -> Any:
        config = vllm_config.model_config.hf_config
        skipped, widths = set(skipped_layers(config)), recorded_widths(config)

        def boosted_layer(vllm_config: VllmConfig, prefix: str) -> Any:
            index = extract_layer_index(prefix)
            own = config.per_layer_config[index]  # with the layer's width
            if index in skipped:
                layer: Any = AttentionFreeLayer(own, vllm_config.quant_config, prefix)
            else:
                layer = LlamaDecoderLayer(vllm_config, prefix, own, attn_layer_type=SinkAttention)
            if widths.get(index) == 0:
                layer.mlp = NoMLP()
            return layer

        model = super()._init_model(vllm_config, prefix, boosted_layer)
        check_stage(model, skipped)
        return model


class BoostedQwen3(Qwen3ForCausalLM, SupportsQuant):
    """A Qwen3 whose layers have full, sliding or no attention, or both kinds of KV heads, as its config says."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        prepare_qwen3(config, vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        boost_qwen3(self.model, config, vllm_config, maybe_prefix(prefix, "model"))


def prepare_qwen3(config: Any, vllm_config: VllmConfig) -> None:
    """Have a config build vLLM's Qwen3, all of whose layers are of one form at first."""
    config.max_window_layers = config.num_hidden_layers  # with any other number vLLM refuses kinds of layers
    # It builds all MLPs of one width.
    config.allow_global_per_layer_attribute_access = True
    if skipped_layers(config) and vllm_config.offload_config.prefetch.offload_group_size:
        raise ValueError("layers without attention and --offload-group-size do not go together: leave it out")


def boost_qwen3(model: Any, config: Any, vllm_config: VllmConfig, prefix: str) -> None:
    """Change the layers of vLLM's Qwen3 to what the config says: unlike Llama's, the class takes no layers."""
    skipped, widths, quant_config = set(skipped_layers(config)), recorded_widths(config), vllm_config.quant_config
    for index in range(model.start_layer, model.end_layer):
        name = f"{prefix}.layers.{index}"
        own = config.per_layer_config[index]
        if index in skipped:
            forget_attention(f"{name}.self_attn.attn")
            model.layers[index] = AttentionFreeLayer(own, quant_config, name)
        elif needs_own_attention(config, index):
            attention = model.layers[index].self_attn
            set_attention(attention, config, vllm_config.cache_config, quant_config, f"{name}.self_attn")
        if index in widths:
            model.layers[index].mlp = llama_mlp(own, quant_config, name) if widths[index] else NoMLP()
    check_stage(model, skipped)


def check_stage(model: Any, skipped: set[int]) -> None:
    """Apply `check_attending` to the layers of this pipeline stage."""
    stage = range(model.start_layer, model.end_layer)
    check_attending([index for index in stage if index not in skipped], model.start_layer, model.end_layer)


def check_attending(attending: list[int], start: int, end: int) -> None:
    """Raise ValueError where layers `start` to `end` of a pipeline stage all lack attention.

    vLLM sizes each stage's cache by its attention layers and would divide by zero.
    """
    if not attending:
        raise ValueError(
            "vLLM cannot serve a model or a pipeline stage without any attention: "
            f"keep one of layers {start} to {end - 1} full or sliding"
        )


class SinkAttention(LlamaAttention):
    """vLLM's Llama attention, with sinks and windows of single KV heads where the config says so."""

    def __init__(
        self, config: Any, *args: Any, prefix: str, cache_config: Any, quant_config: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, prefix=prefix, cache_config=cache_config, quant_config=quant_config, **kwargs)
        if needs_own_attention(config, extract_layer_index(prefix)):
            set_attention(self, config, cache_config, quant_config, prefix)


def has_sink(config: Any, layer: int) -> bool:
    """Return whether a layer has a sink."""
    return layer in getattr(config, "attention_sink_layers", [])


def set_attention(attention: Any, config: Any, cache_config: Any, quant_config: Any, prefix: str) -> None:
    """Give an attention of vLLM its layer's window and its sinks: a logit per head, sharded with the heads.

    vLLM's `Attention` takes both when it is made, so it is made again.
    """
    layer, groups = extract_layer_index(prefix), attention.num_heads // attention.num_kv_heads
    if has_sink(config, layer):
        windowed = sum(window is not None for window in head_windows(config, layer)[: attention.num_kv_heads])
        attention.sinks = nn.Parameter(torch.empty(windowed * groups), requires_grad=False)
        set_weight_attrs(attention.sinks, {"weight_loader": sharded_weight_loader(0)})
    forget_attention(f"{prefix}.attn")
    make = partial(
        Attention,
        head_size=attention.head_dim,
        scale=attention.scaling,
        cache_config=cache_config,
        quant_config=quant_config,
    )
    sinks, heads = getattr(attention, "sinks", None), (attention.num_heads, attention.num_kv_heads)
    attention.attn = make_attention(config, layer, *heads, sinks, f"{prefix}.attn", make)


def needs_own_attention(config: Any, layer: int) -> bool:
    """Return whether a layer needs other modules than vLLM's class gives a full one."""
    return (
        config.layer_types[layer] == "sliding_attention" or has_sink(config, layer) or bool(recorded_full_heads(config))
    )


def forget_attention(name: str) -> None:
    """Free the name of an `Attention`, which may be taken once, and with it its part of the KV cache."""
    del get_current_vllm_config().compilation_config.static_forward_context[name]


def llama_mlp(config: Any, quant_config: Any, prefix: str) -> LlamaMLP:
    """Return the MLP of a layer; `config`: the layer's own."""
    return LlamaMLP(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        hidden_act=config.hidden_act,
        quant_config=quant_config,
        bias=getattr(config, "mlp_bias", False),
        prefix=f"{prefix}.mlp",
    )


class AttentionFreeLayer(nn.Module):
    """A decoder layer that is its MLP and nothing else."""

    def __init__(self, config: Any, quant_config: Any, prefix: str) -> None:
        super().__init__()
        self.mlp = llama_mlp(config, quant_config, prefix)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the stream in two parts, `[T, D]`, as vLLM's layers do: what was added last, and the rest."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.post_attention_layernorm(hidden_states)
        else:
            hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual
