"""GraniteSWA as a GGUF file for llama.cpp: the same settings and tensors under llama.cpp's names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from huggingface_hub import ModelCard

from layerboost.errors import ConfigError
from layerboost.exporting.granite_swa import MULTIPLIERS
from layerboost.model.card import CARD
from layerboost.model.files import Tensors
from layerboost.runtime import Progress
from layerboost.schemas.run import PLAN

ARCHITECTURE = "granite_swa"
# Of a model whose layers are all full, without Granite's multipliers.
PLAIN_ARCHITECTURE = "llama"
# Types of the matrices by name: of their blocks, and what a file calls itself.
TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_0": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}
# The plan of a boosted model in a file's metadata.
PLAN_KEY = "layerboost.plan"
# Embedding and head lose most by four bits.
HEADS = ("token_embd.weight", "output.weight")
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.sinks": "attn_sinks.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
# How llama.cpp splits text into words, by the pattern of a tokenizer's own splitter.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITTERS = {CONTRACTIONS + r"\p{N}{1,3}" + REST: "llama-bpe", CONTRACTIONS + r"\p{N}" + REST: "qwen2"}


def write_gguf(file: Path, folder: Path, config: dict[str, Any], tensors: Tensors, kind: str) -> None:
    """Write a file of these tensors, with matrices of type `kind`; `config`: as from `granite_config`.

    `folder`: the checkpoint, for tokenizer and chat template. Raise ConfigError for a tokenizer that llama.cpp lacks.
    """
    plain = is_plain(config)
    writer = gguf.GGUFWriter(file, PLAIN_ARCHITECTURE if plain else ARCHITECTURE)
    layers, head_dim = config["num_hidden_layers"], config["head_dim"]
    _, file_type = TYPES[kind]
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if not plain:
        writer.add_logit_scale(config["logits_scaling"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_sliding_window(config["sliding_window"])
        writer.add_sliding_window_pattern([each == "sliding_attention" for each in config["layer_types"]])
    card = ModelCard((folder / CARD).read_text()).data.to_dict() if (folder / CARD).is_file() else {}
    boosted = (folder / PLAN).is_file()
    writer.add_name(f"{card.get('base_model') or folder.resolve().name}{', boosted' if boosted else ''}")
    if card.get("license"):
        writer.add_license(card["license"])
    if boosted:
        writer.add_string(PLAN_KEY, (folder / PLAN).read_text())
    _add_tokenizer(writer, folder, config["vocab_size"])
    named = [(name, tensor) for name, tensor in _named(config, tensors) if not (plain and "attn_sinks" in name)]
    for name, tensor in named:
        chosen = _type(name, tensor, kind)
        shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, chosen)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    # One tensor in memory at a time.
    with Progress("writing GGUF", len(named), "tensors") as progress:
        for name, tensor in named:
            writer.write_tensor_data(gguf.quants.quantize(tensor.float().numpy(), _type(name, tensor, kind)))
            progress.advance(1)
    writer.close()


def is_plain(config: dict[str, Any]) -> bool:
    """Return whether llama.cpp's `llama` architecture holds a model: all of its layers are full."""
    neutral = all(config[name] == 1 for name in MULTIPLIERS)
    scale = config["attention_multiplier"] == config["head_dim"] ** -0.5
    return neutral and scale and "sliding_attention" not in config["layer_types"]


def window_in(file: Path) -> int | None:
    """Return the window of a GGUF file's sliding layers, None without any; raise ConfigError for another file."""
    try:
        reader = gguf.GGUFReader(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} is not a GGUF file", found=str(error), do="make one: layerboost export") from None
    architecture = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    key = gguf.Keys.Attention.SLIDING_WINDOW.format(arch=architecture.contents() if architecture else "")
    field = reader.get_field(key)
    return int(field.contents()) if field else None


def splitter(folder: Path) -> str:
    """Return llama.cpp's name for how a tokenizer splits text. Raise ConfigError if it is not known."""
    file = folder / "tokenizer.json"
    found = "no tokenizer.json"
    if file.is_file():
        plain = json.loads(file.read_text())
        stages = plain.get("pre_tokenizer") or {}
        parts = stages.get("pretokenizers", [stages])
        kinds = [part.get("type") for part in parts]
        model = plain["model"].get("type")
        found = f"{model}, {' then '.join(map(str, kinds))}"
        if model == "BPE" and kinds == ["ByteLevel"]:
            return "gpt-2"
        if model == "BPE" and kinds == ["Digits", "ByteLevel"]:
            return "smollm"
        if model == "BPE" and kinds == ["Split", "ByteLevel"]:
            pattern = parts[0]["pattern"].get("Regex")
            if pattern in SPLITTERS:
                return SPLITTERS[pattern]
            found += f", pattern {pattern}"
    raise ConfigError(
        f"the tokenizer of {folder} cannot be written to GGUF",
        found=f"{found}; known: byte-level BPE as in Llama 3, Qwen2, SmolLM and GPT-2",
        do="export to granite-swa, for Transformers or vLLM",
    )


def _add_tokenizer(writer: Any, folder: Path, vocabulary: int) -> None:
    plain = json.loads((folder / "tokenizer.json").read_text())
    tokens = {index: token for token, index in plain["model"]["vocab"].items()}
    kinds = dict.fromkeys(tokens, gguf.TokenType.NORMAL)
    for added in plain.get("added_tokens", []):
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter(folder))
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(vocabulary)])
    writer.add_token_types([kinds.get(index, gguf.TokenType.UNUSED) for index in range(vocabulary)])
    gguf.SpecialVocab(folder, load_merges=True, n_vocab=vocabulary).add_to_gguf(writer, quiet=True)


def _named(config: dict[str, Any], tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield llama.cpp's names and tensors; rows of q and k in the order of its rotary embedding."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in tensors.items():
        if name in OUTER:
            yield OUTER[name], tensor
            continue
        _, _, layer, rest = name.split(".", 3)
        part, _, end = rest.rpartition(".")
        if (count := heads.get(part.rpartition(".")[2])) is not None:
            pairs = tensor.reshape(count, 2, len(tensor) // count // 2, *tensor.shape[1:])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)  # noqa: PLW2901
        yield f"blk.{layer}.{NAMES[rest] if rest in NAMES else f'{NAMES[part]}.{end}'}", tensor


def _type(name: str, tensor: torch.Tensor, kind: str) -> GGMLQuantizationType:
    """Return a tensor's type: vectors are float32, matrices as asked if their rows divide into blocks."""
    if tensor.dim() == 1:
        return GGMLQuantizationType.F32
    chosen, _ = TYPES["q8_0" if kind == "q4_0" and name in HEADS else kind]
    return chosen if tensor.shape[1] % gguf.GGML_QUANT_SIZES[chosen][0] == 0 else GGMLQuantizationType.F16
