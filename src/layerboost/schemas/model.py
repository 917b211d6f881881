"""The facts about a model that files record."""

from __future__ import annotations

from pydantic import Field

from layerboost.schemas.artifact import Part


class ModelInfo(Part):
    """Which model a file was made from. `fingerprint` covers its configuration and weights."""

    name: str
    model_type: str
    layers: int
    hidden_size: int
    heads: int = Field(description="of queries")
    kv_heads: int
    head_dim: int
    bytes_per_element: int
    max_context_tokens: int
    vocabulary: int
    tied_head: bool = Field(description="whether the output head is the embedding")
    parameters: int
    attention_parameters: int = Field(description="per layer: those that a layer without attention lacks")
    mlp_width: int | None = Field(None, description="neurons of every layer's MLP; None: its MLPs cannot be thinned")
    mlp_parameters: int = Field(0, description="per layer: those that a layer without an MLP lacks")
    neuron_parameters: int = Field(0, description="of one neuron of an MLP")
    expert_parameters: int = Field(default=0, description="of routed experts, in all layers")
    expert_fraction: float = Field(default=1.0, description="of a layer's routed experts, those that a token uses")
    fingerprint: str
    sliding_layers: list[int] = Field(default=[], description="layers that slide in the base already")
    sliding_window: int | None = Field(default=None, description="their window")
    other_layers: list[int] = Field(default=[], description="layers of a hybrid that have no attention in the base")

    @property
    def attention_layers(self) -> list[int]:
        """Return the layers that have attention in the base."""
        return [layer for layer in range(self.layers) if layer not in self.other_layers]

    @property
    def kv_bytes_per_token(self) -> int:
        """Return the bytes of keys and values per full layer and token."""
        return 2 * self.kv_heads * self.head_dim * self.bytes_per_element

    @property
    def active_parameters(self) -> int:
        """Return the parameters that one token uses."""
        return self.parameters - round(self.idle_parameters(1))

    def idle_parameters(self, tokens: int) -> float:
        """Return the parameters of routed experts that a pass over `tokens` tokens does not read: the expectation if
        each token chooses its experts at random."""
        return self.expert_parameters * (1 - self.expert_fraction) ** tokens

    def removed_from_mlp(self, width: int | None) -> int:
        """Return the parameters that an MLP of `width` neurons lacks; None: that a layer without an MLP lacks."""
        return self.mlp_parameters if width is None else ((self.mlp_width or width) - width) * self.neuron_parameters
