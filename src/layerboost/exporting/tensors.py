"""The tensors of a boosted checkpoint as formats without absent attention want them: nothing missing, nothing fused."""

from __future__ import annotations

import torch
from transformers import PreTrainedConfig

from layerboost.model.files import Tensors
from layerboost.model.modeling import base_config, skipped_layers, stock_class

# The window of layers without attention if no layer slides: vLLM's smallest block.
LEAST_WINDOW = 16


def whole_tensors(config: PreTrainedConfig, tensors: Tensors) -> Tensors:
    """Return the tensors, split, with attention in every layer.

    A layer from which it was removed gets projections of zeros and norms of ones, which add nothing to the stream.
    """
    some = next(iter(tensors.values()))
    with torch.device("meta"):
        stock = stock_class(config)(base_config(config)).state_dict()
    found = dict(tensors)
    for name, tensor in stock.items():
        absent = name not in found and ".mlp." not in name  # experts have other names in files
        if absent and not (name == "lm_head.weight" and config.tie_word_embeddings):
            found[name] = some.new_full(tensor.shape, 0 if "proj." in name else 1)
    return split_tensors(config, found)


def split_tensors(config: PreTrainedConfig, tensors: Tensors) -> Tensors:
    """Return the tensors with Phi-3's fused projections as Llama's."""
    found = dict(tensors)
    size = head_dim(config)
    heads = [config.num_attention_heads * size] + [config.num_key_value_heads * size] * 2
    for name in [name for name in found if ".qkv_proj." in name]:
        parts = found.pop(name).split(heads)
        found |= {name.replace("qkv", part): value.clone() for part, value in zip("qkv", parts, strict=True)}
    for name in [name for name in found if ".gate_up_proj." in name]:
        parts = found.pop(name).chunk(2)
        found |= {
            name.replace("gate_up", part): value.clone() for part, value in zip(("gate", "up"), parts, strict=True)
        }
    return found


def slides_where_possible(config: PreTrainedConfig) -> list[bool]:
    """Return, for each layer, whether it slides or has no attention."""
    skipped = skipped_layers(config)
    return [kind == "sliding_attention" or layer in skipped for layer, kind in enumerate(config.layer_types)]


def window_of(config: PreTrainedConfig) -> int:
    """Return the window of all layers that slide."""
    return int(config.sliding_window) if "sliding_attention" in config.layer_types else LEAST_WINDOW


def full_every(config: PreTrainedConfig) -> int | None:
    """Return n if every n-th layer is full and all others slide, 0 if all slide; None if there is no such n.

    A layer without attention counts as either. The largest n is returned, so that most of them slide.
    """
    skipped, layers = set(skipped_layers(config)), int(config.num_hidden_layers)
    kinds = enumerate(config.layer_types)
    slides = {layer: kind == "sliding_attention" for layer, kind in kinds if layer not in skipped}
    periods: list[int] = [0, *range(layers, 0, -1)]
    return next((n for n in periods if all(slides_by(n, layer) == slides[layer] for layer in slides)), None)


def slides_by(n: int, layer: int) -> bool:
    """Return whether a layer slides where every n-th one is full."""
    return n == 0 or layer % n < n - 1


def head_dim(config: PreTrainedConfig) -> int:
    """Return the size of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
