"""Boosted Llama on vLLM's own Llama classes, so that base and boosted are served by the same code.

Written against vLLM 0.32, whose Llama attention already reads its window from `layer_types`; what it lacks are sinks
and layers without attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM, LlamaMLP
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs

from layerboost.model.modeling import skipped_layers


class BoostedLlama(LlamaForCausalLM):
    """A Llama whose layers have full, sliding (with or without sinks) or no attention, as its config says."""

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: Any = None) -> Any:
        skipped = set(skipped_layers(vllm_config.model_config.hf_config))

        def boosted_layer(vllm_config: VllmConfig, prefix: str) -> Any:
            if extract_layer_index(prefix) in skipped:
                return AttentionFreeLayer(vllm_config, prefix)
            return LlamaDecoderLayer(vllm_config, prefix, attn_layer_type=SinkAttention)

        model = super()._init_model(vllm_config, prefix, boosted_layer)
        stage = range(model.start_layer, model.end_layer)
        check_attending([index for index in stage if index not in skipped], model.start_layer, model.end_layer)
        return model


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
    """vLLM's Llama attention; in a layer with a sink, with a logit per head, sharded with the heads."""

    def __init__(
        self, config: Any, *args: Any, prefix: str, cache_config: Any, quant_config: Any, **kwargs: Any
    ) -> None:
        super().__init__(config, *args, prefix=prefix, cache_config=cache_config, quant_config=quant_config, **kwargs)
        if extract_layer_index(prefix) not in getattr(config, "attention_sink_layers", []):
            return
        self.sinks = nn.Parameter(torch.empty(self.num_heads), requires_grad=False)
        set_weight_attrs(self.sinks, {"weight_loader": sharded_weight_loader(0)})
        # An Attention takes its sinks when it is made, under a name that may be taken once: make it again.
        name = f"{prefix}.attn"
        del get_current_vllm_config().compilation_config.static_forward_context[name]
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.scaling,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=config.sliding_window,
            prefix=name,
            sinks=self.sinks,
        )


class AttentionFreeLayer(nn.Module):
    """A decoder layer that is its MLP and nothing else."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.mlp = LlamaMLP(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            quant_config=vllm_config.quant_config,
            bias=config.mlp_bias,
            prefix=f"{prefix}.mlp",
        )
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """vLLM's layers hand on the stream in two parts, `[T, D]`: what was added last, and the rest."""
        if residual is None:
            residual = hidden_states
            hidden_states = self.post_attention_layernorm(hidden_states)
        else:
            hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual
