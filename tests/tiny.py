"""Tiny random models of every family with a word-level tokenizer, and a small text, all built on the spot."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from layerboost.model.base import Base
from layerboost.model.checkpoint import save_boosted
from layerboost.model.families import FAMILIES, WRAPPERS, Family
from layerboost.model.linear import ONEDNN_PRODUCT
from layerboost.model.modeling import ATTENTION, auto_class, base_layer_types
from layerboost.model.surgery import apply_plan
from layerboost.runtime import Runtime
from layerboost.schemas.model import ModelInfo
from layerboost.schemas.plan import LayerPlan, PlanFile

VOCABULARY, WINDOW, HEADS, KV_HEADS = 200, 16, 4, 2
RUNTIME = Runtime(torch.device("cpu"), torch.float32)

ROPE = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e6,
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
# Of families that name them otherwise.
LOCAL_EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 32}
GRANITE = {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "residual_multiplier": 0.7, "attention_multiplier": 0.1}
BY_TYPE_ROPE = {"full_attention": ROPE, "sliding_attention": ROPE | {"rope_theta": 100.0}}
LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 16, "linear_value_head_dim": 24,
}  # fmt: skip
QWEN_ROPE = ROPE | {"partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
MROPE = ROPE | {"mrope_section": [6, 5, 5]}
HUNYUAN_ROPE = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1e3, "factor": 1.0}
# What a family's tiny model sets besides the common settings: whatever makes it unlike Llama, large enough to matter.
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "granite": GRANITE,
    "mistral": {"sliding_window": None},
    "gemma2": {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {"query_pre_attn_scalar": 32, "sliding_window_pattern": 3},
    "olmo3": {"rope_parameters": BY_TYPE_ROPE},
    "apertus": {"rope_parameters": LLAMA3_ROPE},
    "cwm": {"rope_parameters": LLAMA3_ROPE},
    "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
    "cohere2": {"logit_scale": 0.5},
    "arcee": {"attention_bias": True, "mlp_bias": True},
    "ernie4_5": {"use_bias": True},
    "helium": {"hidden_size": 128},  # its heads are as wide as the stream
    "hunyuan_v1_dense": {"rope_parameters": HUNYUAN_ROPE},
    "hyperclovax": GRANITE | {"logits_scaling": 0.4},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.5,
        }
    },
    "nanochat": {"final_logit_softcapping": 5.0},
    "olmo": {"clip_qkv": 1.5},
    "stablelm": {"hidden_size": 128, "qk_layernorm": True, "use_parallel_residual": True},
    "vaultgemma": {"query_pre_attn_scalar": 32, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "qwen3_vl_text": {"rope_parameters": MROPE | {"mrope_interleaved": True}},
    # Unlike the stream, so that loading can tell which way its experts are written.
    "qwen3_vl_moe_text": {
        **EXPERTS,
        "num_experts": 8,
        "moe_intermediate_size": 48,
        "rope_parameters": MROPE | {"mrope_interleaved": True},
    },
    # Their heads are as wide as the stream.
    "qwen2_vl_text": {"hidden_size": 128, "rope_parameters": MROPE},
    "qwen2_5_vl_text": {"hidden_size": 128, "rope_parameters": MROPE},
    # Mixtures of experts, with the fields that real checkpoints set.
    "qwen3_moe": {**EXPERTS, "num_experts": 8},
    "qwen2_moe": {**EXPERTS, "num_experts": 8, "norm_topk_prob": False, "shared_expert_intermediate_size": 48},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {
        "hidden_size": 128,  # its heads are as wide as the stream
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "intermediate_size": 32,
        "clip_qkv": 1.5,
    },
    "granitemoe": GRANITE | LOCAL_EXPERTS,
    "granitemoeshared": {**GRANITE, **LOCAL_EXPERTS, "shared_intermediate_size": 48},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 8, "use_qk_norm": True, "routed_scaling_factor": 2.5},
    "minimax_m2": {**LOCAL_EXPERTS, "rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    "afmoe": {
        **EXPERTS,
        "num_experts": 8,
        "num_shared_experts": 1,
        "route_scale": 2.5,
        "mup_enabled": True,
        "global_attn_every_n_layers": 2,
    },
    "cohere2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "expert_selection_fn": "sigmoid",
        "intermediate_size": 32,
        "first_k_dense_replace": 1,
        "prefix_dense_intermediate_size": 96,
        "logit_scale": 0.5,
    },
    "dots1": {
        **EXPERTS,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "sliding_window": None,
    },
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 32},
    "exaone_moe": {**EXPERTS, "num_experts": 8, "sliding_window_pattern": 2},
    "flex_olmo": {"num_experts": 7, "num_experts_per_tok": 5, "intermediate_size": 32},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "intermediate_size": 32, "rope_parameters": HUNYUAN_ROPE},
    "hy_v3": {**EXPERTS, "num_experts": 8},
    "mellum": {**EXPERTS, "num_experts": 8, "rope_parameters": BY_TYPE_ROPE},
    "phimoe": {**LOCAL_EXPERTS, "attention_bias": True, "lm_head_bias": True},
    "solar_open": {**EXPERTS, "n_routed_experts": 8},
    # Hybrids.
    "qwen3_next": {**EXPERTS, **LINEAR, "num_experts": 8, "shared_expert_intermediate_size": 48},
    "qwen3_5_text": {**LINEAR, "rope_parameters": QWEN_ROPE},
    "qwen3_5_moe_text": {
        **EXPERTS,
        **LINEAR,
        "num_experts": 8,
        "shared_expert_intermediate_size": 48,
        "rope_parameters": QWEN_ROPE,
    },
    "granitemoehybrid": {
        **GRANITE,
        **LOCAL_EXPERTS,
        "shared_intermediate_size": 48,
        "mamba_n_heads": 4,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
        "mamba_norm_before_gate": False,
        "embedding_multiplier": 2.0,
        "lm_head_multiplier": 0.5,
        "key_multiplier": 0.6,
        "attention_in_multiplier": 1.2,
        "attention_out_multiplier": 0.7,
        "mlp_multipliers": [1.5, 0.7],
        "ssm_in_multiplier": 1.25,
        "ssm_out_multiplier": 0.6,
        "ssm_multipliers": [0.7, 0.8, 0.9, 1.1, 1.2],
    },
    "lfm2_moe": {**EXPERTS, "num_experts": 8, "num_dense_layers": 1, "routed_scaling_factor": 1.5},
    "olmo_hybrid": LINEAR,
}
# Transformers' type of a hybrid's layers of another kind, which are the first and the third of a tiny model.
OTHERS = {
    **dict.fromkeys(
        ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "granitemoehybrid", "olmo_hybrid"), "linear_attention"
    ),
    **dict.fromkeys(("lfm2", "lfm2_moe"), "conv"),
}
IMAGE_TOKEN = 2  # no text has it
# The tiny image tower of a wrapper, and its other settings.
QWEN3_TOWER = {
    "depth": 3, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}  # fmt: skip
TOWERS: dict[str, dict[str, Any]] = {
    "llava": {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 32},
    "mistral3": {"model_type": "pixtral", "image_size": 32, "patch_size": 4},
    "qwen3_vl": QWEN3_TOWER,
    "qwen3_vl_moe": QWEN3_TOWER,
    "qwen2_vl": {"depth": 2, "num_heads": 2, "patch_size": 4, "embed_dim": 32, "hidden_size": 128},
    "internvl": {"image_size": 8, "patch_size": 2},
    "idefics3": {"image_size": 8, "patch_size": 2},
    "smolvlm": {"image_size": 8, "patch_size": 2},
    "qwen2_5_vl": {
        "depth": 2, "num_heads": 2, "patch_size": 4, "window_size": 16, "out_hidden_size": 128,
        "fullatt_block_indexes": [1],
    },
    "gemma3": {"image_size": 8, "patch_size": 2, "vision_use_head": False},
    "qwen3_5": {"depth": 2, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64, "num_position_embeddings": 16},
    "qwen3_5_moe": {"depth": 2, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64, "num_position_embeddings": 16},
}  # fmt: skip
AROUND: dict[str, dict[str, Any]] = {"gemma3": {"mm_tokens_per_image": 4}}
SLIDING_BASES = (
    "ministral", "gemma2", "gemma3_text", "gemma3", "olmo3", "cohere2", "cwm", "exaone4", "vaultgemma",
    "afmoe", "cohere2_moe", "exaone_moe", "mellum",
)  # fmt: skip
# What there are models of: language models alone and in wrappers.
MODEL_TYPES = [*(name for name in FAMILIES if name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), *WRAPPERS]
MIXTURES = tuple(name for name in FAMILIES if any("expert" in setting for setting in FAMILY_SETTINGS.get(name, {})))
# Their MLPs cannot be thinned: experts, and MLPs of another name.
WHOLE_MLPS = (*MIXTURES, "lfm2", "falcon_h1")
# Families that use every field of a row between them. The others are in the whole grids of `make test-all`.
QUICK_FAMILIES = (
    "llama", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text", "olmo2", "olmo3", "granite", "cohere2",
    "phi", "stablelm", "exaone4", "hyperclovax", "qwen3_moe", "qwen3_vl", "qwen3_next", "falcon_h1",
)  # fmt: skip


def row(model_type: str) -> Family:
    """The row of a family, or of the language model in a tiny wrapper."""
    return FAMILIES[WRAPPERS[model_type].inside[0] if model_type in WRAPPERS else model_type]


def families(*, sliding: bool = True, others: bool = True, experts: bool = False, mlps: bool = False) -> list[Any]:
    """Every family as a parameter of a test; without `sliding`, those in whose tiny base no layer slides; without
    `others`, those in which every layer has attention and no state; with
    `experts`, the mixtures of experts; with `mlps`, those whose MLPs can be thinned."""
    names = [
        name
        for name in MODEL_TYPES
        if (sliding or name not in SLIDING_BASES)
        and (others or not row(name).mixer)
        and (not experts or name in MIXTURES)
        and (not mlps or name not in (*WHOLE_MLPS, *WRAPPERS))
    ]
    return [pytest.param(name, marks=() if name in QUICK_FAMILIES else pytest.mark.exhaustive) for name in names]


def layer_plans(letters: str, window: int = WINDOW) -> list[LayerPlan]:
    """One letter per layer: f(ull), s(liding), S(liding with a sink), n(one), x: of another kind; h and H: s with KV
    head 1 and S with KV head 0 full; l, L and D: linear as LoLCATs, as Liger and by the delta rule; with half of an MLP
    t: f, u: s, o: n, y: x; without an MLP m: f, z: n, Y: x."""
    half = {"mlp": "thin", "mlp_width": 48}
    kinds: dict[str, Any] = {
        "f": {"attention": "full"},
        "s": {"attention": "sliding", "window": window},
        "S": {"attention": "sliding", "window": window, "sink": True},
        "n": {"attention": "none"},
        "h": {"attention": "sliding", "window": window, "full_kv_heads": (1,)},
        "H": {"attention": "sliding", "window": window, "sink": True, "full_kv_heads": (0,)},
        "l": {"attention": "linear", "window": window, "feature_map": "lolcats"},
        "L": {"attention": "linear", "window": window, "feature_map": "liger"},
        "D": {"attention": "linear", "window": window, "feature_map": "delta"},
        "x": {"attention": "other"},
        "t": {"attention": "full", **half},
        "u": {"attention": "sliding", "window": window, **half},
        "o": {"attention": "none", **half},
        "y": {"attention": "other", **half},
        "m": {"attention": "full", "mlp": "none"},
        "z": {"attention": "none", "mlp": "none"},
        "Y": {"attention": "other", "mlp": "none"},
    }
    return [LayerPlan(layer=index, **kinds[letter]) for index, letter in enumerate(letters)]


def fitted(letters: str, model_type: str) -> str:
    """A plan's letters for a family: where its tiny base slides already, f in place of a window; x where it has no
    attention; whole MLPs of experts."""
    if model_type in WHOLE_MLPS:
        letters = letters.translate(str.maketrans("tuomz", "fsnfn"))
    model = tiny_model(model_type, len(letters))
    types = base_layer_types(model.config.get_text_config())

    def fit(letter: str, kind: str) -> str:
        if kind not in ATTENTION:
            return {**dict.fromkeys("tuo", "y"), **dict.fromkeys("mz", "Y")}.get(letter, "x")
        return {**dict.fromkeys("sShH", "f"), "u": "t"}.get(letter, letter) if kind == "sliding_attention" else letter

    return "".join(map(fit, letters, types))


def tiny_model(model_type: str = "llama", layers: int = 5, **changes: Any) -> PreTrainedModel:
    """A stock model of a family or a wrapper, with random weights, so large that attention matters to the logits."""
    torch.manual_seed(0)
    config = tiny_config(model_type, layers, **changes)
    text = config.get_text_config()
    model = auto_class(config).from_config(config, attn_implementation=FAMILIES[text.model_type].attn_implementation)
    model = model.float()  # Apertus makes its activation's numbers in bfloat16
    corrections = (buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias"))
    with torch.no_grad():
        for value in (*model.parameters(), *corrections):
            # Biases and norms begin as zeros and ones, and Gemma 3's projector as zeros: they hide mistakes.
            if value.dim() == 1 or not value.any():
                value.add_(torch.randn_like(value) * 0.1)
    return model.eval()


def tiny_config(model_type: str, layers: int, **changes: Any) -> PreTrainedConfig:
    """The config of a tiny model; `changes` to a wrapper are of its language model, but for the tied head."""
    if model_type in WRAPPERS:
        tied = changes.pop("tie_word_embeddings", False)
        inside = tiny_config(changes.pop("inside", WRAPPERS[model_type].inside[0]), layers, **changes)
        tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
        return transformers.CONFIG_MAPPING[model_type](
            text_config=inside.to_dict() | {"dtype": "float32"},
            vision_config=tower | {"initializer_range": 0.2, "dtype": "float32"} | TOWERS[model_type],
            image_token_id=IMAGE_TOKEN,
            tie_word_embeddings=tied,
            **AROUND.get(model_type, {}),
        )
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "initializer_range": 0.2,
    }
    if model_type in SLIDING_BASES:
        settings["sliding_window"] = WINDOW
    if model_type in ("ministral", "mellum"):
        settings["layer_types"] = [("full_attention", "sliding_attention")[i % 2] for i in range(layers)]
    if other := OTHERS.get(model_type):
        settings["layer_types"] = [other if index in (0, 2) else "full_attention" for index in range(layers)]
    settings |= FAMILY_SETTINGS.get(model_type, {}) | changes
    return transformers.CONFIG_MAPPING[model_type](**settings)


def image_prompt(wrapper: str, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """A text `[B, T]` with an image in each row, from the 13th token on, as a processor would give it to a model."""
    rows, draw = len(text), torch.Generator().manual_seed(2)
    tokens, size = (2, (8, 16)) if wrapper == "mistral3" else (4, (8, 8))
    image = torch.full((rows, tokens), IMAGE_TOKEN)
    ids = torch.cat([text[:, :12], image, text[:, 12 + tokens :]], dim=1)
    prompt = {"input_ids": ids, "pixel_values": torch.randn(rows, 3, *size, generator=draw)}
    kinds = (ids == IMAGE_TOKEN).long()
    match wrapper:
        case "mistral3":
            prompt["image_sizes"] = torch.tensor([size] * rows)
        case "gemma3":
            prompt["token_type_ids"] = kinds
        case "idefics3" | "smolvlm":
            prompt["pixel_values"] = prompt["pixel_values"][:, None]  # images of a row
        case "qwen3_vl" | "qwen3_vl_moe" | "qwen2_vl" | "qwen2_5_vl" | "qwen3_5" | "qwen3_5_moe":
            prompt["pixel_values"] = torch.randn(rows * 16, 3 * 2 * 4 * 4, generator=draw)  # patches of two frames
            prompt["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
            prompt["mm_token_type_ids"] = kinds
    return prompt


def tower_parameters(model: PreTrainedModel) -> set[str]:
    """The names of a wrapper's parameters that are not its language model's."""
    own = {id(each) for part in (model.get_decoder(), model.get_output_embeddings()) for each in part.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) not in own}


def boosted(letters: str, model_type: str = "llama", window: int = WINDOW, **changes: Any) -> PreTrainedModel:
    """A boosted tiny model, sinks random."""
    model = tiny_model(model_type, len(letters), **changes)
    plans = layer_plans(letters, window)
    return apply_plan(model, plans, {plan.layer: torch.randn(sinks_of(plan)) * 2 for plan in plans if plan.sink})


def sinks_of(plan: LayerPlan) -> int:
    """The query heads of a layer that have a window."""
    return HEADS // KV_HEADS * len(plan.windowed(KV_HEADS))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words w3 to w199."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{index}": index for index in range(3, VOCABULARY)}}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )


def opening_tokenizer() -> PreTrainedTokenizerFast:
    """The same words, but every text opens with `<s>`, as Llama 3's and Gemma's do."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return tokenizer


def save_tiny(folder: Path, model_type: str = "llama", letters: str = "", layers: int = 4, **changes: Any) -> Path:
    """Save a tiny model with its tokenizer; no letters: a stock model."""
    model = boosted(letters, model_type, **changes) if letters else tiny_model(model_type, layers, **changes)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def plan_file(letters: str, window: int = WINDOW, model: ModelInfo | None = None) -> PlanFile:
    """A plan by hand, for a model that does not exist if none is given."""
    return PlanFile(model=model or info(len(letters)), method="by hand", layers=layer_plans(letters, window))


def save_checkpoint(folder: Path, model: PreTrainedModel, plan: PlanFile, tokenizer: Any = None) -> Path:
    """Save a boosted model with plan, card and code, as `convert` does."""
    save_boosted(model, tokenizer or tiny_tokenizer(), plan, folder, recipe_yaml="schema_version: 1\n")
    return folder


def convert(base: Base, letters: str, folder: Path, sinks: dict[int, torch.Tensor] | None = None) -> PreTrainedModel:
    """Apply a plan to a base and save the checkpoint; return the model."""
    plan = plan_file(letters, model=base.info)
    model = apply_plan(base.load(), plan.layers, sinks)
    save_checkpoint(folder, model, plan, base.tokenizer)
    return model


def edit_json(file: Path, **changes: Any) -> None:
    """Change values in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change values in a model's config.json."""
    edit_json(folder / "config.json", **changes)


def change_weights(place: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a safetensors file, or of the one in a directory."""
    file = place / "model.safetensors" if place.is_dir() else place
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def check_generation(model: PreTrainedModel, ids: torch.Tensor, tokens: int = 9, **given: Any) -> Any:
    """Assert that generation from a cache has the logits of one forward pass without; return what it gave."""
    out = model.generate(
        ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, output_logits=True,
        return_dict_in_generate=True, **given,
    )  # fmt: skip
    whole = model(out.sequences, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, atol=1e-3, rtol=1e-3)
    return out


def save_text(file: Path, words: int = 20_000) -> Path:
    """A text of documents of 200 words in which one word often follows another."""
    draw = random.Random(0)
    lines = []
    for _ in range(words // 200):
        word, line = 3, []
        for _ in range(200):
            word = (word * 7) % 197 + 3 if draw.random() < 0.7 else draw.randrange(3, VOCABULARY)
            line.append(f"w{word}")
        lines.append(" ".join(line))
    file.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return file


def info(layers: int = 4) -> ModelInfo:
    """Facts of a model that does not exist."""
    return ModelInfo(
        name="tiny", model_type="llama", layers=layers, hidden_size=64, heads=4, kv_heads=2, head_dim=32,
        bytes_per_element=4, max_context_tokens=512, vocabulary=200, tied_head=False,
        parameters=25_600 + layers * 50_000, attention_parameters=24_640, fingerprint="abc",
        mlp_width=96, mlp_parameters=18_432, neuron_parameters=192,
    )  # fmt: skip


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of printable tokens: llama.cpp wants a merge, and gives no probabilities of half characters."""
    return _byte_level_bpe({"a": 0, "b": 1, "ab": 2, **{f"t{index}": index for index in range(3, 257)}}, [("a", "b")])


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, for prompts in plain English; ids below 256."""
    return _byte_level_bpe({token: index for index, token in enumerate(sorted(ByteLevel.alphabet()))}, [])


def _byte_level_bpe(words: dict[str, int], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(BPE(words, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


class Products(TorchDispatchMode):
    """Counts products of one kind, oneDNN's if no other is named, by the rows they were given."""

    def __init__(self, kind: str = ONEDNN_PRODUCT) -> None:
        super().__init__()
        self.kind, self.rows = kind, list[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() == self.kind:
            self.rows.append(args[0].shape[0])
        return func(*args, **(kwargs or {}))
