"""The vLLM class of boosted vision-language models, on vLLM 0.32's Transformers backend.

The tower, its processor and the places of image tokens are vLLM's own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalMixin,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from layerboost.vllm_plugin.model import LayerBoostForCausalLM


@MULTIMODAL_REGISTRY.register_processor(
    MultiModalProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class LayerBoostForConditionalGeneration(MultiModalMixin, LayerBoostForCausalLM):
    """Any wrapper whose language model takes an image as embeddings and nothing more."""

    hf_to_vllm_mapper: Any

    def _create_hf_to_vllm_mapper(self) -> None:
        super()._create_hf_to_vllm_mapper()
        # Boosted checkpoints have Transformers' own names of tensors: renaming is for those of stock ones.
        model: Any = self  # vLLM sets the mapper without a type
        model.hf_to_vllm_mapper = dataclasses.replace(model.hf_to_vllm_mapper, orig_to_new_renaming=[])
