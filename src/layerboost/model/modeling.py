"""The class that loads a boosted checkpoint: Transformers records `per_layer_config`, this builds the model from it.

Travels inside every boosted checkpoint together with families.py, attention.py and mlp.py, joined into one file, so
that `trust_remote_code=True` loads it where layerboost is not installed.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from layerboost.model.attention import sliding_attention
from layerboost.model.families import FAMILIES, Family
from layerboost.model.mlp import recorded_widths, set_mlp

SLIDING = "layerboost_sliding"


class AttentionFree(nn.Module):
    """Replaces the attention of a layer without one: adds nothing to the stream, has no weights and no cache."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: torch.Tensor, past_key_values: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
        if past_key_values is not None:
            past_key_values.layers[self.layer_idx].cumulative_length += hidden_states.shape[1]
        return torch.zeros_like(hidden_states), None


class AttentionFreeCacheLayer(DynamicLayer):
    """The cache of a layer without attention: counts tokens, because Transformers asks layer 0 for the length."""

    # Neither True nor False: the masks of full and of sliding layers take their sizes from the first layer of their
    # kind, which this is not.
    is_sliding = None

    def __init__(self, cumulative_length: int = 0) -> None:
        super().__init__()
        self.cumulative_length = cumulative_length

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def reset(self) -> None:
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            self.cumulative_length = min(self.cumulative_length, tokens_to_remove)
        else:
            self.cumulative_length += tokens_to_remove

    def reorder_cache(self, beam_idx: torch.Tensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: torch.Tensor) -> None: ...


class SlidingCacheLayer(DynamicSlidingWindowLayer):
    """The cache of a sliding layer. Transformers' keeps a view, and with it a whole prompt, until the next token."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values to the cache; return those that the new queries may see."""
        seen = super().update(key_states, value_states, *args, **kwargs)
        if key_states.shape[-2] > 1:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        found: tuple[torch.Tensor, torch.Tensor] = seen
        return found


class MixedCacheLayer(DynamicLayer):
    """The cache of a layer with two kinds of KV heads: it holds the full ones whole, and the others for a window.

    `update` returns keys and values as pairs, of the full heads `[B, Hf, T, D]` and of the windowed ones.
    """

    def __init__(self, window: int, heads: tuple[list[int], list[int]]) -> None:
        super().__init__()
        self.heads = heads
        self.windowed = SlidingCacheLayer(window)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        full, windowed = self.heads
        keys, values = super().update(take_heads(key_states, full), take_heads(value_states, full))
        near = self.windowed.update(take_heads(key_states, windowed), take_heads(value_states, windowed))
        return (keys, near[0]), (values, near[1])

    def activate_past_recording(self) -> None:
        self.windowed.activate_past_recording()

    def reset(self) -> None:
        super().reset()
        self.windowed.reset()

    def crop(self, tokens_to_remove: int) -> None:
        # The window first: it raises where it no longer has what would be left.
        self.windowed.crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.windowed.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.windowed.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.windowed.batch_select_indices(indices)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the decoder layers of a causal LM or of its decoder."""
    layers: nn.ModuleList = (model.get_decoder() if hasattr(model, "get_decoder") else model).layers
    return layers


def final_norm(model: PreTrainedModel) -> nn.Module:
    """Return the norm after a causal LM's last layer."""
    norm: nn.Module = getattr(model.get_decoder(), FAMILIES[model.config.model_type].final_norm)
    return norm


def skipped_layers(config: PreTrainedConfig) -> list[int]:
    """Return the layers without attention, which a config records in `per_layer_config[i].skip`."""
    layers = enumerate(config.per_layer_config if config.is_heterogeneous else ())
    return [index for index, layer in layers if "attention" in layer.skip]


def recorded_full_heads(config: PreTrainedConfig) -> dict[int, list[int]]:
    """Return, for each layer with two kinds of KV heads in a config, its full KV heads."""
    return {int(layer): list(heads) for layer, heads in (getattr(config, "full_kv_heads", None) or {}).items()}


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
    """Return `full_attention` for each layer of a config, or `sliding_attention` if it slides in the base already.

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


def base_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config to build the base of a boosted config from.

    Families tie more than the window to `layer_types`, Gemma 3 and OLMo 3 the rotary embedding, Cohere 2 whether there
    is one: a layer that slides only by the plan must be built as the full layer it was.
    """
    base = copy.copy(config)
    base.per_layer_config = None
    base.layer_types = base_layer_types(config)
    if "sliding_attention" not in base.layer_types:
        # Without layer types of its own, a family's window is every layer's; with them, a mask is built for it even
        # where no layer slides, and one that drops nothing is free.
        needed = hasattr(type(config), "layer_types") and not FAMILIES[config.model_type].rotary_by_window
        base.sliding_window = config.max_position_embeddings if needed else None
    return base


def apply_config(model: PreTrainedModel) -> None:
    """Give every layer of a stock model, built as the base, the strategy that `model.config` records."""
    config = model.config
    family = FAMILIES[config.model_type]
    types = base_layer_types(config)
    skipped, mixed = set(skipped_layers(config)), recorded_full_heads(config)
    for index, width in recorded_widths(config).items():
        set_mlp(decoder_layers(model)[index], width)
    stock = 0
    for index, layer in enumerate(decoder_layers(model)):
        if index in skipped:
            make_attention_free(layer, index, family)
        elif index in mixed or config.layer_types[index] != types[index]:
            sink = index in config.attention_sink_layers
            make_sliding(getattr(layer, family.attention), config.sliding_window, sink, mixed.get(index, ()))
        else:
            stock += 1
    if stock < config.num_hidden_layers:
        prepare = functools.partial(_prepare_forward, config, skipped, not stock and not mixed)
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
    mask = kwargs.get("attention_mask")
    if no_stock_attention and isinstance(mask, torch.Tensor) and mask.dim() == 2:
        # Sliding layers need to know of padding alone. Transformers takes four dimensions for a finished mask and
        # does not make its own `[B, 1, T, T]`.
        kwargs["attention_mask"] = mask[:, None, None, :].bool()
    if kwargs.get("use_cache") is None:
        kwargs["use_cache"] = config.use_cache
    past = kwargs.get("past_key_values")
    if past is None:
        if not kwargs["use_cache"] or (decoder.training and decoder.gradient_checkpointing):
            return args, kwargs
        past = kwargs["past_key_values"] = DynamicCache(config=config)
    if not isinstance(past, DynamicCache):
        raise ValueError(
            f"a boosted model works with DynamicCache, not {type(past).__name__}; leave cache_implementation unset"
        )
    for index, layer in enumerate(past.layers):
        if type(layer) is DynamicSlidingWindowLayer and not layer.is_initialized:
            past.layers[index] = SlidingCacheLayer(layer.sliding_window)
    mixed = recorded_full_heads(config)
    while len(past.layers) <= max([*skipped, *mixed], default=-1):
        past.layers.append(DynamicLayer())
    for index in skipped:
        if not isinstance(past.layers[index], AttentionFreeCacheLayer):
            past.layers[index] = AttentionFreeCacheLayer(past.layers[index].get_seq_length())
    for index, full in mixed.items():
        if type(past.layers[index]) is DynamicLayer and not past.layers[index].is_initialized:
            windowed = [head for head in range(config.num_key_value_heads) if head not in full]
            past.layers[index] = MixedCacheLayer(config.sliding_window, (full, windowed))
    return args, kwargs


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
    mask = _boolean_mask(attention_mask, key.shape[2])
    sinks = getattr(module, "sinks", None)
    out = sliding_attention(query, key, value, module.layerboost_window, sinks, mask, scaling, softcap)
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
    near = sliding_attention(
        take_heads(query, windowed), keys[1], values[1], module.layerboost_window, getattr(module, "sinks", None),
        _boolean_mask(mask, keys[1].shape[2]), kwargs.get("scaling"), kwargs.get("softcap"),
    )  # fmt: skip
    out = torch.cat([far, near.transpose(1, 2)], dim=2)
    order = [*full, *windowed]
    return out if order == sorted(order) else out[:, :, sorted(range(len(order)), key=order.__getitem__)], None


def query_heads(kv_heads: Sequence[int], groups: int) -> list[int]:
    """Return the query heads that read some KV heads, `groups` of each."""
    return [query for head in kv_heads for query in range(head * groups, (head + 1) * groups)]


def take_heads(states: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """Return some heads of states `[B, H, T, D]`, as a view if they are consecutive."""
    first, end = heads[0], heads[-1] + 1
    return states[:, first:end] if len(heads) == end - first else states[:, list(heads)]


def stock_attention(module: Any, implementation: str) -> Any:
    """Return the attention function that a stock module calls for an implementation."""
    # Each family has an eager attention of its own, in the file of its attention class.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


def _boolean_mask(mask: torch.Tensor | None, keys: int) -> torch.Tensor | None:
    """Return a mask of any backend as bool `[B, 1, Tq or 1, Tk]`, for the last `keys` keys."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"sliding layers cannot read a {type(mask).__name__}: load with attn_implementation='sdpa'")
    if mask.dim() == 2:  # FlashAttention's padding mask [B, Tk]
        mask = mask[:, None, None, :]
    if mask.is_floating_point():
        mask = mask > torch.finfo(mask.dtype).min / 2
    return mask.bool()[..., -keys:]


ALL_ATTENTION_FUNCTIONS.register(SLIDING, sliding_attention_forward)


_BOOSTED: dict[type, Any] = {}


def boosted_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a subclass of a stock class that builds the base and gives every layer the strategy of its config."""
    if stock.__name__ == "LayerBoostForCausalLM":
        return stock
    if stock not in _BOOSTED:

        def init(self: Any, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            implementation = FAMILIES[config.model_type].attn_implementation
            if implementation and config._attn_implementation in (None, "sdpa"):
                config._attn_implementation = implementation
            base = base_config(config)
            stock.__init__(self, base, *args, **kwargs)
            config._attn_implementation_internal = base._attn_implementation
            self.config = config
            apply_config(self)

        # The name is what save_pretrained writes into `architectures`, and what vLLM's registry knows.
        _BOOSTED[stock] = type("LayerBoostForCausalLM", (stock,), {"__init__": init, "__module__": __name__})
    boosted: type[PreTrainedModel] = _BOOSTED[stock]
    return boosted


def stock_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return Transformers' own causal LM class of a family; raise ValueError if the family is not supported."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"no boosted model of family {config.model_type!r}; known: {', '.join(FAMILIES)}")
    found: type[PreTrainedModel] = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type])
    return found


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
    stock = stock_class(config)
    return boosted_class(stock) if "LayerBoostForCausalLM" in (config.architectures or []) else stock


def register_auto_classes() -> None:
    """Let `AutoModelForCausalLM` load boosted checkpoints; stock checkpoints still get their stock class."""
    # Transformers prefers a registered class over a checkpoint's own remote code unless the class is one of its own.
    # Other people's remote code on a stock config must keep working, so this one says it is.
    registered = type("LayerBoostForCausalLM", (LayerBoostForCausalLM,), {"__module__": "transformers.models.auto"})
    for model_type in FAMILIES:
        config = transformers.CONFIG_MAPPING[model_type]
        AutoModelForCausalLM.register(config, registered, exist_ok=True)


# Not where this file travels inside a checkpoint: remote code loads one model and changes nothing else.
if __name__ == "layerboost.model.modeling":
    register_auto_classes()
