"""Why a model of the installed Transformers is not supported, from reading its source: nothing is imported."""

from __future__ import annotations

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from layerboost.model.families import FAMILIES, WRAPPERS

WRAPPER = "a wrapper of a language model"
# What a causal LM's classes and its config say, by reason; the first that applies is given.
REASONS = {
    WRAPPER: r"class \w+(ForConditionalGeneration|ImageEmbedding)\b|\bpixel_values\b",
    "an encoder, or a decoder with cross-attention": r"\b(encoder_hidden_states|cross_attention_states)\b",
    "multi-head latent attention": r"self\.kv_a_proj",
    "no attention": r"\A(?![\s\S]*\bclass \w*(Attention|MLA)\b)",
    "sparse attention by an indexer": r"class \w+Indexer\b",
    "a mixture of attention heads": r"class \w+MoA\b",
    "layers with different numbers of heads": r"\bnum_attention_heads_per_layer\b",
    "chunked attention": r"\bchunked_attention\b",
    "convolutions in its attention": r"conv_qk|\bk_sconv\b",
    "attention with a mask that it computes": r"dynamic_mask",
    "layers that share keys and values": r"kv_shared|shared_kv",
    "layers that share one attention": r"\bshared_transf",
    "layers that run several times": r"class \w+Stack\b",
    "sinks of its own": r"self\.sinks\b",
    "differential attention": r"\battn_output2\b",
    "layers of attention alone, without an MLP": r"\bMIXER_TYPES\b",
    "layer types that its config computes, where a plan would be recorded": r"def layers_block_type\(self\)",
    "a cache of its own": r"class \w+Cache\b",
    "attention and the norm of its MLP in one module": r"class \w+NormAttentionNorm\b",
    "projections in modules of their own": r"class \w+FlexibleLinear\b",
    "checkpoints that are all quantised": r"class BitNetForCausalLM\b",
    "its attention does not go through Transformers' attention interface": r"\A(?![\s\S]*\bALL_ATTENTION_FUNCTIONS\.)",
    "no num_key_value_heads in its config": r"\A(?![\s\S]*\bnum_key_value_heads\b)",
    "the language model of a wrapper without a row": r'base_config_key = "text_config"',
}
NO_ROW = "nothing is known against it, but it has no row in layerboost's table"


@cache
def why_unsupported(model_type: str) -> str | None:
    """Return why a model type is not supported; None if it is, or if Transformers has no language model of it."""
    if model_type in {*FAMILIES, *WRAPPERS}:
        return None
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return WRAPPER if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else None
    class_name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    # GPT-SW3's class is in the folder of GPT-2.
    same = [name for name, other in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if other == class_name]
    source = "\n".join(_source(name, class_name) for name in same)
    return next((reason for reason, pattern in REASONS.items() if re.search(pattern, source)), NO_ROW)


def unsupported_families() -> dict[str, str]:
    """Return, for each model type with a causal LM in Transformers and no row in our tables, the reason."""
    reasons = {name: why_unsupported(name) for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}
    return {name: reason for name, reason in reasons.items() if reason}


def _source(model_type: str, class_name: str) -> str:
    """Return the source of a causal LM's class, of those in its file that it is built of, and of its config.

    It is empty if the model type has neither.
    """
    spec = find_spec("transformers")
    assert spec
    assert spec.origin
    folder = Path(spec.origin).parent / "models" / model_type_to_module_name(model_type)
    texts = (file.read_text(encoding="utf-8") for file in sorted(folder.glob("modeling_*.py")))
    text = next((text for text in texts if f"\nclass {class_name}(" in text), "")
    # A class, or a table of classes such as LLAMA_ATTENTION_CLASSES.
    parts = {
        found[1]: part
        for part in re.split(r"\n(?=[@\w])", text)
        if (found := re.match(r"(?:class )?(\w+)(?:\(| = \{)", part))
    }
    reached: dict[str, str] = {}
    waiting = [class_name]
    while waiting:
        name = waiting.pop()
        if name in parts and name not in reached:
            part = reached[name] = parts[name]
            bases = re.match(r"class \w+\(([^)]*)\)", part)
            waiting += re.findall(r"\w+", bases[1]) if bases else re.findall(r": (\w+)", part)
            waiting += re.findall(r"\b([A-Z]\w*)[(\[]", part)
    classes = [part for name, part in reached.items() if not name.endswith("PreTrainedModel")]
    return "\n".join([*classes, *(file.read_text(encoding="utf-8") for file in folder.glob("configuration_*.py"))])
