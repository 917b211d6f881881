"""The stock formats as data: what each can hold, and what runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from layerboost.errors import ConfigError
from layerboost.model.compat import LLAMA_SHAPED
from layerboost.model.modeling import base_layer_types
from layerboost.runtime import log
from layerboost.schemas.plan import LayerPlan
from layerboost.strategies import STRATEGIES

# What a layer of a plan may need of a format.
SLIDING, SINK, NONE, KV_HEADS = "a sliding window", "a sink", "no attention", "full KV heads in a sliding layer"


@dataclass(frozen=True)
class Target:
    """One stock format. `holds`: what a layer may be besides full; `first_layer`: the same for layer 0.

    `runs`: the engines, with the versions that were tried.
    """

    name: str
    title: str
    runs: str
    families: tuple[str, ...]
    holds: frozenset[str]
    first_layer: frozenset[str]
    # The bytes of keys and values per KV head and dimension that a layer without attention still holds for one request:
    # (window, bytes per element of the model) -> bytes.
    removed_bytes: Callable[[int, int], int] = lambda window, size: 0
    scaled_rope: bool = True


EVERYTHING = frozenset({SLIDING, SINK, NONE})
TARGETS = {
    target.name: target
    for target in (
        Target(
            "granite-swa",
            "GraniteSWAForCausalLM, a Hugging Face directory",
            "Transformers 5.19, vLLM 0.32",
            ("llama", "mistral", "ministral", "qwen2", "smollm3", "granite"),
            holds=EVERYTHING,
            first_layer=EVERYTHING,
            removed_bytes=lambda window, size: window * size,
        ),
        Target(
            "decilm",
            "DeciLMForCausalLM, a Hugging Face directory",
            "vLLM 0.30 to 0.32, with --trust-remote-code for its configuration",
            tuple(LLAMA_SHAPED),
            holds=frozenset({SLIDING, NONE}),
            first_layer=frozenset({SLIDING}),
        ),
        Target(
            "gguf",
            "GGUF, a file of llama.cpp's granite_swa architecture",
            "llama.cpp b11549",
            ("llama", "mistral", "ministral", "granite"),
            holds=EVERYTHING,
            first_layer=EVERYTHING,
            # A window and a physical batch, in steps of 256, in float16: by llama.cpp's defaults.
            removed_bytes=lambda window, _: math.ceil((window + 512) / 256) * 256 * 2,
            scaled_rope=False,
        ),
    )
}


def described_targets() -> dict[str, dict[str, str]]:
    """Return what each format is, by name, as text."""
    return {
        target.name: {
            "format": target.title,
            "runs in": target.runs,
            "families": ", ".join(target.families),
            "holds, besides full layers": ", ".join(sorted(target.holds))
            + ("" if NONE in target.first_layer else "; layer 0 must have attention"),
        }
        for target in TARGETS.values()
    }


def needs(entry: LayerPlan, slides: bool) -> list[str]:
    """Return what a layer needs of a format; `slides`: whether the base's layer has a window of its own."""
    found = [SLIDING] if entry.window or (slides and not entry.changed) else []
    found += [SINK] if entry.sink else []
    found += [KV_HEADS] if entry.full_kv_heads else []
    return found + ([] if STRATEGIES[entry.attention].keeps_weights else [NONE])


def problem(target: Target, config: PreTrainedConfig, layers: Sequence[LayerPlan]) -> str:
    """Return why a format cannot hold a plan, naming the first layer; empty if it can."""
    if config.model_type not in target.families:
        return f"family {config.model_type}; it holds {', '.join(target.families)}"
    if not target.scaled_rope and config.rope_parameters.get("rope_type", "default") != "default":
        return f"rotary embeddings of type {config.rope_parameters['rope_type']}"
    for entry, kind in zip(layers, base_layer_types(config), strict=True):
        holds = target.holds if entry.layer else target.first_layer
        for need in needs(entry, kind == "sliding_attention"):
            if need not in holds:
                return f"layer {entry.layer} has {need}"
    return ""


def find_target(name: str, config: PreTrainedConfig, layers: Sequence[LayerPlan]) -> Target:
    """Return the format of a name, or for `auto` the first that holds the plan, without extra KV cache if possible.

    Raise ConfigError if it cannot hold the plan, naming the layer, the reason and a format that can.
    """
    if name not in (*TARGETS, "auto"):
        raise ConfigError(f"no format is called {name}", do=f"choose one of auto, {', '.join(TARGETS)}")
    problems = {each: problem(target, config, layers) for each, target in TARGETS.items()}
    able = [target for each, target in TARGETS.items() if not problems[each]]
    if name == "auto" and able:
        removed = any(NONE in needs(entry, slides=False) for entry in layers)
        chosen = min(able, key=lambda target: target.removed_bytes(1, 1) if removed else 0)
        others = "; ".join(f"{each}: {why}" for each, why in problems.items() if why)
        log.info("%s holds this plan at the least KV cache%s", chosen.name, f" ({others})" if others else "")
        return chosen
    if name != "auto" and not problems[name]:
        return TARGETS[name]
    do = f"export to {able[0].name}" if able else "serve the checkpoint itself, with layerboost installed"
    if mixed := ", ".join(str(entry.layer) for entry in layers if entry.full_kv_heads):
        do += f", or make the nearest plan of whole layers: layers {mixed} full"
    raise ConfigError(
        "no stock format can hold this plan" if name == "auto" else f"{name} cannot hold this plan",
        found="; ".join(f"{each}: {why}" for each, why in problems.items()) if name == "auto" else problems[name],
        do=do,
    )
