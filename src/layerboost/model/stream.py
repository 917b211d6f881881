"""A stock model's decoder run one layer at a time, so that variants of a layer can share the layers below it."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from layerboost.model.modeling import decoder_layers


class LayerStream:
    """Layers, final norm and head of one model, callable apart.

    The arguments Transformers passes to each layer (masks, rotary embeddings) are recorded once per batch shape, so no
    family's forward is written again here.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.layers = decoder_layers(model)
        self._arguments: dict[torch.Size, list[dict[str, Any]]] = {}

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the whole decoder on ids `[B, T]`; returns the input of layer 0 and the normed output, `[B, T, D]`."""
        arguments: list[dict[str, Any]] = [{} for _ in self.layers]
        first: list[torch.Tensor] = []

        def record(index: int) -> Any:
            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if index == 0:
                    first.append(args[0] if args else kwargs["hidden_states"])
                arguments[index] = {name: value for name, value in kwargs.items() if name != "hidden_states"}

            return hook

        hooks = [
            layer.register_forward_pre_hook(record(index), with_kwargs=True) for index, layer in enumerate(self.layers)
        ]
        try:
            output = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        self._arguments[ids.shape] = arguments
        return first[0], output

    def layer(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """One decoder layer on its input `[B, T, D]`, for a batch shape that `forward` has seen."""
        out = self.layers[index](hidden, **self._arguments[hidden.shape[:2]][index])
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def finish(self, start: int, hidden: torch.Tensor) -> torch.Tensor:
        """Layers `start` and up and the final norm: `[B, T, D]`."""
        for index in range(start, len(self.layers)):
            hidden = self.layer(index, hidden)
        normed: torch.Tensor = self.model.get_decoder().norm(hidden)
        return normed


def head_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits `[..., V]` of normed hidden states `[..., D]`, with the family's scaling and soft-cap."""
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    config = model.config
    if scaling := getattr(config, "logits_scaling", None):  # Granite divides
        logits = logits / scaling
    if scale := getattr(config, "logit_scale", None):  # Cohere 2 multiplies
        logits = logits * scale
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        logits = cap * torch.tanh(logits / cap)
    return logits
