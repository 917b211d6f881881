"""Families as data: per Hugging Face `model_type`, where attention and its norms live and what serves it.

Travels inside every boosted checkpoint, so it imports nothing of layerboost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

TRANSFORMERS_BACKEND = "Transformers backend"


@dataclass(frozen=True, kw_only=True)
class Served:
    """What serves boosted models of a type.

    `vllm` says which of vLLM's classes do, empty if none, and `vllm_lacks` then why; `cpu_lacks` says why vLLM does not
    on CPUs, if it does elsewhere. `vllm_needs`: a package that vLLM's classes import, which not every vLLM comes with.
    """

    vllm: str = TRANSFORMERS_BACKEND
    vllm_lacks: str = ""
    cpu_lacks: str = ""
    vllm_needs: str = ""


@dataclass(frozen=True)
class Family(Served):
    """How one `model_type` is built.

    `attention` names the attention of a decoder layer, `output` the attention's output projection, `final_norm` the
    norm after the last layer. `norm_before` and `norm_after` are the norms of a decoder layer that serve attention
    alone and go with it; `parallel_flag` is a layer's attribute which, if true, has its MLP read `norm_before` too.
    `config_flags` are settings its config class needs before it keeps a `sliding_window`; `attn_implementation` is the
    stock backend to load it with where the default one leaves something out. `rotary_by_type` says that a layer's type
    decides on its rotary embedding too, not on its window alone, and `rotary_by_window` that a full layer has one only
    if the config has no window. `multiplies_logits` says that the config's `logits_scaling` multiplies, and does not
    divide. `images_both_ways` says that the tokens of an image see each other in both directions. `linear` says that
    linear attention is tested on it: rotary embeddings of whole heads in every layer, no soft-cap. `mixer` names, in
    a hybrid, what its layers of another kind have in place of attention, or every layer next to it; `computed_types`
    says that its config computes the layers' types, which so cannot record a window. `mlp` says that its MLPs can be
    changed: its layers have them by that name. `base_lacks` says what vLLM's own class of the stock base lacks on CPUs.
    """

    model_type: str
    attention: str = "self_attn"
    output: str = "o_proj"
    norm_before: str | None = "input_layernorm"
    norm_after: str | None = None
    parallel_flag: str = ""
    final_norm: str = "norm"
    config_flags: tuple[tuple[str, Any], ...] = ()
    attn_implementation: str | None = None
    rotary_by_type: bool = False
    rotary_by_window: bool = False
    multiplies_logits: bool = False
    images_both_ways: bool = False
    linear: bool = False
    mixer: str = ""
    computed_types: bool = False
    mlp: bool = True
    base_lacks: str = ""


AFTER = "post_attention_layernorm"
SLIDING_FLAG = (("use_sliding_window", True),)
NO_STATES = "vLLM's Transformers backend keeps no state for layers of another kind than attention"
hybrid = functools.partial(Family, vllm="", vllm_lacks=NO_STATES)
LFM2: dict[str, Any] = {"output": "out_proj", "norm_before": "operator_norm", "final_norm": "embedding_norm"}
lfm2 = functools.partial(hybrid, mixer="conv", mlp=False, **LFM2)
in_wrapper = functools.partial(Family, vllm="", vllm_lacks="it exists inside a wrapper alone")

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", linear=True, vllm="Llama classes"),
        Family("qwen2", linear=True, config_flags=SLIDING_FLAG),
        Family("qwen3", linear=True, vllm="Qwen3 classes", config_flags=SLIDING_FLAG),
        # Transformers loads a Mistral with `layer_types`, which a boosted one has, as a Ministral.
        Family("mistral", linear=True),
        Family("ministral"),
        Family("phi3"),
        # The stock SDPA path drops the soft-cap of the scores.
        Family("gemma2", norm_after=AFTER, attn_implementation="eager"),
        Family("gemma3_text", norm_after=AFTER, rotary_by_type=True, images_both_ways=True),
        Family("olmo2", norm_before=None, norm_after=AFTER),
        Family("olmo3", norm_before=None, norm_after=AFTER, rotary_by_type=True),
        Family("smollm3", config_flags=SLIDING_FLAG),
        Family("granite", linear=True),
        # Attention and MLP run side by side behind one norm, which the MLP still needs.
        Family("cohere", norm_before=None),
        Family("cohere2", norm_before=None, rotary_by_type=True),
        Family("phi", norm_before=None, output="dense", final_norm="final_layernorm"),
        Family("stablelm", parallel_flag="use_parallel_residual"),
        Family("apertus", norm_before="attention_layernorm"),
        Family("arcee"),
        Family("cwm"),
        Family("ernie4_5"),
        # Full layers have no rotary embedding where others slide (32B), and one where none does (1.2B).
        Family("exaone4", norm_before=None, norm_after=AFTER, rotary_by_type=True, rotary_by_window=True),
        Family("gemma"),
        Family("glm"),
        Family("glm4", norm_after="post_self_attn_layernorm"),
        Family("helium"),
        Family("hunyuan_v1_dense"),
        Family("hyperclovax", norm_after="post_norm1", multiplies_logits=True),
        Family("jais2"),
        Family("ministral3"),
        Family("nanochat"),
        Family("nemotron"),
        Family("olmo"),
        Family("seed_oss"),
        Family("starcoder2"),
        Family("vaultgemma", attn_implementation="eager"),
        # Mixtures of experts.
        Family("qwen3_moe", config_flags=SLIDING_FLAG),
        Family("qwen2_moe", config_flags=SLIDING_FLAG),
        Family("mixtral"),
        Family("olmoe"),
        Family("granitemoe"),
        Family("granitemoeshared"),
        Family("glm4_moe"),
        Family("minimax_m2", base_lacks="vLLM's router on CPUs takes sigmoid scores of grouped experts alone"),
        Family("afmoe", norm_after=AFTER, rotary_by_type=True),
        Family("cohere2_moe", norm_before=None, rotary_by_type=True),
        Family("dots1"),
        Family("ernie4_5_moe"),
        Family("exaone_moe", rotary_by_type=True, rotary_by_window=True),
        Family("flex_olmo", norm_before=None, norm_after=AFTER),
        Family("hunyuan_v1_moe"),
        Family("hy_v3"),
        Family("mellum", rotary_by_type=True),
        Family("phimoe"),
        Family("solar_open"),
        # Hybrids: layers with attention among others, which stay as they are.
        hybrid("qwen3_next", mixer="linear_attn"),
        hybrid("qwen3_5_text", mixer="linear_attn"),
        hybrid("qwen3_5_moe_text", mixer="linear_attn"),
        hybrid("granitemoehybrid", mixer="mamba", mlp=False),
        lfm2("lfm2"),
        lfm2("lfm2_moe"),
        hybrid("olmo_hybrid", mixer="linear_attn", norm_before=None, norm_after=AFTER),
        # Each layer has attention and a state side by side, behind one norm.
        hybrid(
            "falcon_h1",
            mixer="mamba",
            computed_types=True,
            norm_before=None,
            final_norm="final_layernorm",
            mlp=False,
        ),
        # Language models that exist inside a wrapper alone.
        in_wrapper("qwen3_vl_text"),
        in_wrapper("qwen3_vl_moe_text"),
        in_wrapper("qwen2_vl_text", config_flags=SLIDING_FLAG),
        in_wrapper("qwen2_5_vl_text", config_flags=SLIDING_FLAG),
    )
}


@dataclass(frozen=True)
class Wrapper(Served):
    """A vision-language model: an image tower and a language model, whose config is `text_config`.

    `inside` names the families of the language model, `architecture` the class of a boosted model: our class in vLLM,
    which is built on `vllm`, has the same name. `flat` says that a config may have the language model's settings in
    place of a `text_config`.
    """

    inside: tuple[str, ...]
    architecture: str = "LayerBoostForConditionalGeneration"
    flat: bool = False


WRAPPERS: dict[str, Wrapper] = {
    "llava": Wrapper(("llama", "mistral", "qwen2")),
    "mistral3": Wrapper(("mistral", "ministral3")),
    # vLLM's Transformers backend leaves out deepstack: what the tower adds to the stream after the first layers.
    "qwen3_vl": Wrapper(
        ("qwen3_vl_text",),
        "LayerBoostQwen3VLForConditionalGeneration",
        vllm="Qwen3-VL classes",
        vllm_needs="torchvision",
    ),
    "qwen3_vl_moe": Wrapper(
        ("qwen3_vl_moe_text",),
        vllm="",
        vllm_lacks="vLLM's Transformers backend leaves out deepstack, its Qwen3-VL class with experts has no windows",
    ),
    "qwen2_vl": Wrapper(("qwen2_vl_text",), flat=True),
    "qwen2_5_vl": Wrapper(("qwen2_5_vl_text",), flat=True),
    "internvl": Wrapper(("qwen2", "qwen3")),
    "idefics3": Wrapper(("llama",)),
    "smolvlm": Wrapper(("llama",)),
    "gemma3": Wrapper(
        ("gemma3_text",),
        cpu_lacks="vLLM's attention on CPUs does not let the tokens of an image see each other both ways",
    ),
    "qwen3_5": Wrapper(("qwen3_5_text",), vllm="", vllm_lacks=NO_STATES),
    "qwen3_5_moe": Wrapper(("qwen3_5_moe_text",), vllm="", vllm_lacks=NO_STATES),
}


def what_vllm_lacks(model_type: str, on_cpu: Callable[[], bool]) -> str:
    """Return what vLLM lacks to serve boosted models of a type; empty if it serves them, or if the type has no row."""
    row: Served = WRAPPERS.get(model_type) or FAMILIES.get(model_type) or Served()
    if row.vllm_needs and find_spec(row.vllm_needs) is None:
        return f"the package {row.vllm_needs}, which its class imports, is not installed"
    return row.vllm_lacks or (row.cpu_lacks if row.cpu_lacks and on_cpu() else "")
