"""The stock formats as data: what each can hold, and what runs it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from layerboost.errors import ConfigError
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
# Rotary embeddings whose frequencies do not depend on the length of a text.
DEFAULT = frozenset({"default"})
FIXED = DEFAULT | {"linear", "llama3", "yarn"}


@dataclass(frozen=True)
class Target:
    """One stock format. `runs`: the engines, with the versions that were tried.

    `holds`: what a layer may be besides full; `rope`: types of rotary embeddings. `architecture`: llama.cpp's, of a
    GGUF file; `--to gguf` takes one that holds the plan. `every_nth`: all layers slide but every n-th.
    """

    name: str
    title: str
    runs: str
    families: tuple[str, ...]
    holds: frozenset[str]
    rope: frozenset[str]
    keeps_first: bool = False  # layer 0 must have attention
    # The tokens that a layer without attention still holds for one request, by the window. None: it is truly absent.
    removed_tokens: Callable[[int], int] | None = None
    # Bytes per number of keys and values, if not the model's.
    kv_bytes: int | None = None
    architecture: str = ""
    every_nth: bool = False
    # Why a model of one of the families does not fit, or nothing.
    unfit: Callable[[PreTrainedConfig], str] = lambda config: ""

    @property
    def label(self) -> str:
        """The name, with the architecture of a GGUF file."""
        return f"{self.name} {self.architecture}".strip()


def _unfit_gemma(config: PreTrainedConfig) -> str:
    caps = [bool(config.attn_logit_softcapping), bool(config.final_logit_softcapping)]
    if caps != [config.model_type == "gemma2"] * 2:
        return "soft caps" if any(caps) else "no soft caps"
    if config.query_pre_attn_scalar != head_dim(config):
        return f"scores scaled by {config.query_pre_attn_scalar}, not by the head's size"
    return _needs_tied(config)


def _unfit_olmo(config: PreTrainedConfig) -> str:
    if len({rope["rope_theta"] for rope in _ropes(config)}) > 1:
        return "full and sliding layers with rotary embeddings of two bases"
    # It scales those of full layers alone.
    if config.model_type == "olmo2" and config.rope_parameters["rope_type"] != "default":
        return f"rotary embeddings of type {config.rope_parameters['rope_type']}"
    return _needs_square(config)


def _unfit_mellum(config: PreTrainedConfig) -> str:
    if len({rope["rope_theta"] for rope in _ropes(config)}) > 1:
        return "full and sliding layers with rotary embeddings of two bases"
    kinds = getattr(config, "mlp_layer_types", None) or ["sparse"] * config.num_hidden_layers
    if getattr(config, "mlp_only_layers", None) or getattr(config, "decoder_sparse_step", 1) != 1 or "dense" in kinds:
        return "layers without experts"
    if not config.norm_topk_prob:
        return "experts whose weights do not add up to one"
    return "biases" if config.attention_bias else ""


def _needs_tied(config: PreTrainedConfig) -> str:
    return "" if config.tie_word_embeddings else "an output head of its own"


def _needs_square(config: PreTrainedConfig) -> str:
    heads = config.num_attention_heads * head_dim(config)
    return "" if heads == config.hidden_size else f"heads of {heads} numbers together, not {config.hidden_size}"


def _rotates_partly(config: PreTrainedConfig) -> str:
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return "" if share == 1 else f"rotary embeddings of a fraction of {share} of each head"


def _unfit_mlx(config: PreTrainedConfig) -> str:
    if config.rope_parameters.get("attention_factor"):
        return "rotary embeddings with an attention_factor of their own"
    return _rotates_partly(config) or ("no full layer" if all(slides_where_possible(config)) else "")


def _gguf(architecture: str, families: tuple[str, ...], **settings: Any) -> Target:
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
            rope=FIXED | {"dynamic"},
            removed_tokens=lambda window: window,
            unfit=_rotates_partly,
        ),
        Target(
            "decilm",
            "DeciLMForCausalLM, a Hugging Face directory",
            "vLLM 0.30 to 0.32, with --trust-remote-code for its configuration",
            ("llama", "qwen2"),
            NO_SINKS | {THIN},
            rope=FIXED | {"dynamic"},
            keeps_first=True,
        ),
        Target(
            "mlx",
            "a Hugging Face directory for mlx-lm's Llama class",
            "mlx-lm 0.32",
            PLAIN_LLAMAS,
            NO_SINKS,
            rope=FIXED,
            removed_tokens=lambda window: window,
            unfit=_unfit_mlx,
        ),
        # Without changed layers.
        _gguf("llama", ("llama", "mistral", "ministral"), holds=frozenset(), rope=FIXED, unfit=_rotates_partly),
        # llama.cpp reads no factors of frequencies for these two.
        _gguf("qwen2", ("qwen2",), holds=frozenset(), unfit=_needs_square),
        _gguf("qwen3", ("qwen3",), holds=frozenset()),
        _gguf("granite_swa", LLAMA_SHAPED, holds=EVERYTHING, rope=FIXED, unfit=_rotates_partly),
        _gguf(
            "deci",
            PLAIN_LLAMAS,
            holds=frozenset({NONE, THIN}),
            rope=FIXED,
            keeps_first=True,
            removed_tokens=None,
            unfit=_rotates_partly,
        ),
        _gguf("step35", ("qwen3",)),
        _gguf("mellum", ("qwen3_moe", "mellum"), unfit=_unfit_mellum),
        _gguf("olmo2", ("olmo2", "olmo3"), rope=DEFAULT | {"yarn"}, every_nth=True, unfit=_unfit_olmo),
        _gguf("gemma2", ("gemma2",), every_nth=True, unfit=_unfit_gemma),
        _gguf("gemma3", ("gemma3_text",), rope=DEFAULT | {"linear"}, every_nth=True, unfit=_unfit_gemma),
        _gguf(
            "cohere2",
            ("cohere2",),
            every_nth=True,
            unfit=lambda config: _needs_tied(config) or _needs_square(config),
        ),
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
            + ("; all layers but every n-th slide" if target.every_nth else ""),
            "rotary embeddings": ", ".join(sorted(target.rope)),
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
    if odd := {rope.get("rope_type", "default") for rope in _ropes(config)} - target.rope:
        return f"rotary embeddings of type {', '.join(sorted(odd))}"
    return target.unfit(config) or _layer_problem(target, config, layers)


def _layer_problem(target: Target, config: PreTrainedConfig, layers: Sequence[LayerPlan]) -> str:
    rotates_by_type = FAMILIES[config.model_type].rotary_by_type and not _same_rope(config)
    for entry, kind in zip(layers, base_layer_types(config), strict=True):
        for need in needs(entry, kind == "sliding_attention"):
            if need not in target.holds or (need == NONE and target.keeps_first and entry.layer == 0):
                return f"layer {entry.layer} has {need}"
        if entry.window and rotates_by_type:
            return f"layer {entry.layer} slides, but has a full layer's rotary embedding"
    if target.every_nth and full_every(config) is None:
        full = [layer for layer, kind in enumerate(config.layer_types) if kind != "sliding_attention"]
        return f"windows in all layers but {', '.join(map(str, full))}; it has them in all but every n-th"
    return ""


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Return the rotary embedding of all layers, or of each type of layer."""
    rope = config.rope_parameters
    return [rope[kind] for kind in ("full_attention", "sliding_attention") if kind in rope] or [rope]


def _same_rope(config: PreTrainedConfig) -> bool:
    """Return whether a family in which a layer's type may decide on its rotary embedding has one for both types."""
    ropes = _ropes(config)
    return len(ropes) == 2 and ropes[0] == ropes[1]


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
    able = [target for target, why in problems if not why]
    if fitting := [target for target in able if name in ("auto", target.name)]:
        removed = any(NONE in needs(entry, slides=False) for entry in layers)
        chosen = min(fitting, key=lambda target: removed and target.removed_tokens is not None)
        if name == "auto":
            others = "; ".join(f"{target.label}: {why}" for target, why in problems if why)
            log.info("%s holds this plan at the least KV cache%s", chosen.label, f" ({others})" if others else "")
        return chosen
    do = f"export to {able[0].name}" if able else "serve the checkpoint itself, with layerboost installed"
    if mixed := ", ".join(str(entry.layer) for entry in layers if entry.full_kv_heads):
        do += f", or make the nearest plan of whole layers: layers {mixed} full"
    asked = [(target, why) for target, why in problems if name in ("auto", target.name)]
    # Of the formats of one name, those of the family.
    asked = [(target, why) for target, why in asked if config.model_type in target.families] or asked
    named = "; ".join(f"{target.label}: {why}" for target, why in asked)
    if name == "auto":
        raise ConfigError("no stock format can hold this plan", found=named, do=do)
    raise ConfigError(f"{name} cannot hold this plan", found=named if len(asked) > 1 else asked[0][1], do=do)
