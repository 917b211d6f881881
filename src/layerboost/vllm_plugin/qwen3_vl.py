"""Boosted Qwen3-VL on vLLM's own class, which knows deepstack. Written against vLLM 0.32; imports torchvision."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.model_executor.models.utils import maybe_prefix

from layerboost.vllm_plugin.native import boost_qwen3, prepare_qwen3


class LayerBoostQwen3VLForConditionalGeneration(Qwen3VLForConditionalGeneration):
    """A Qwen3-VL whose layers have full, sliding or no attention, or both kinds of KV heads, as its config says."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        config = vllm_config.model_config.hf_config.text_config
        prepare_qwen3(config, vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        boost_qwen3(self.language_model.model, config, vllm_config, maybe_prefix(prefix, "language_model.model"))
