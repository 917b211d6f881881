"""The stock formats as data: what each can hold, and what runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from layerboost.errors import ConfigError
from layerboost.exporting.llama_shaped import MULTIPLIERS, has_bias, rotating_layers
from layerboost.exporting.tensors import full_every, head_dim, slides_by, slides_where_possible, window_of
from layerboost.model.families import FAMILIES
from layerboost.model.modeling import base_layer_types, skipped_layers
from layerboost.runtime import log
from layerboost.schemas.model import ModelInfo
from layerboost.schemas.plan import LayerPlan, check_served
from layerboost.strategies import STRATEGIES

# What a layer of a plan may need of a format.
SLIDING, SINK, NONE, KV_HEADS = "a sliding window", "a sink", "no attention", "full KV heads in a sliding layer"
THIN, NO_MLP = "a thinned MLP", "no MLP"
EVERYTHING, NO_SINKS = frozenset({SLIDING, SINK, NONE}), frozenset({SLIDING, NONE})
# Families that differ from Llama by settings that its formats have.
PLAIN_LLAMAS = ("llama", "mistral", "ministral", "qwen2", "phi3")
LLAMA_SHAPED = (*PLAIN_LLAMAS, "smollm3", "granite")
WITH_QK_NORMS = ("qwen3", "qwen3_moe", "mellum", "olmo2", "olmo3", "gemma3_text")
# Rotary embeddings whose frequencies do not depend on the length of a text.
DEFAULT = frozenset({"default"})
FIXED = DEFAULT | {"linear", "llama3", "yarn"}
# What a model may need of a format.
BIASES, MLP_BIASES, QK_NORMS, EXPERTS = "biases in attention", "biases in MLPs", "q/k norms", "experts"
HEAD, HEADS = "an untied output head", "heads not as wide as the model together"
SCALED, SOFT_CAPS = "Granite's multipliers", "soft caps of scores and logits"
NO_ROPE, FACTOR = "layers without a rotary embedding", "a rotary attention_factor"
TWO_BASES = "rotary embeddings of two bases in full and sliding layers"
LLAMAS = frozenset({BIASES, MLP_BIASES, HEAD, HEADS})
GELU = "gelu_pytorch_tanh"


def _caps(config: PreTrainedConfig) -> list[bool]:
    return [bool(getattr(config, f"{name}_logit_softcapping", None)) for name in ("attn", "final")]


def _has_experts(config: PreTrainedConfig) -> bool:
    return bool(getattr(config, "num_experts", 0))


def _is_partly_dense(config: PreTrainedConfig) -> bool:
    kinds = getattr(config, "mlp_layer_types", None) or []
    dense = "dense" in kinds or getattr(config, "mlp_only_layers", None)
    return _has_experts(config) and bool(dense or getattr(config, "decoder_sparse_step", 1) != 1)


FEATURES: dict[str, Callable[[PreTrainedConfig], bool]] = {
    BIASES: has_bias,
    MLP_BIASES: lambda config: getattr(config, "mlp_bias", False),
    QK_NORMS: lambda config: config.model_type in WITH_QK_NORMS,
    EXPERTS: _has_experts,
    HEAD: lambda config: not config.tie_word_embeddings,
    HEADS: lambda config: config.num_attention_heads * head_dim(config) != config.hidden_size,
    SCALED: lambda config: hasattr(config, MULTIPLIERS[0]),
    SOFT_CAPS: lambda config: all(_caps(config)),
    NO_ROPE: lambda config: not all(rotating_layers(config)),
    FACTOR: lambda config: any(rope.get("attention_factor") for rope in _ropes(config)),
    TWO_BASES: lambda config: len({rope["rope_theta"] for rope in _ropes(config)}) > 1,
    # No format has these.
    "rotary embeddings of a part of each head": lambda config: any(
        rope.get("partial_rotary_factor", 1) != 1 for rope in _ropes(config)
    ),
    "one soft cap of two": lambda config: (
        any(_caps(config)) != all(_caps(config)) or (config.model_type == "gemma2" and not any(_caps(config)))
    ),
    "scores scaled by another number than the head's size": lambda config: (
        getattr(config, "query_pre_attn_scalar", head_dim(config)) != head_dim(config)
    ),
    "layers without experts": _is_partly_dense,
    "experts whose weights do not add up to one": lambda config: not getattr(config, "norm_topk_prob", True),
}


@dataclass(frozen=True)
class Target:
    """One stock format. `runs`: the engines, with the versions that were tried.

    `holds`: what a layer may be besides full; `takes`: what a model may have besides Llama's parts; `rope`: types of
    rotary embeddings, and `scales_full`: those of full layers alone. `architecture`: llama.cpp's, of a GGUF file;
    `--to gguf` takes one that holds the plan. `every_nth`: all layers slide but every n-th.
    """

    name: str
    title: str
    runs: str
    families: tuple[str, ...]
    holds: frozenset[str]
    takes: frozenset[str]
    rope: frozenset[str]
    scales_full: frozenset[str] = frozenset()
    activation: str = "silu"
    keeps_first: bool = False  # layer 0 must have attention
    keeps_full: bool = False  # a layer must be full
    # The tokens that a layer without attention still holds for one request, by the window. None: it is truly absent.
    removed_tokens: Callable[[int], int] | None = None
    # Bytes per number of keys and values, if not the model's.
    kv_bytes: int | None = None
    architecture: str = ""
    every_nth: bool = False

    @property
    def label(self) -> str:
        """The name, with the architecture of a GGUF file."""
        return f"{self.name} {self.architecture}".strip()

    @property
    def removed(self) -> str:
        """What a layer without attention holds, as text."""
        if NONE not in self.holds:
            return "not held"
        if self.removed_tokens is None:
            return "nothing"
        every = "; at the place of a full layer, the context" if self.every_nth else ""
        return f"{self.removed_tokens(64)} tokens at a window of 64{every}"


def _gguf(architecture: str, families: tuple[str, ...], *takes: str, **settings: Any) -> Target:
    # By llama.cpp's defaults: float16; per sliding layer a window and a physical batch, in steps of 256.
    defaults: dict[str, Any] = {
        "holds": NO_SINKS,
        "rope": DEFAULT,
        "kv_bytes": 2,
        "removed_tokens": lambda window: math.ceil((window + 512) / 256) * 256,
    }
    return Target(
        "gguf",
        f"GGUF, a file of llama.cpp's {architecture} architecture",
        "llama.cpp b11549",
        families,
        takes=frozenset(takes),
        architecture=architecture,
        **defaults | settings,
    )


TARGETS = {
    target.label: target
    for target in (
        Target(
            "granite-swa",
            "GraniteSWAForCausalLM, a Hugging Face directory",
            "Transformers 5.19, vLLM 0.32",
            LLAMA_SHAPED,
            EVERYTHING,
            LLAMAS | {SCALED, NO_ROPE, FACTOR},
            FIXED | {"dynamic"},
            removed_tokens=lambda window: window,
        ),
        Target(
            "decilm",
            "DeciLMForCausalLM, a Hugging Face directory",
            "vLLM 0.30 to 0.33, with --trust-remote-code for its configuration",
            ("llama", "qwen2"),
            NO_SINKS | {THIN},
            LLAMAS | {FACTOR},
            FIXED | {"dynamic"},
            keeps_first=True,
        ),
        Target(
            "mlx",
            "a Hugging Face directory for mlx-lm's Llama class",
            "mlx-lm 0.32",
            PLAIN_LLAMAS,
            NO_SINKS,
            LLAMAS,
            FIXED,
            keeps_full=True,
            removed_tokens=lambda window: window,
        ),
        # Without changed layers.
        _gguf("llama", ("llama", "mistral", "ministral"), *LLAMAS, FACTOR, holds=frozenset(), rope=FIXED),
        _gguf("qwen2", ("qwen2",), BIASES, HEAD, holds=frozenset()),
        _gguf("qwen3", ("qwen3",), QK_NORMS, HEAD, HEADS, holds=frozenset()),
        _gguf("granite", ("granite",), *LLAMAS, SCALED, FACTOR, holds=frozenset(), rope=FIXED),
        _gguf("granite_swa", LLAMA_SHAPED, *LLAMAS, SCALED, NO_ROPE, FACTOR, holds=EVERYTHING, rope=FIXED),
        _gguf(
            "deci",
            PLAIN_LLAMAS,
            *LLAMAS,
            FACTOR,
            holds=frozenset({NONE, THIN}),
            rope=FIXED,
            keeps_first=True,
            removed_tokens=None,
        ),
        _gguf("step35", ("qwen3",), QK_NORMS, HEAD, HEADS),
        _gguf("mellum", ("qwen3_moe", "mellum"), QK_NORMS, HEAD, HEADS, EXPERTS),
        _gguf("olmo2", ("olmo2", "olmo3"), QK_NORMS, HEAD, FACTOR, scales_full=frozenset({"yarn"}), every_nth=True),
        _gguf("gemma2", ("gemma2",), HEADS, SOFT_CAPS, activation=GELU, every_nth=True),
        _gguf(
            "gemma3",
            ("gemma3_text",),
            *(QK_NORMS, HEADS, TWO_BASES),
            scales_full=frozenset({"linear"}),
            activation=GELU,
            every_nth=True,
        ),
        _gguf("cohere2", ("cohere2",), every_nth=True),
    )
}
NAMES = tuple(dict.fromkeys(target.name for target in TARGETS.values()))


def described_targets() -> dict[str, dict[str, str]]:
    """Return what each format is, by name, as text."""
    return {
        label: {
            "format": target.title,
            "runs in": target.runs,
            "families": ", ".join(target.families),
            "holds, besides full layers": ", ".join(sorted(target.holds))
            + ("; layer 0 must have attention" if target.keeps_first else "")
            + ("; a layer must be full" if target.keeps_full else "")
            + ("; all layers but every n-th slide" if target.every_nth else ""),
            "a layer without attention holds": target.removed,
            "models may have": ", ".join(name for name in FEATURES if name in target.takes),
            "activation": target.activation,
            "rotary embeddings": ", ".join(sorted(target.rope))
            + (f"; of full layers {', '.join(target.scales_full)}" if target.scales_full else ""),
        }
        for label, target in TARGETS.items()
    }


def needs(entry: LayerPlan, slides: bool) -> list[str]:
    """Return what a layer needs of a format; `slides`: whether the base's layer has a window of its own."""
    found = [SLIDING] if entry.window or (slides and not entry.attention_changed) else []
    found += [SINK] if entry.sink else []
    found += [KV_HEADS] if entry.full_kv_heads else []
    found += {"full": [], "thin": [THIN], "none": [NO_MLP]}[entry.mlp]
    return found + ([] if STRATEGIES[entry.attention].keeps_weights else [NONE])


def problem(target: Target, config: PreTrainedConfig, layers: Sequence[LayerPlan]) -> str:
    """Return why a format cannot hold a plan, naming the first layer; empty if it can.

    `config`: of the boosted checkpoint.
    """
    if config.model_type not in target.families:
        return f"family {config.model_type}; it holds {', '.join(target.families)}"
    if (activation := getattr(config, "hidden_activation", None) or config.hidden_act) != target.activation:
        return f"activation {activation}; it has {target.activation}"
    for kind, held in zip(rope_types(config), (target.rope | target.scales_full, target.rope), strict=True):
        if kind not in held:
            return f"rotary embeddings of type {kind}"
    if lacking := features(config) - target.takes:
        return ", ".join(sorted(lacking))
    return _layer_problem(target, config, layers)


def features(config: PreTrainedConfig) -> set[str]:
    """Return what a model needs of a format besides Llama's parts."""
    return {name for name, has in FEATURES.items() if has(config)}


def rope_types(config: PreTrainedConfig) -> tuple[str, str]:
    """Return the types of the rotary embeddings of full and of sliding layers."""
    full, *_, sliding = [rope.get("rope_type", "default") for rope in _ropes(config) * 2]
    return full, sliding


def _layer_problem(target: Target, config: PreTrainedConfig, layers: Sequence[LayerPlan]) -> str:
    ropes = _ropes(config)
    # Two equal embeddings are one for both types of layers; a single one is for sliding layers alone (Cohere 2).
    rotates_by_type = FAMILIES[config.model_type].rotary_by_type and not (len(ropes) == 2 and ropes[0] == ropes[1])
    for entry, kind in zip(layers, base_layer_types(config), strict=True):
        for need in needs(entry, kind == "sliding_attention"):
            if need not in target.holds or (need == NONE and target.keeps_first and entry.layer == 0):
                return f"layer {entry.layer} has {need}"
        if entry.window and rotates_by_type:
            return f"layer {entry.layer} slides, but has a full layer's rotary embedding"
    if target.keeps_full and all(slides_where_possible(config)):
        return "no full layer"
    if target.every_nth and full_every(config) is None:
        full = [layer for layer, kind in enumerate(config.layer_types) if kind != "sliding_attention"]
        return f"windows in all layers but {', '.join(map(str, full))}; it has them in all but every n-th"
    return ""


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the rotary embedding of all layers, or of each type of layer."""
    rope = config.rope_parameters
    return [rope[kind] for kind in ("full_attention", "sliding_attention") if kind in rope] or [rope]


def lacks_sinks(model_type: str) -> bool:
    """Return whether GGUF files hold windows of a family, and none with sinks."""
    held = [target.holds for target in TARGETS.values() if target.architecture and model_type in target.families]
    return any(SLIDING in each for each in held) and not any(SINK in each for each in held)


def extra_kv_bytes(target: Target, config: PreTrainedConfig, info: ModelInfo) -> int:
    """Return the bytes of keys and values of one request that layers without attention still hold in a format."""
    if target.removed_tokens is None:
        return 0
    nth = full_every(config) if target.every_nth else 0
    window, context = target.removed_tokens(window_of(config)), config.max_position_embeddings
    tokens = sum(window if slides_by(nth or 0, layer) else context for layer in skipped_layers(config))
    return 2 * info.kv_heads * info.head_dim * tokens * (target.kv_bytes or info.bytes_per_element)


def find_target(name: str, config: PreTrainedConfig, layers: Sequence[LayerPlan]) -> Target:
    """Return the format of a name, or for `auto` the first that holds the plan, without extra KV cache if possible.

    Raise ConfigError if it cannot hold the plan, naming the layer, the reason and a format that can.
    """
    if name not in (*NAMES, "auto"):
        raise ConfigError(f"no format is called {name}", do=f"choose one of auto, {', '.join(NAMES)}")
    check_served(layers, "a stock format" if name == "auto" else name)
    problems = [(target, problem(target, config, layers)) for target in TARGETS.values()]
    of_name = [(target, why) for target, why in problems if name in ("auto", target.name)]
    if fitting := [target for target, why in of_name if not why]:
        removed = any(NONE in needs(entry, slides=False) for entry in layers)
        chosen = min(fitting, key=lambda target: removed and target.removed_tokens is not None)
        if name == "auto":
            of_family = [(target, why) for target, why in problems if why and config.model_type in target.families]
            others = "; ".join(f"{target.label}: {why}" for target, why in of_family)
            log.info("%s holds this plan at the least KV cache%s", chosen.label, f" ({others})" if others else "")
        return chosen
    able = [target for target, why in problems if not why]
    do = f"export to {able[0].name}" if able else "serve the checkpoint itself, with layerboost installed"
    without = [entry.model_copy(update={"sink": False}) for entry in layers]
    if held := [target.label for target, _ in of_name if not problem(target, config, without)]:
        do += f", or plan without sinks (plan.sinks=false): {held[0]} holds that"
    if mixed := ", ".join(str(entry.layer) for entry in layers if entry.full_kv_heads):
        do += f", or make the nearest plan of whole layers: layers {mixed} full"
    # Of the formats of one name, those of the family.
    asked = [(target, why) for target, why in of_name if config.model_type in target.families] or of_name
    named = "; ".join(f"{target.label}: {why}" for target, why in asked)
    if name == "auto":
        raise ConfigError("no stock format can hold this plan", found=named, do=do)
    raise ConfigError(f"{name} cannot hold this plan", found=named if len(asked) > 1 else asked[0][1], do=do)
