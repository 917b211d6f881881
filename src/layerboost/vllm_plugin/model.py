"""The vLLM model class of boosted checkpoints, on vLLM's Transformers backend: every family without a native class.

Written against vLLM 0.32's backend, whose steps it extends: build the stock decoder, replace its modules by vLLM's,
give each layer an `Attention`, which is what allocates KV cache.
"""

from __future__ import annotations

import ast
import dataclasses
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR
from vllm.model_executor.models.transformers.moe import MoEMixin
from vllm.model_executor.models.utils import maybe_prefix

from layerboost.model.families import FAMILIES
from layerboost.model.mlp import recorded_widths, set_mlp
from layerboost.model.modeling import (
    add_sinks,
    base_config,
    decoder_layers,
    make_attention_free,
    recorded_full_heads,
    skipped_layers,
)
from layerboost.vllm_plugin.heads import make_attention
from layerboost.vllm_plugin.native import BoostedLlama, BoostedQwen3, check_attending

# What vLLM's AttentionFuser reads, in the source of gpt-oss, as the place of the sinks.
SINKS = ast.parse("self.sinks", mode="eval").body

NATIVE = {"llama": BoostedLlama, "qwen3": BoostedQwen3}


class LayerBoostForCausalLM(TransformersForCausalLM):
    """A decoder whose layers have full, sliding or no attention, or both kinds of KV heads, as its config says.

    An attention-free layer has no attention weights, no `Attention` and no KV cache.
    """

    def __new__(cls, *, vllm_config: VllmConfig, prefix: str = "") -> Any:
        """Make the native class if there is one: vLLM knows one class per architecture."""
        int8_through_onednn()
        native = NATIVE.get(vllm_config.model_config.hf_config.model_type)
        if native is not None:
            return native(vllm_config=vllm_config, prefix=prefix)
        return super().__new__(BoostedMoE if vllm_config.model_config.get_num_experts() else cls)

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        scaling = getattr(self.text_config, "logits_scaling", None)
        if scaling and self.pp_group.is_last_rank:  # vLLM's backend knows `logit_scale` alone
            multiplies = FAMILIES[self.text_config.model_type].multiplies_logits
            self.logits_processor.scale = scaling if multiplies else 1 / scaling

    @cached_property
    def _from_config_kwargs(self) -> dict[str, Any]:
        # The decoder is built as the base; windows are given with each layer's `Attention`.
        return {**super()._from_config_kwargs, "config": base_config(self.config)}

    def _create_hf_to_vllm_mapper(self) -> None:
        # The first step after the stock decoder is built, on the meta device and before weights are named.
        config = self.text_config
        family = FAMILIES.get(config.model_type)
        if family is None:
            raise ValueError(f"layerboost has no family {config.model_type!r}; known: {', '.join(FAMILIES)}")
        self._attention_free = set(skipped_layers(config))
        sink_layers, mixed = set(getattr(config, "attention_sink_layers", [])), recorded_full_heads(config)
        for index, width in recorded_widths(config).items():
            set_mlp(decoder_layers(self.model)[index], width)
        for index, layer in enumerate(decoder_layers(self.model)):
            if index in self._attention_free:
                make_attention_free(layer, index, family)
            elif index in sink_layers:
                add_sinks(getattr(layer, family.attention), len(mixed.get(index, ())))
        super()._create_hf_to_vllm_mapper()

    def recursive_replace(self) -> None:
        """Do what vLLM's does, then make the sinks of every layer a parameter that is loaded by shards of heads."""
        super().recursive_replace()
        for index, (name, fuser) in list(self.attention_fusers.items()):
            module = self.get_submodule(name)
            if getattr(module, "sinks", None) is not None:
                with_sinks = dataclasses.replace(fuser, s_aux_expr=SINKS)
                with_sinks.fuse(module, name, self.vllm_config)
                self.attention_fusers[index] = (name, with_sinks)

    def _create_attention_instances(self, prefix: str = "") -> None:
        """Create the attention of this pipeline stage's layers; vLLM's own raises for a layer without attention."""
        config = self.text_config
        start, end = get_pp_indices(config.num_hidden_layers, self.pp_group.rank_in_group, self.pp_group.world_size)
        attending = sorted(set(range(start, end)) - self._attention_free)
        check_attending(attending, start, end)
        for index in attending:
            if index not in self.attention_fusers:
                raise ValueError(f"layer {index} does not go through Transformers' attention interface")
            name, fuser = self.attention_fusers[index]
            module = self.get_submodule(name)
            heads = self.model_config.model_arch_config[index]
            scale = fuser.scale(module)
            make = partial(
                Attention,
                head_size=heads.head_size,
                scale=heads.head_size**-0.5 if scale is None else scale,
                cache_config=self.cache_config,
                quant_config=self.quant_config,
                logits_soft_cap=getattr(config, "attn_logit_softcapping", None),
            )
            own = (
                self.model_config.get_num_attention_heads(self.parallel_config, heads),
                self.model_config.get_num_kv_heads(self.parallel_config, heads),
            )
            place = maybe_prefix(prefix, f"{name}.{VLLM_ATTN_ATTR}")
            attention = make_attention(config, index, *own, fuser.sinks(module), place, make)
            setattr(module, VLLM_ATTN_ATTR, attention)


class BoostedMoE(MoEMixin, LayerBoostForCausalLM):
    """The same with experts, which vLLM's fused kernel computes."""

    def recursive_replace(self) -> None:
        """Do what vLLM's does, but leave the choice of experts to Transformers where vLLM 0.32 would get it wrong.

        MiniMax-M2 and Hunyuan 3 have the correction of their router's scores outside the router, where vLLM loses it.
        Phi-3.5-MoE's router is a linear layer that also chooses, and vLLM replaces linear layers.
        """
        routers = []
        for module in self.model.modules():
            if not hasattr(module, "experts"):
                continue
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if own and hasattr(module, "gate"):
                # vLLM does not take over a router with a tensor that it does not know.
                module.gate.register_buffer("scores_are_corrected", torch.empty(0), persistent=False)
            routers += [
                (module, name, child)
                for name, child in module.named_children()
                if isinstance(child, nn.Linear) and type(child) is not nn.Linear
            ]
        super().recursive_replace()
        for module, name, router in routers:
            setattr(module, name, router)


@cache
def int8_through_onednn() -> None:
    """Have this process's int8 layers take vLLM's oneDNN kernel, as they do on CPUs without AMX. Of no effect on GPUs.

    With AMX vLLM takes `int8_scaled_mm_with_quant`, which refuses float32 activations ("expect A to be bfloat16 or
    half") and the three dimensions of its own Transformers backend ("mat1 must be a 2D tensor").
    """
    try:
        from vllm.model_executor.kernels.linear.scaled_mm import cpu

        stock = cpu.check_cpu_sgl_kernel
    except (ImportError, AttributeError):  # another version, without that choice
        return
    cpu.check_cpu_sgl_kernel = lambda n, k, dtype: dtype != torch.int8 and stock(n, k, dtype)
