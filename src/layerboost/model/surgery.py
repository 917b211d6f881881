"""A plan applied to a loaded Hugging Face model: in place for good, or reversibly in a `with` for measuring."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, assert_never

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from layerboost.errors import ConfigError
from layerboost.model.families import FAMILIES, WRAPPERS, Family
from layerboost.model.linear_attention import FEATURE_PARAMETERS, make_linear
from layerboost.model.mlp import NoMLP, recorded_widths, thin
from layerboost.model.modeling import (
    ATTENTION,
    AttentionFree,
    apply_config,
    architecture_of,
    attention_layers,
    auto_class,
    base_layer_types,
    boosted_class,
    decoder_layers,
    make_sliding,
    recorded_feature_maps,
    recorded_full_heads,
    skipped_layers,
    stock_attention,
)
from layerboost.model.unsupported import why_unsupported
from layerboost.schemas.plan import LayerPlan, window_of
from layerboost.strategies import FULL, OTHER, SLIDING

CAPTURE = "layerboost_capture"
# What surgery adds to an attention module.
ADDED_PARAMETERS = ("sinks", *FEATURE_PARAMETERS)


@dataclass(frozen=True)
class Thinned:
    """The neurons `[W]` of an MLP that stay, and their columns of its output projection `[D, W]`."""

    neurons: torch.Tensor
    output: torch.Tensor


def family_of(config: PreTrainedConfig) -> Family:
    """Return the row of a model's family, in a wrapper of its language model's; raise ConfigError if it has none."""
    if config.model_type in WRAPPERS:
        wrapper, config = config.model_type, config.get_text_config()
        if config.model_type not in WRAPPERS[wrapper].inside:
            raise ConfigError(
                "this wrapper is not supported with this language model",
                found=f"{wrapper} with {config.model_type}",
                do=f"use one with {', '.join(WRAPPERS[wrapper].inside)}",
            )
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError("encoder-decoder models are not supported", found=config.model_type)
    # Embedding models say it in either way.
    if getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False:
        raise ConfigError("models with bidirectional attention are not supported", found=config.model_type)
    if config.model_type not in FAMILIES:
        reason = why_unsupported(config.model_type)
        raise ConfigError(
            "this model family is not supported",
            found=config.model_type + (f" ({reason})" if reason else ""),
            do="use a model of a family in `layerboost ls families`",
        )
    if not attention_layers(config):
        raise ConfigError("this model has no layer with attention", found=f"{config.model_type}, {config.layer_types}")
    return FAMILIES[config.model_type]


def unchanged(config: PreTrainedConfig) -> list[LayerPlan]:
    """Return the plan that leaves every layer of the base as it is."""
    found = enumerate(base_layer_types(config))
    return [LayerPlan(layer=layer, attention=FULL if kind in ATTENTION else OTHER) for layer, kind in found]


def attention_of(model: PreTrainedModel, layer: int) -> nn.Module:
    """Return the attention module of one decoder layer."""
    return getattr(decoder_layers(model)[layer], family_of(model.config).attention)


def output_projection(model: PreTrainedModel, layer: int) -> nn.Module:
    """Return the module that projects the heads of one layer's attention to the stream."""
    return getattr(attention_of(model, layer), family_of(model.config).output)


def packed_parameters(module: nn.Module) -> list[str]:
    """Return the names of a module's own parameters `[experts, ...]`, each of all experts of a layer."""
    own = () if isinstance(module, nn.Conv1d) else module.named_parameters(recurse=False)
    return [name for name, parameter in own if parameter.dim() == 3 and name not in ADDED_PARAMETERS]


def experts_per_token(config: PreTrainedConfig) -> float:
    """Return how many experts of a layer a token goes through, the mean over layers."""
    chosen = config.num_experts_per_tok
    return sum(chosen) / len(chosen) if isinstance(chosen, list) else chosen


def native_window(config: PreTrainedConfig) -> int | None:
    """Return the window of the layers that slide in the base; None if no layer does."""
    return config.sliding_window if "sliding_attention" in base_layer_types(config) else None


def check_windows(config: PreTrainedConfig, windows: Sequence[int]) -> None:
    """Raise ConfigError for windows that no plan can combine with the layers that slide in the base."""
    native = native_window(config)
    if native is not None and set(windows) - {native}:
        raise ConfigError(
            f"layers of this {config.model_type} model slide already, and a config has one window",
            found=f"windows {', '.join(map(str, windows))}; the base's is {native}",
            do=f"set measure.windows to [{native}], and text.sequence_tokens and measure.retrieval_tokens above it"
            if native < config.max_position_embeddings
            else "use another model: this one's own window drops nothing, and cannot be combined with another",
        )


def check_linear(config: PreTrainedConfig) -> None:
    """Raise ConfigError for a family that cannot have linear attention."""
    if not family_of(config).linear:
        tested = ", ".join(family.model_type for family in FAMILIES.values() if family.linear)
        raise ConfigError(
            "this model family cannot have linear attention",
            found=f"{config.model_type}; it is tested on {tested}",
            do="use another strategy, or another model",
        )


def check_plan(config: PreTrainedConfig, layers: Sequence[LayerPlan]) -> None:
    """Raise ConfigError for a plan that this model cannot take."""
    family = family_of(config)
    if len(layers) != config.num_hidden_layers:
        raise ConfigError(
            "the plan is for another model",
            found=f"{len(layers)} layers in the plan, {config.num_hidden_layers} in the model",
        )
    types, native = base_layer_types(config), native_window(config)
    for entry, base in zip(layers, unchanged(config), strict=True):
        if OTHER in (entry.attention, base.attention) and entry.attention != base.attention:
            raise ConfigError(
                f"layer {entry.layer} of this {family.model_type} model is of type {types[entry.layer]}",
                found=f"a plan that makes it {entry.attention}",
                do=f"leave it as it is ({base.attention})",
            )
    check_mlps(config, layers)
    kept = [e.layer for e in layers if not e.attention_changed and types[e.layer] == "sliding_attention"]
    for entry in layers:
        if entry.window is None:
            continue
        try:
            entry.normalized(config.num_key_value_heads)
        except ValueError as error:
            raise ConfigError("the plan names KV heads that the model lacks", found=str(error)) from None
        if entry.feature_map:
            check_linear(config)
        if entry.window > config.max_position_embeddings:
            raise ConfigError(
                f"layer {entry.layer}: the window is longer than the model's context",
                found=f"window {entry.window}, context {config.max_position_embeddings}",
            )
        if types[entry.layer] == "sliding_attention":
            raise ConfigError(
                f"layer {entry.layer} already slides in {family.model_type}, with a window of {native}",
                found=f"a plan that gives it a window of {entry.window}",
                do="leave it as it is (`full`), or make it `none`",
            )
        if kept and entry.window != native:
            raise ConfigError(
                f"layer {entry.layer}: a config has one window, and layer {kept[0]} keeps the base's, {native}",
                found=f"window {entry.window}",
                do=f"give sliding layers a window of {native}",
            )


def check_mlps(config: PreTrainedConfig, layers: Sequence[LayerPlan]) -> None:
    """Raise ConfigError if a plan changes MLPs that this model does not have, or would not thin them."""
    changed = [entry for entry in layers if entry.mlp_changed]
    if changed and (getattr(config, "num_experts_per_tok", None) or not FAMILIES[config.model_type].mlp):
        raise ConfigError(
            "MLPs that are mixtures of experts, or of a form of their own, cannot be thinned or removed",
            found=f"{config.model_type}, layer {changed[0].layer}: MLP {changed[0].mlp_label}",
            do="leave mlp out of measure.components, and of the plan",
        )
    for entry in changed:
        if entry.mlp_width is not None and entry.mlp_width >= config.intermediate_size:
            raise ConfigError(
                f"layer {entry.layer}: a thinned MLP has fewer neurons than the base's",
                found=f"mlp_width {entry.mlp_width}, the base's MLPs have {config.intermediate_size}",
            )


def boosted_config(config: PreTrainedConfig, layers: Sequence[LayerPlan]) -> PreTrainedConfig:
    """Return a stock config with a plan in Hugging Face's keys: `layer_types`, `sliding_window`, and `per_layer_config`
    with `skip` and `intermediate_size`.

    They are those of the language model; a wrapper has them in its `text_config`. Four keys are ours:
    `attention_sink_layers`; `full_kv_heads` by layer where some of a layer's KV heads stay full (an empty list where
    all have the window in a family whose layer types are computed); `linear_attention`, the feature map by layer (the
    layer's type is then the base's); and `base_layer_types`, unless all layers are full in the base. Raise ConfigError.
    """
    whole = copy.deepcopy(config)
    config = whole.get_text_config()
    check_plan(config, layers)
    layers = [entry.normalized(config.num_key_value_heads) for entry in layers]
    types, family = base_layer_types(config), family_of(config)
    window = window_of(layers)
    if window is not None:
        for flag, value in family.config_flags:
            setattr(config, flag, value)
        config.sliding_window = window
    if set(types) != {"full_attention"}:
        config.base_layer_types = types
    mixed = {
        str(entry.layer): list(entry.full_kv_heads)
        for entry in layers
        if entry.full_kv_heads or (family.computed_types and entry.attention == SLIDING)
    }
    if mixed:
        config.full_kv_heads = mixed
    linear = {str(entry.layer): entry.feature_map for entry in layers if entry.feature_map}
    if linear:
        config.linear_attention = linear
    if not family.computed_types:
        config.layer_types = [
            "sliding_attention" if entry.attention == SLIDING and not entry.full_kv_heads else types[entry.layer]
            for entry in layers
        ]
    config.attention_sink_layers = [entry.layer for entry in layers if entry.sink]
    config.per_layer_config = {entry.layer: found for entry in layers if (found := _overrides(entry))} or None
    whole.architectures = [architecture_of(whole.model_type)]
    whole.auto_map = {auto_class(whole).__name__: "modeling_layerboost.LayerBoostForCausalLM"}
    return whole


def _overrides(entry: LayerPlan) -> dict[str, Any]:
    """Return what `per_layer_config` has of a layer."""
    removed = {"attention": not entry.strategy.keeps_weights, "mlp": entry.mlp == "none"}
    skip = [component for component, gone in removed.items() if gone]
    width = {"intermediate_size": entry.mlp_width} if entry.mlp_width else {}
    return ({"skip": skip} if skip else {}) | width


def recorded_plan(config: PreTrainedConfig) -> list[LayerPlan]:
    """Return the plan that `boosted_config` recorded. The entries are not validated: a person may have edited them."""
    skipped, sinks = skipped_layers(config), getattr(config, "attention_sink_layers", None) or []
    mixed, linear = recorded_full_heads(config), recorded_feature_maps(config)
    widths = recorded_widths(config)
    found = []
    for layer, (kind, base) in enumerate(zip(config.layer_types, base_layer_types(config), strict=True)):
        entry: dict[str, Any] = {"attention": FULL if base in ATTENTION else OTHER, "sink": layer in sinks}
        if layer in skipped:
            entry["attention"] = "none"
        elif layer in linear:
            entry |= {"attention": "linear", "window": config.sliding_window, "feature_map": linear[layer]}
        elif layer in mixed:
            entry |= {"attention": "sliding", "window": config.sliding_window, "full_kv_heads": tuple(mixed[layer])}
        elif kind == "sliding_attention" and base != kind:  # a layer that slides in the base is `full` in a plan
            entry |= {"attention": "sliding", "window": config.sliding_window}
        if layer in widths:
            entry |= {"mlp": "thin", "mlp_width": widths[layer]} if widths[layer] else {"mlp": "none"}
        found.append(LayerPlan.model_construct(layer=layer, **entry))
    return found


def apply_plan(
    model: PreTrainedModel,
    layers: Sequence[LayerPlan],
    sinks: dict[int, torch.Tensor] | None = None,
    thinned: Mapping[int, Thinned] | None = None,
) -> PreTrainedModel:
    """Boost a loaded stock model in place: removed attention and MLPs are dropped, sliding layers get their window and
    sinks, thinned MLPs their width.

    `sinks`: per layer with a sink, the logits of its query heads with a window; zeros where missing. `thinned`: per
    layer with a thinned MLP, its neurons; the first ones where missing. Raise ConfigError.
    """
    # The decoder keeps the base's config: what it derives from it (masks, rotary embeddings) stays the base's.
    model.config = boosted_config(model.config, layers)
    for layer, given in (thinned or {}).items():
        decoder_layer: Any = decoder_layers(model)[layer]
        decoder_layer.mlp = thin(decoder_layer.mlp, given.neurons, given.output)
    stock: Any = type(model)
    model.__class__ = boosted_class(stock)
    apply_config(model)
    for layer, values in (sinks or {}).items():
        module: Any = attention_of(model, layer)
        with torch.no_grad():
            module.sinks.copy_(values)
    return model


def windows_alone(layers: Sequence[LayerPlan]) -> list[LayerPlan]:
    """Return a plan with sliding layers in place of linear ones."""
    return [
        entry.model_copy(update={"attention": SLIDING, "feature_map": None}) if entry.feature_map else entry
        for entry in layers
    ]


def without_states(model: PreTrainedModel, layers: Sequence[LayerPlan]) -> PreTrainedModel:
    """Return a boosted model of the plan `layers`, in which linear layers of `model` slide, with the same weights."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    vars(text).pop("linear_attention", None)
    text.per_layer_config = None  # of a stock config again, from which the same is made
    other = type(model)._from_config(boosted_config(config, layers), dtype=model.dtype).to(model.device)
    state = model.state_dict()
    other.load_state_dict({name: state[name] for name in other.state_dict()})
    return other.eval()


@contextmanager
def replaced(
    model: PreTrainedModel,
    layer: int,
    plan: LayerPlan,
    sinks: torch.Tensor | None = None,
    thinned: Thinned | None = None,
) -> Iterator[None]:
    """Inside the block, attention and MLP of one layer of a stock model, without a cache, run under other strategies;
    outside, everything is as before."""
    decoder_layer: Any = decoder_layers(model)[layer]
    name = family_of(model.config).attention
    changed = [part for part, other in ((name, plan.attention_changed), ("mlp", plan.mlp_changed)) if other]
    before = {part: getattr(decoder_layer, part) for part in changed}
    try:
        match plan.attention:
            case "none":
                # The norms stay: their output is not used, and a stock layer calls them.
                setattr(decoder_layer, name, AttentionFree(layer))
            case "sliding":
                assert plan.window is not None
                setattr(decoder_layer, name, attention := _copied(before[name]))
                make_sliding(attention, plan.window, sink=False, full_kv_heads=plan.full_kv_heads)
                attention.sinks = sinks
            case "linear":
                assert plan.window is not None
                assert plan.feature_map is not None
                setattr(decoder_layer, name, attention := _copied(before[name]))
                make_linear(attention, plan.window, plan.feature_map)
            case "full" | "other":
                pass
            case _:
                assert_never(plan.attention)
        match plan.mlp:
            case "none":
                decoder_layer.mlp = NoMLP()
            case "thin":
                assert thinned is not None
                decoder_layer.mlp = thin(before["mlp"], thinned.neurons, thinned.output)
            case "full":
                pass
            case _:
                assert_never(plan.mlp)
        yield
    finally:
        for part, module in before.items():
            setattr(decoder_layer, part, module)


def _copied(module: nn.Module) -> Any:
    """Return a module of the same weights and submodules, to which more can be added."""
    copied = copy.copy(module)
    vars(copied).update({name: copy.copy(value) for name, value in vars(module).items() if isinstance(value, dict)})
    return copied


@contextmanager
def captured_attention(model: PreTrainedModel, layers: Sequence[int], see: Callable[..., None]) -> Iterator[None]:
    """Inside the block, each forward of a stock model calls `see(layer, query, key, value, scaling, softcap)`.

    query `[B, H, T, D]`, key and value `[B, Hkv, T, D]`, as the attention backend gets them.
    """
    modules: list[Any] = [attention_of(model, layer) for layer in layers]
    configs = [module.config for module in modules]
    try:
        for module in modules:
            module.layerboost_capture = see, module.config._attn_implementation
            module.config = copy.copy(module.config)
            module.config._attn_implementation = CAPTURE
        yield
    finally:
        for module, config in zip(modules, configs, strict=True):
            module.config = config
            del module.layerboost_capture


def _capturing_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Show queries, keys and values to the capturing function; then do what the stock attention does."""
    see, implementation = module.layerboost_capture
    stock = stock_attention(module, implementation)
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    see(module.layer_idx, query, key, value, scaling, kwargs.get("softcap"))
    return stock(module, query, key, value, *args, **kwargs)


# The table lives as long as the process: a function in it must hold no model.
ALL_ATTENTION_FUNCTIONS.register(CAPTURE, _capturing_attention)
