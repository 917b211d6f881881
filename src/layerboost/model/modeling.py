"""The class that loads a boosted checkpoint: Transformers records `per_layer_config`, this builds the model from it.

Travels inside every boosted checkpoint together with families.py, attention.py, caches.py, linear_attention.py and
mlp.py, joined into one file, so that `trust_remote_code=True` loads it where layerboost is not installed.
"""

from __future__ import annotations

import copy
import functools
import inspect
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from layerboost.model.attention import boolean_mask, masked_attention, sliding_attention
from layerboost.model.caches import place_layers, take_heads
from layerboost.model.families import FAMILIES, WRAPPERS, Family
from layerboost.model.linear_attention import make_linear
from layerboost.model.mlp import recorded_widths, set_mlp

# Transformers' types of layers that have attention and no state.
ATTENTION = ("full_attention", "sliding_attention")
SLIDING = "layerboost_sliding"
# The argument of every model and layer that is the cache: Transformers 5.24 renamed it.
CACHE = "cache" if "cache" in inspect.signature(LlamaDecoderLayer.forward).parameters else "past_key_values"
# The name of this file inside a checkpoint.
CODE_FILE = "modeling_layerboost.py"


class AttentionFree(nn.Module):
    """Replaces the attention of a layer without one: adds nothing to the stream, has no weights and no cache."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, None]:
        if (past := kwargs.get(CACHE)) is not None:
            past.layers[self.layer_idx].cumulative_length += hidden_states.shape[1]
        return torch.zeros_like(hidden_states), None


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a causal LM, of the language model in a wrapper, or of a decoder."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    return decoder.layers


def final_norm(model: PreTrainedModel) -> nn.Module:
    """Return the norm after a causal LM's last layer."""
    return getattr(model.get_decoder(), FAMILIES[model.config.get_text_config().model_type].final_norm)


def skipped_layers(config: PreTrainedConfig) -> list[int]:
    """Return the layers without attention, which a config records in `per_layer_config[i].skip`."""
    layers = enumerate(config.per_layer_config if config.is_heterogeneous else ())
    return [index for index, layer in layers if "attention" in layer.skip]


def recorded_full_heads(config: PreTrainedConfig) -> dict[int, list[int]]:
    """Return, for each layer with two kinds of KV heads in a config, its full KV heads; an empty list where all of them
    have the window and `layer_types` cannot say so (Falcon-H1)."""
    return {int(layer): list(heads) for layer, heads in (getattr(config, "full_kv_heads", None) or {}).items()}


def recorded_feature_maps(config: PreTrainedConfig) -> dict[int, str]:
    """Return the feature map of each layer with linear attention in a config."""
    return {int(layer): name for layer, name in (getattr(config, "linear_attention", None) or {}).items()}


def make_attention_free(layer: nn.Module, layer_idx: int, family: Family) -> None:
    """Drop a decoder layer's attention and the norms that serve it alone."""
    setattr(layer, family.attention, AttentionFree(layer_idx))
    if family.norm_before and not getattr(layer, family.parallel_flag, False):
        setattr(layer, family.norm_before, nn.Identity())
    if family.norm_after:
        setattr(layer, family.norm_after, nn.Identity())


def make_sliding(attention: Any, window: int, sink: bool, full_kv_heads: Sequence[int] = ()) -> None:
    """Send the KV heads of an attention module, but for `full_kv_heads`, through `sliding_attention`.

    With `sink`, give it the parameter `sinks`, a logit per query head with a window, zero.
    """
    config = attention.config
    windowed = [head for head in range(config.num_key_value_heads) if head not in full_kv_heads]
    attention.layerboost_heads = list(full_kv_heads), windowed
    attention.layerboost_window, attention.layerboost_stock = window, config._attn_implementation
    # Transformers looks the backend up in the module's own config, so a copy changes this one layer.
    attention.config = copy.copy(config)
    attention.config._attn_implementation = SLIDING
    if sink and getattr(attention, "sinks", None) is None:
        add_sinks(attention, len(full_kv_heads))


def add_sinks(attention: Any, full_kv_heads: int = 0) -> None:
    """Register the parameter `sinks` on an attention module: zero for each query head but those of full KV heads."""
    config: Any = attention.config
    heads = config.num_attention_heads - full_kv_heads * (config.num_attention_heads // config.num_key_value_heads)
    weight = next(attention.parameters())
    attention.sinks = nn.Parameter(torch.zeros(heads, dtype=weight.dtype, device=weight.device))


def base_layer_types(config: PreTrainedConfig) -> list[str]:
    """Return `full_attention` for each layer of a config, or `sliding_attention` if it slides in the base already; in a
    hybrid, Transformers' own types of the others.

    Mistral and Phi-3 know no `layer_types`: with a `sliding_window`, all layers slide. A window no shorter than the
    context drops nothing: such layers are full, unless their type says more of them.
    """
    full = ["full_attention"] * config.num_hidden_layers
    if hasattr(config, "attention_sink_layers"):  # boosted
        return list(getattr(config, "base_layer_types", full))
    window = getattr(config, "sliding_window", None) if hasattr(type(config), "sliding_window") else None
    family = FAMILIES.get(config.model_type)
    if window is not None and window >= config.max_position_embeddings and not (family and family.rotary_by_type):
        return full
    if hasattr(type(config), "layer_types"):
        return list(config.layer_types)
    return full if window is None else ["sliding_attention"] * config.num_hidden_layers


def attention_layers(config: PreTrainedConfig) -> list[int]:
    """Return the layers of a config that have attention in the base."""
    return [layer for layer, kind in enumerate(base_layer_types(config)) if kind in ATTENTION]


def base_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config to build the base of a boosted config from.

    Families tie more than the window to `layer_types`, Gemma 3 and OLMo 3 the rotary embedding, Cohere 2 whether there
    is one: a layer that slides only by the plan must be built as the full layer it was.
    """
    base = copy.copy(config)
    if config.model_type in WRAPPERS:
        base.text_config = base_config(config.get_text_config())
        return base
    base.per_layer_config = None
    types, family = base_layer_types(config), FAMILIES[config.model_type]
    if not family.computed_types:
        base.layer_types = types
    if "sliding_attention" not in types:
        # Without layer types of its own, a family's window is every layer's; with them, a mask is built for it even
        # where no layer slides, and one that drops nothing is free.
        needed = hasattr(type(config), "layer_types") and not family.rotary_by_window
        base.sliding_window = config.max_position_embeddings if needed else None
    return base


def apply_config(model: PreTrainedModel) -> None:
    """Give every layer of a stock model, built as the base, the strategy that `model.config` records."""
    config = model.config.get_text_config()
    family = FAMILIES[config.model_type]
    types = base_layer_types(config)
    skipped, mixed, linear = set(skipped_layers(config)), recorded_full_heads(config), recorded_feature_maps(config)
    for index, width in recorded_widths(config).items():
        set_mlp(decoder_layers(model)[index], width)
    stock = 0
    for index, layer in enumerate(decoder_layers(model)):
        if index in skipped:
            make_attention_free(layer, index, family)
        elif index in linear:
            make_linear(getattr(layer, family.attention), config.sliding_window, linear[index])
        elif index in mixed or config.layer_types[index] == "sliding_attention" != types[index]:
            sink = index in config.attention_sink_layers
            make_sliding(getattr(layer, family.attention), config.sliding_window, sink, mixed.get(index, ()))
        else:
            stock += 1
    if stock < config.num_hidden_layers:
        # A state next to a layer's attention needs the plain mask of padding.
        prepare = functools.partial(_prepare_forward, config, skipped, not stock and not mixed and not family.mixer)
        model.get_decoder().register_forward_pre_hook(prepare, with_kwargs=True)


def _prepare_forward(
    config: PreTrainedConfig,
    skipped: set[int],
    no_stock_attention: bool,
    decoder: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give a decoder's forward pass the cache of the boosted config, with our layers where it slides or only counts.

    The decoder's own config is the base's.
    """
    if args:
        kwargs = inspect.signature(decoder.forward).bind_partial(*args).arguments | kwargs
        args = ()
    if kwargs.get("output_attentions", decoder.config.output_attentions):
        raise ValueError("a boosted model returns no attention weights: layers with a window never hold them")
    mask = kwargs.get("attention_mask")
    if no_stock_attention and isinstance(mask, torch.Tensor) and mask.dim() == 2:
        # Sliding layers need to know of padding alone. Transformers takes four dimensions for a finished mask and
        # does not make its own `[B, 1, T, T]`.
        kwargs["attention_mask"] = mask[:, None, None, :].bool()
    if mask is None and "flash" in str(decoder.config._attn_implementation) and _is_packed(kwargs):
        raise ValueError(
            "layers with a window tell documents of packed text apart by a mask, which Transformers does not make for "
            "FlashAttention: load the model with attn_implementation='sdpa', or train without packing"
        )
    if kwargs.get("use_cache") is None:
        kwargs["use_cache"] = config.use_cache
    if (past := kwargs.get(CACHE)) is None:
        past = kwargs.pop("past_key_values", None)  # a caller's own, under the older name
    if past is None:
        if not kwargs["use_cache"] or (decoder.training and decoder.gradient_checkpointing):
            return args, kwargs
        past = DynamicCache(config=config)
    if not isinstance(past, DynamicCache):
        raise ValueError(
            f"a boosted model works with DynamicCache, not {type(past).__name__}; leave cache_implementation unset"
        )
    place_layers(past, config, skipped, recorded_full_heads(config), recorded_feature_maps(config))
    return args, kwargs | {CACHE: past}


def _is_packed(kwargs: dict[str, Any]) -> bool:
    """Return whether the arguments of a decoder say that documents follow each other in one row."""
    positions = kwargs.get("position_ids")
    if "cu_seq_lens_q" in kwargs or not isinstance(positions, torch.Tensor):
        return "cu_seq_lens_q" in kwargs
    return positions.dim() == 2 and len(positions) == 1 and bool((positions.diff() != 1).any())


def sliding_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention `[B, T, H, D]` of a layer in which some or all KV heads have a window.

    This is a function of Transformers' attention interface. The window is applied here, so the mask only needs to be
    causal and to exclude padding. There is no attention dropout under a window.
    """
    if module.layerboost_heads[0]:
        return _mixed_attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, softcap=softcap, **kwargs
        )
    out = _window_attention(module, query, key, value, attention_mask, scaling, softcap)
    return out.transpose(1, 2).contiguous(), None


def _mixed_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    value: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention `[B, T, H, D]` of a layer with two kinds of KV heads, in the order of the heads.

    The stock backend computes the full heads and `sliding_attention` the others, once each. Keys and values are
    tensors, or pairs from a `MixedCacheLayer`.
    """
    heads = module.layerboost_heads
    full, windowed = (query_heads(kind, query.shape[1] // sum(map(len, heads))) for kind in heads)
    keys = key if isinstance(key, tuple) else [take_heads(key, kind) for kind in heads]
    values = value if isinstance(value, tuple) else [take_heads(value, kind) for kind in heads]
    stock = stock_attention(module, module.layerboost_stock)
    far = stock(module, take_heads(query, full), keys[0], values[0], mask, **kwargs)[0]
    near = _window_attention(
        module, take_heads(query, windowed), keys[1], values[1], mask, kwargs.get("scaling"), kwargs.get("softcap")
    )
    out = torch.cat([far, near.transpose(1, 2)], dim=2)
    order = [*full, *windowed]
    return out if order == sorted(order) else out[:, :, sorted(range(len(order)), key=order.__getitem__)], None


def _window_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Return the attention `[B, H, T, D]` of the heads of a layer that have a window."""
    window, sinks, mask = module.layerboost_window, getattr(module, "sinks", None), boolean_mask(mask, key.shape[2])
    if FAMILIES[module.config.model_type].images_both_ways and mask is not None and mask.shape[2] > 1:
        # A mask that looks ahead does so within an image. As in the base's own sliding layers, the window ends what is
        # seen of the past alone.
        queries, keys = mask.shape[2], key.shape[2]
        if mask[..., -queries:].triu(1).any():
            visible = mask & torch.ones_like(mask[0, 0]).triu(keys - queries - window + 1)
            return masked_attention(query, key, value, visible, sinks, scaling, softcap)
    return sliding_attention(query, key, value, window, sinks, mask, scaling, softcap)


def query_heads(kv_heads: Sequence[int], groups: int) -> list[int]:
    """Return the query heads that read some KV heads, `groups` of each."""
    return [query for head in kv_heads for query in range(head * groups, (head + 1) * groups)]


def stock_attention(module: Any, implementation: str) -> Any:
    """Return the attention function that a stock module calls for an implementation."""
    # Each family has an eager attention of its own, in the file of its attention class.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


ALL_ATTENTION_FUNCTIONS.register(SLIDING, sliding_attention_forward)


def architecture_of(model_type: str) -> str:
    """Return the name of the class of boosted models of this type."""
    return WRAPPERS[model_type].architecture if model_type in WRAPPERS else "LayerBoostForCausalLM"


def is_boosted(architectures: Sequence[str] | None) -> bool:
    """Return whether a config's `architectures` name a class of boosted models."""
    return any(name.startswith("LayerBoost") for name in architectures or ())


@functools.cache
def boosted_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a subclass of a stock class that builds the base and gives every layer the strategy of its config."""
    if is_boosted([stock.__name__]):
        return stock

    def init(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        text = config.get_text_config()
        implementation = FAMILIES[text.model_type].attn_implementation
        if implementation and config._attn_implementation in (None, "sdpa"):
            config._attn_implementation = implementation
        base = base_config(config)
        stock.__init__(self, base, *args, **kwargs)
        config._attn_implementation_internal = base._attn_implementation
        text._attn_implementation_internal = base.get_text_config()._attn_implementation
        self.config = config
        apply_config(self)

    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        _copy_code(self.name_or_path, Path(save_directory))
        stock.save_pretrained(self, save_directory, *args, **kwargs)

    # Of custom code, which may initialise in place, loading leaves out what a parent fills in its children (Falcon-H1's
    # buffers). Here the stock class does it.
    own = {"__init__": init, "save_pretrained": save_pretrained, "is_custom_code": classmethod(lambda _: False)}
    # The name is what save_pretrained writes into `architectures`, and what vLLM's registry knows.
    return type(architecture_of(stock.config_class.model_type), (stock,), {**own, "__module__": __name__})


def _copy_code(loaded_from: str, folder: Path) -> None:
    """Copy this file into a checkpoint, from its place as remote code or from the checkpoint that a model was loaded
    from: Transformers copies the code of classes that it finds in a file by their names alone."""
    files = [
        file for file in (Path(__file__), Path(loaded_from, CODE_FILE)) if file.name == CODE_FILE and file.is_file()
    ]
    target = folder / CODE_FILE
    if files and not (target.exists() and target.samefile(files[0])):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(files[0], target)


def stock_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return Transformers' own class of a family or a wrapper; raise ValueError if it is not supported."""
    known = {**FAMILIES, **WRAPPERS}
    if config.model_type not in known:
        raise ValueError(f"no boosted model of family {config.model_type!r}; known: {', '.join(known)}")
    wraps = config.model_type in WRAPPERS
    names = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if wraps else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return getattr(transformers, names[config.model_type])


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the auto class that loads a model of a config."""
    return AutoModelForImageTextToText if config.model_type in WRAPPERS else AutoModelForCausalLM


class LayerBoostForCausalLM:
    """Loads a boosted checkpoint of any family: picks the stock class by the config and boosts it."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, *args: Any, config: PreTrainedConfig | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        """Load a checkpoint as `PreTrainedModel.from_pretrained` does."""
        if config is None:
            config = AutoConfig.from_pretrained(pretrained_model_name_or_path)
        kwargs.pop("trust_remote_code", None)
        return _class_for(config).from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
        kwargs.pop("trust_remote_code", None)
        return _class_for(config)._from_config(config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModelForCausalLM") -> None:
        """Do nothing: Transformers calls this on remote code."""


def _class_for(config: PreTrainedConfig) -> type[PreTrainedModel]:
    stock: Any = stock_class(config)
    return boosted_class(stock) if is_boosted(config.architectures) else stock


def register_auto_classes() -> None:
    """Let the auto classes load boosted checkpoints; stock checkpoints still get their stock class."""
    # Transformers prefers a registered class over a checkpoint's own remote code unless the class is one of its own.
    # Other people's remote code on a stock config must keep working, so this one says it is.
    registered = type("LayerBoostForCausalLM", (LayerBoostForCausalLM,), {"__module__": "transformers.models.auto"})
    for auto, names in (
        (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (AutoModelForImageTextToText, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
    ):
        for model_type in names.keys() & {*FAMILIES, *WRAPPERS}:
            if names[model_type] != MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type, names[model_type]):
                continue  # Qwen3.5's language model taken out of its wrapper
            auto.register(transformers.CONFIG_MAPPING[model_type], registered, exist_ok=True)


# Not where this file travels inside a checkpoint: remote code loads one model and changes nothing else.
if __name__ == "layerboost.model.modeling":
    register_auto_classes()
