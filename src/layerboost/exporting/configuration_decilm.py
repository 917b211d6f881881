"""Configuration of a full/none checkpoint in the form of vLLM's DeciLMForCausalLM; made by layerboost.

Travels in the checkpoint: Transformers has no such class, and vLLM reads `block_configs[i].attention.no_op` by
attribute.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


class Block(dict[str, Any]):
    """A JSON object whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(name) from None
        return Block(value) if isinstance(value, dict) else value


class DeciLMConfig(LlamaConfig):
    """Llama's, with one block a layer."""

    model_type = "nemotron-nas"
    block_configs: list | None = None  # type: ignore[type-arg]

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.block_configs = [Block(block) for block in self.block_configs or []]
