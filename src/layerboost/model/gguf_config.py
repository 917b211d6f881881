"""What Transformers leaves out of a GGUF file: it is put into config and tokenizer, or the file is refused.

Transformers reads the sizes of a model and takes its own defaults for the rest: rotary embeddings that are scaled or
partial, windows, scales of scores, the token that begins a text. Nothing would say so, and the model would be another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.gguf import GGUF_CONFIG_ARCHS, read_gguf_metadata
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from layerboost.errors import ConfigError
from layerboost.runtime import log

ROPE_FACTORS = "rope_freqs.weight"
# Of every Llama 3 whose frequencies are scaled; the factor differs.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_CONTEXT = 8192
# Gemma's models whose scores have another scale than the family's default, by type and layers, as in llama.cpp's code.
SCALED_BY_HEADS = (("gemma2", 46), ("gemma3_text", 62))
# Multipliers that no architecture has which Transformers reads from GGUF.
MULTIPLIERS = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# Ways to split text, by llama.cpp's names. Words of the first are tokens whole if the vocabulary has them, and a text
# begins with a token unless the file says otherwise; the others are GPT-2's, for vocabularies without merged digits.
WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "tekken")
AS_GPT2 = ("gpt-2", "default", "smollm", "starcoder", "refact", "command-r", "mpt", "olmo")


def complete_config(config: PreTrainedConfig, file: Path) -> None:
    """Put into the config of a GGUF file what Transformers leaves out; raise ConfigError for what it cannot hold."""
    metadata, tensors = read_gguf_metadata(str(file))
    prefix = f"{metadata['general.architecture']}."
    settings = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    _complete_rope(config, settings, file, tensors)
    _complete_window(config, settings, file)
    for name in SOFTCAPS:
        if (value := settings.get(name)) is not None:
            if not hasattr(config, name):
                raise refused(file, f"{name} {value:g}")
            setattr(config, name, value)
    if scaled := [name for name in MULTIPLIERS if settings.get(name, 1.0) not in (0.0, 1.0)]:
        raise refused(file, f"{scaled[0]} {settings[scaled[0]]:g}")
    if (config.model_type, config.num_hidden_layers) in SCALED_BY_HEADS:
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


def check_every_tensor(model: PreTrainedModel, file: Path) -> None:
    """Raise ConfigError if a GGUF file holds weights that Transformers did not load into a model.

    It passes over tensors whose names it does not expect, such as biases.
    """
    reader = GGUFReader(file)
    architecture = reader.get_field("general.architecture")
    if architecture is None or architecture.contents() in GGUF_CONFIG_ARCHS:  # for these it names such tensors
        return
    held = sum(int(each.n_elements) for each in reader.tensors if each.name != ROPE_FACTORS)
    loaded = sum({each.data_ptr(): each.numel() for each in model.state_dict().values()}.values())
    if held > loaded:
        raise refused(file, f"{held - loaded:,} weights that are not in a {model.config.model_type} model")


def complete_tokenizer(tokenizer: Any, file: Path) -> None:
    """Have a tokenizer begin a text, and make tokens of whole words, as its GGUF file says.

    Warn if Transformers does not know how the file splits text.
    """
    metadata, _ = read_gguf_metadata(str(file))
    kind, splits = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    whole = kind == "gpt2" and splits in WHOLE_WORDS
    if whole:
        tokenizer.backend_tokenizer.model.ignore_merges = True
    elif kind == "gpt2" and splits not in (*GGUF_PRE_TOKENIZER_SPLITS, *AS_GPT2):
        log.warning("%s splits text as %s, which Transformers does not know: tokens may be others", file, splits)
    begins = metadata.get("tokenizer.ggml.add_bos_token", whole or kind == "llama") and tokenizer.bos_token is not None
    if begins != (tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]):
        tokenizer.add_bos_token = begins


def refused(file: Path, found: str) -> ConfigError:
    """Return the error for a file with a setting that the config of its model cannot hold."""
    return ConfigError(
        f"{file} has settings that Transformers cannot take from a GGUF file",
        found=found,
        do="give the model's own directory or Hub id, with safetensors",
    )


def _complete_rope(config: PreTrainedConfig, settings: dict[str, Any], file: Path, tensors: tuple[str, ...]) -> None:
    every = config.rope_parameters
    # Gemma 3's layers with a window have a rotary embedding of their own, which is not scaled.
    rope = every.get("full_attention", every)
    if (theta := settings.get("rope.freq_base")) is not None:
        rope["rope_theta"] = theta
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotated, fraction = settings.get("rope.dimension_count"), rope.get("partial_rotary_factor", 1.0)
    if rotated and rotated != int(size * fraction) and rotated != getattr(config, "rotary_dim", None):
        if "partial_rotary_factor" not in rope:
            raise refused(file, f"rotary embeddings of {rotated} of {size} dimensions")
        rope["partial_rotary_factor"] = rotated / size
    kind, factor = settings.get("rope.scaling.type", "none"), settings.get("rope.scaling.factor", 1.0)
    factor = settings.get("rope.scale_linear", factor)  # of older files
    attention = {settings.get(f"rope.scaling.{name}", 1.0) for name in ("attn_factor", "yarn_attn_factor")}
    by_tensor = [name for name in tensors if name.startswith(("rope_freqs", "rope_factors"))]
    plain = attention == {1.0}
    if by_tensor and not (plain and by_tensor == [ROPE_FACTORS] and _is_llama3(config, rope, settings, file)):
        raise refused(file, f"rotary embeddings scaled by {', '.join(by_tensor)}")
    if by_tensor or kind == "none" or (kind == "linear" and factor in (0.0, 1.0)):
        return
    context = settings.get("rope.scaling.original_context_length")
    if not plain or kind not in ("linear", "yarn") or (kind == "yarn" and not context) or config.model_type == "phi3":
        raise refused(file, f"rotary embeddings scaled by {kind}")
    rope |= {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        betas = {name: settings.get(f"rope.scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
        rope |= {name: beta for name, beta in betas.items() if beta} | {"original_max_position_embeddings": context}


def _is_llama3(config: PreTrainedConfig, rope: dict[str, Any], settings: dict[str, Any], file: Path) -> bool:
    """Scale the frequencies as Llama 3 does; return whether these are then divided by the file's factors."""
    factors = next(torch.tensor(each.data) for each in GGUFReader(file).tensors if each.name == ROPE_FACTORS)
    context = settings.get("rope.scaling.original_context_length", LLAMA3_CONTEXT)
    plain = rope["rope_theta"] ** (-torch.arange(len(factors)) / len(factors))
    rope |= LLAMA3 | {
        "rope_type": "llama3",
        "factor": round(float(factors.max()), 4),
        "original_max_position_embeddings": context,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    return bool(len(scaled) == len(factors) and torch.allclose(plain / scaled, factors.float(), rtol=1e-3))


def _complete_window(config: PreTrainedConfig, settings: dict[str, Any], file: Path) -> None:
    window = settings.get("attention.sliding_window") or None
    if window is None or window == getattr(config, "sliding_window", None):
        return
    # Of families in which a window is every layer's.
    if hasattr(type(config), "sliding_window") and not hasattr(type(config), "layer_types"):
        config.sliding_window = window
    elif window < config.max_position_embeddings:
        raise refused(file, f"a sliding window of {window}")
