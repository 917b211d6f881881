"""A boosted checkpoint, or a stock model, as a GGUF file: the same settings and tensors under llama.cpp's names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from layerboost.errors import ConfigError
from layerboost.exporting.gguf_tokenizer import add_tokenizer
from layerboost.exporting.llama_shaped import MULTIPLIERS, granite_tensors, rotating_layers
from layerboost.exporting.tensors import (
    full_every,
    head_dim,
    slides_where_possible,
    split_tensors,
    whole_tensors,
    window_of,
)
from layerboost.model.card import LICENCE_KEYS, card_data
from layerboost.model.checkpoint import plan_in
from layerboost.model.files import Tensors
from layerboost.model.mlp import recorded_widths
from layerboost.model.modeling import base_config, skipped_layers
from layerboost.runtime import Progress
from layerboost.schemas.run import PLAN

# Types of the matrices by name: of their blocks, and what a file calls itself.
TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
MOST_F16 = torch.finfo(torch.float16).max
# Embedding and head lose most by four bits.
HEADS = ("token_embd.weight", "output.weight")
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.sinks": "attn_sinks.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# With experts, whose numbers are left out: a layer's are one tensor.
OF_EXPERTS = NAMES | {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")
ROUTER = ".ffn_gate_inp."
# With norms after attention and MLP.
SANDWICHED = NAMES | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
SOURCE = "layerboost.source"
Settings = dict[str, Any]


def _granite_settings(config: PreTrainedConfig) -> Settings:
    embedding, residual, logits = (getattr(config, name, 1.0) for name in MULTIPLIERS)
    return {
        "attention.scale": float(getattr(config, "attention_multiplier", head_dim(config) ** -0.5)),
        "embedding_scale": float(embedding),
        "residual_scale": float(residual),
        "logit_scale": float(logits),
    }


def _granite_swa_settings(config: PreTrainedConfig) -> Settings:
    return _windows_by_layer(config) | {"attention.rope_pattern": rotating_layers(config)} | _granite_settings(config)


def _deci_settings(config: PreTrainedConfig) -> Settings:
    skipped, layers = skipped_layers(config), range(config.num_hidden_layers)
    widths, full = recorded_widths(config), base_config(config).intermediate_size
    return {
        "attention.head_count": [0 if layer in skipped else config.num_attention_heads for layer in layers],
        "attention.head_count_kv": [0 if layer in skipped else config.num_key_value_heads for layer in layers],
        "feed_forward_length": [widths.get(layer, full) for layer in layers],
    }


def _step35_settings(config: PreTrainedConfig) -> Settings:
    # Full layers of that family rotate half of the dimensions in the key, sliding layers all of theirs.
    return _windows_by_layer(config) | {
        "rope.dimension_count": 2 * head_dim(config),
        "rope.dimension_count_swa": head_dim(config),
        "rope.freq_base_swa": float(config.rope_parameters["rope_theta"]),
        "expert_feed_forward_length": 0,
    }


def _mellum_settings(config: PreTrainedConfig) -> Settings:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    return (_windows_by_layer(config) if any(slides_where_possible(config)) else {}) | {
        "rope.freq_base": float(rope["rope_theta"]),
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
    }


def _windows_by_layer(config: PreTrainedConfig) -> Settings:
    window, slides = window_of(config), slides_where_possible(config)
    if not any(slides):  # llama.cpp aborts without one that does; a window as long as the context drops nothing
        window, slides = config.max_position_embeddings, [True, *slides[1:]]
    return {"attention.sliding_window": window, "attention.sliding_window_pattern": slides}


def _window_in_all_but_every_nth(config: PreTrainedConfig) -> Settings:
    if (n := full_every(config)) == 1:  # none slides
        return {}
    return {"attention.sliding_window": window_of(config), "attention.sliding_window_pattern": n}


def _gemma2_settings(config: PreTrainedConfig) -> Settings:
    return _window_in_all_but_every_nth(config) | {
        "attn_logit_softcapping": float(config.attn_logit_softcapping),
        "final_logit_softcapping": float(config.final_logit_softcapping),
    }


def _gemma3_settings(config: PreTrainedConfig) -> Settings:
    rope, near = (config.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    scaled = {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope.get("factor", 1))}
    return _window_in_all_but_every_nth(config) | {
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.freq_base_swa": float(near["rope_theta"]),
        **(scaled if rope["rope_type"] == "linear" else {}),
    }


def _olmo_settings(config: PreTrainedConfig) -> Settings:
    rope = config.rope_parameters.get("full_attention", config.rope_parameters)
    found = _window_in_all_but_every_nth(config) | {"rope.freq_base": float(rope["rope_theta"])}
    if rope["rope_type"] == "yarn":  # of full layers alone
        _, scale = ROPE_INIT_FUNCTIONS["yarn"](config, layer_type="full_attention")
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": float(rope.get("beta_fast") or 32),
            "rope.scaling.yarn_beta_slow": float(rope.get("beta_slow") or 1),
            # llama.cpp multiplies it by what YaRN says for this factor.
            "rope.scaling.attn_factor": scale / (1 + 0.1 * math.log(rope["factor"])),
        }
    return found


def _cohere_settings(config: PreTrainedConfig) -> Settings:
    return _window_in_all_but_every_nth(config) | {
        "attention.layer_norm_epsilon": config.layer_norm_eps,
        "logit_scale": float(config.logit_scale),
    }


@dataclass(frozen=True)
class Layout:
    """How an architecture of llama.cpp writes its files.

    `interleaved`: its rotary embedding rotates neighbours, so that rows of q and k change places; `norm_offset`: what a
    norm of the family adds to its weights; `head`: the file has one though embedding and head are tied.
    """

    settings: Callable[[PreTrainedConfig], Settings]
    tensors: Callable[[PreTrainedConfig, Tensors], Tensors] = whole_tensors
    names: dict[str, str] = field(default_factory=lambda: NAMES)
    interleaved: bool = False
    norm_offset: float = 0.0
    head: bool = False


LAYOUTS = {
    "llama": Layout(lambda config: {}, split_tensors, interleaved=True),
    "qwen2": Layout(lambda config: {}, split_tensors),
    "qwen3": Layout(lambda config: {}, split_tensors),
    "granite": Layout(_granite_settings, split_tensors, interleaved=True),
    "granite_swa": Layout(_granite_swa_settings, granite_tensors, interleaved=True),
    "deci": Layout(_deci_settings, split_tensors, interleaved=True),
    "step35": Layout(_step35_settings, head=True),
    "mellum": Layout(_mellum_settings, names=OF_EXPERTS, head=True),
    "olmo2": Layout(_olmo_settings, names=SANDWICHED, head=True),
    "gemma2": Layout(_gemma2_settings, names=SANDWICHED, norm_offset=1.0),
    "gemma3": Layout(_gemma3_settings, names=SANDWICHED, norm_offset=1.0),
    "cohere2": Layout(_cohere_settings),
}


def write_gguf(
    file: Path, folder: Path, architecture: str, config: PreTrainedConfig, tensors: Tensors, kind: str, source: str
) -> None:
    """Write a file of these tensors for an architecture of llama.cpp, with matrices of type `kind`.

    `folder`: the model, stock or boosted, for tokenizer and chat template; `source`: what it says of where
    it is from. Raise ConfigError for a tokenizer that llama.cpp lacks.
    """
    layout = LAYOUTS[architecture]
    writer = gguf.GGUFWriter(file, architecture)
    _, file_type = TYPES[kind]
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in (_settings(config) | layout.settings(config)).items():
        _add(writer, f"{architecture}.{key}", value)
    _describe(writer, folder)
    writer.add_string(SOURCE, source)
    add_tokenizer(writer, folder, config.vocab_size)
    named = _named(layout, config, layout.tensors(config, tensors))
    if (factors := _rope_factors(config)) is not None:
        named.append(("rope_freqs.weight", [factors]))
    for name, parts in named:
        chosen = _type(name, parts[0], kind)
        whole = parts[0].shape if len(parts) == 1 else (len(parts), *parts[0].shape)
        shape = gguf.quants.quant_shape_to_byte_shape(whole, chosen)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # One tensor in memory at a time.
    with Progress("writing GGUF", len(named), "tensors") as progress:
        for name, parts in named:
            chosen = _type(name, parts[0], kind)
            if chosen == GGMLQuantizationType.F16 and any(part.abs().max() > MOST_F16 for part in parts):
                raise ConfigError(f"numbers of {name} are too large for float16", do="export with --type bf16 or f32")
            written = [gguf.quants.quantize(part.float().numpy(), chosen) for part in parts]
            writer.write_tensor_data(written[0] if len(written) == 1 else np.stack(written))
            progress.advance(1)
    writer.close()


def _describe(writer: Any, folder: Path) -> None:
    """Add the model's name, its licence by its card, and its plan."""
    card, plan = card_data(folder), plan_in(folder)
    if plan is None:
        writer.add_name(card.get("base_model") or folder.resolve().name)
    else:
        writer.add_name(f"{card.get('base_model') or Path(plan.model.name).name}, boosted")
        writer.add_string("layerboost.plan", (folder / PLAN).read_text(encoding="utf-8"))
    for key, add in zip(
        LICENCE_KEYS, (writer.add_license, writer.add_license_name, writer.add_license_link), strict=True
    ):
        if isinstance(card.get(key), str):
            add(card[key])


def window_in(file: Path) -> int | None:
    """Return the window of a GGUF file's sliding layers, None without any and for one that drops nothing; raise
    ConfigError for another file."""
    reader = _reader(file)
    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    name = architecture.contents() if architecture else ""
    window = reader.get_field(gguf.Keys.Attention.SLIDING_WINDOW.format(arch=name))
    context = reader.get_field(gguf.Keys.LLM.CONTEXT_LENGTH.format(arch=name))
    drops = window and not (context and int(window.contents()) >= int(context.contents()))
    return int(window.contents()) if drops else None


def source_of(file: Path) -> str | None:
    """Return what a GGUF file was made from, as `write_gguf` was told; raise ConfigError for another file."""
    field = _reader(file).get_field(SOURCE)
    return str(field.contents()) if field else None


def _reader(file: Path) -> Any:
    try:
        return gguf.GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ConfigError(f"{file} is not a GGUF file", found=str(error), do="make one: layerboost export") from None


def _settings(config: PreTrainedConfig) -> Settings:
    """Return what every architecture reads."""
    rope = config.rope_parameters
    found = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": base_config(config).intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "rope.dimension_count": head_dim(config),
    }
    if "rope_theta" in rope:
        found |= {"rope.freq_base": float(rope["rope_theta"])}
    if hasattr(config, "rms_norm_eps"):
        found |= {"attention.layer_norm_rms_epsilon": config.rms_norm_eps}
    if _is_scaled(config):
        found |= {"rope.scaling.attn_factor": float(LlamaRotaryEmbedding(config).attention_scaling)}
    return found


def _is_scaled(config: PreTrainedConfig) -> bool:
    return bool(config.rope_parameters.get("rope_type", "default") != "default")


def _rope_factors(config: PreTrainedConfig) -> torch.Tensor | None:
    """Return by what llama.cpp divides each frequency of a scaled rotary embedding `[head_dim / 2]`."""
    if not _is_scaled(config):
        return None
    rotary: Any = LlamaRotaryEmbedding(config)
    plain, _ = rotary.compute_default_rope_parameters(config)
    return torch.as_tensor(plain / rotary.inv_freq)


def _add(writer: Any, key: str, value: Any) -> None:
    """Add a setting with the type that llama.cpp reads it by."""
    match value:
        case list():
            writer.add_array(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case _:
            writer.add_string(key, value)


def _named(layout: Layout, config: PreTrainedConfig, tensors: Tensors) -> list[tuple[str, list[torch.Tensor]]]:
    """Return llama.cpp's names and tensors: one each, but all experts of a layer in order."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if layout.head and "lm_head.weight" not in tensors:
        tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    found: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if layout.norm_offset and "norm" in name:
            tensor = tensor.float() + layout.norm_offset  # noqa: PLW2901
        if name in OUTER:
            found[OUTER[name]] = {0: tensor}
            continue
        expert = EXPERT.search(name)
        _, _, layer, rest = EXPERT.sub(".mlp.experts.", name).split(".", 3)
        part, _, end = rest.rpartition(".")
        if layout.interleaved and (count := heads.get(part.rpartition(".")[2])) is not None:
            pairs = tensor.reshape(count, 2, len(tensor) // count // 2, *tensor.shape[1:])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)  # noqa: PLW2901
        theirs = f"blk.{layer}.{layout.names[rest] if rest in layout.names else f'{layout.names[part]}.{end}'}"
        found.setdefault(theirs, {})[int(expert[1]) if expert else 0] = tensor
    return [(name, [parts[number] for number in sorted(parts)]) for name, parts in found.items()]


def _type(name: str, tensor: torch.Tensor, kind: str) -> GGMLQuantizationType:
    """Return a tensor's type: vectors and routers are float32, matrices as asked if their rows divide into blocks."""
    if tensor.dim() == 1 or ROUTER in name:
        return GGMLQuantizationType.F32
    chosen, _ = TYPES["q8_0" if kind == "q4_0" and name in HEADS else kind]
    return chosen if tensor.shape[1] % gguf.GGML_QUANT_SIZES[chosen][0] == 0 else GGMLQuantizationType.F16
