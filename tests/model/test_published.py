"""Configs as popular checkpoints publish them: `check` says yes, or no with a reason a user can act on.

tests/published/ has each config with its checkpoint and where it was found. Fields stay as they are; the sizes that
cost memory are reduced here, and weights are random.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8 import to_fp8
from tiny import RUNTIME, VOCABULARY, layer_plans, save_text, tiny_tokenizer
from transformers import AutoConfig

from layerboost.check import check
from layerboost.errors import ConfigError
from layerboost.model.base import find_model, open_base
from layerboost.model.families import FAMILIES
from layerboost.model.modeling import auto_class, base_layer_types
from layerboost.model.surgery import apply_plan, native_window, unchanged
from layerboost.recipe import Recipe
from layerboost.runtime import start_runtime

PUBLISHED = {file.stem: json.loads(file.read_text()) for file in (Path(__file__).parents[1] / "published").iterdir()}
WINDOW, TOKENS = 16, 40
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def reduced(published: dict[str, Any]) -> dict[str, Any]:
    """A config of a few layers, heads, experts and words; heads are as wide, and routed as widely, as published."""
    config = copy.deepcopy(published)
    text = config.get("text_config", config)
    whole = text["num_hidden_layers"]
    # Gemma 3's first full layer is its sixth.
    pattern = text.get("sliding_window_pattern")
    layers = pattern if isinstance(pattern, int) else 4
    # Granite 4's first layer with attention is its eleventh.
    kinds = text.get("layer_types") or ["full_attention"]
    start = max(0, next(layer for layer, kind in enumerate(kinds) if "mamba" not in kind) + 1 - layers)
    for key, value in text.items():
        if isinstance(value, list) and len(value) == whole:
            text[key] = value[start : start + layers]
    heads, kv_heads = text["num_attention_heads"], text["num_key_value_heads"]
    width = text.get("head_dim") or text["hidden_size"] // heads
    text |= {
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kv_heads == heads else min(2, kv_heads),
        # FP8 has blocks of 128; Helium's heads are together as wide as the stream.
        "hidden_size": 128 if "head_dim" in text and text.get("model_type") != "helium" else 4 * width,
        "vocab_size": VOCABULARY,
        **{key: 128 for key in ("intermediate_size", "moe_intermediate_size") if key in text},
        **{key: min(text[key], 16) for key in EXPERTS if key in text},
        **{key: text[key] // 8 for key in ("linear_num_key_heads", "linear_num_value_heads") if key in text},
    }
    if "mamba_n_heads" in text:
        text["mamba_n_heads"] = 2 * text["hidden_size"] // text["mamba_d_head"]
    if "mamba_d_ssm" in text:
        text["mamba_d_ssm"] = 2 * text["hidden_size"]
    if tower := config.get("vision_config"):
        _reduce_tower(tower, text["hidden_size"])
    ids: dict[int, int] = {}
    for part in (text, config):
        for key in sorted(key for key in part if key.endswith(("_token_id", "_token_index"))):
            value = part[key]
            few = [
                ids.setdefault(each, len(ids))
                for each in (value if isinstance(value, list) else [value])
                if each is not None
            ]
            part[key] = few if isinstance(value, list) else few[0] if few else None
    return config


def _reduce_tower(tower: dict[str, Any], hidden_size: int) -> None:
    heads = "num_heads" if "num_heads" in tower else "num_attention_heads"
    tower |= {"hidden_size": 2 * (tower["hidden_size"] // tower[heads]), heads: 2, "intermediate_size": 64}
    tower["depth" if "depth" in tower else "num_hidden_layers"] = 4
    for key, value in tower.items():
        if key.endswith("_indexes"):
            tower[key] = list(range(len(value)))
    if "out_hidden_size" in tower:
        tower["out_hidden_size"] = hidden_size


def save_published(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of this config.json with random weights and a tokenizer."""
    folder.mkdir()
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    (folder / "config.json").write_text(json.dumps(plain))
    torch.manual_seed(0)
    built = AutoConfig.from_pretrained(folder)
    built.dtype = torch.float32
    auto_class(built).from_config(built).float().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    if quantisation := config.get("quantization_config"):
        to_fp8(folder, quantisation)
    tiny_tokenizer().save_pretrained(folder)
    return folder


# How many of the layers slide in the base: windows that `use_sliding_window` switches off, or as long as the context,
# are none.
SLIDING = {
    "EXAONE-4.0-32B": 3,
    "Olmo-3.1-32B-Instruct": 3,
    "Phi-3-mini-4k-instruct": 4,
    "gemma-2-9b-it": 2,
    "gemma-3-12b-it": 5,
    "gemma-3-1b-it": 5,
}
NOT_IN_TRANSFORMERS = r"\(not in Transformers [\d.]+\)"
REFUSED = {
    "DeepSeek-V3": r"deepseek_v3 \(multi-head latent attention\)",
    "GLM-5": r"glm_moe_dsa \(multi-head latent attention\)",
    "Kimi-K2-Instruct": f"kimi_k2 {NOT_IN_TRANSFORMERS}",
    "Llama-4-Scout-17B-16E-Instruct": r"llama4 \(chunked attention\)",
    "MiMo-7B-Base": f"mimo {NOT_IN_TRANSFORMERS}",
    "NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": r"nemotron_h \(layers of attention alone, without an MLP\)",
    "gemma-4-26B-A4B": r"gemma4 \(a wrapper of a language model\)",
    "gpt-oss-20b": r"gpt_oss \(sinks of its own\)",
}
# Differ in sizes alone from another.
ALIKE = ("Mistral-Nemo-Base-2407", "Qwen3-8B", "SmolLM2-1.7B-Instruct", "gemma-2-9b-it", "Phi-3.5-mini-instruct")
SUPPORTED = [
    pytest.param(name, marks=pytest.mark.exhaustive if name in ALIKE else ())
    for name in sorted(PUBLISHED.keys() - REFUSED.keys())
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.jsonl", 90_000)


def recipe(model: Path, text: Path, window: int = WINDOW) -> Recipe:
    settings = {
        "model": str(model),
        "dtype": "float32",
        "device": "cpu",
        "text": {"source": str(text), "sequence_tokens": window + 64},
        "measure": {"windows": [window], "tokens": 2 * window + 128, "retrieval_prompts": 0},
        "heal": {"fit_tokens": 0, "attention_tokens": 2 * window + 128, "tokens": 2 * window + 128},
        "evaluate": {"tasks": [], "perplexity_tokens": window + 64},
        "bench": {"engine": "transformers", "input_tokens": 24, "output_tokens": 8},
    }
    return Recipe.model_validate(settings)


@pytest.mark.parametrize("name", SUPPORTED)
def test_check_says_yes_and_a_plan_applies(name: str, text: Path, tmp_path: Path) -> None:
    published = PUBLISHED[name]["config"]
    folder = save_published(tmp_path / "model", reduced(published))
    job, run = recipe(folder, text), tmp_path / "run"
    base = open_base(job, run, start_runtime(job))
    native = native_window(base.config)
    if native:
        with pytest.raises(ConfigError, match=rf"slide already[^$]+set measure.windows to \[{native}\], and text"):
            check(job, run)
        job = recipe(folder, text, native)
    found = check(job, run)
    assert (found.family, found.layers) == (published["model_type"], base.config.num_hidden_layers)
    types = base_layer_types(base.config)
    assert types.count("sliding_attention") == SLIDING.get(name, 0)
    stock = base.load()
    if "quantization_config" in published:
        plain = {key: value for key, value in reduced(published).items() if key != "quantization_config"}
        original = find_model(str(save_published(tmp_path / "original", plain)), RUNTIME).load().state_dict()
        for key, value in stock.state_dict().items():
            torch.testing.assert_close(value, original[key], atol=1e-5, rtol=2**-4)
    ids = torch.arange(3, 3 + TOKENS)[None]
    wanted = stock(ids).logits
    assert wanted.isfinite().all()
    full = apply_plan(stock, unchanged(base.config))
    assert torch.equal(full(ids).logits, wanted)
    fitted = {"sliding_attention": "ffnfff", "full_attention": "sSnsss"}
    letters = [fitted.get(kind, "xxxxxx")[layer] for layer, kind in enumerate(types)]
    boosted = apply_plan(base.load(), layer_plans("".join(letters), native or WINDOW))(ids).logits
    assert boosted.isfinite().all()
    assert not torch.equal(boosted, wanted)


@pytest.mark.parametrize("name", REFUSED)
def test_check_says_no_and_why(name: str, text: Path, tmp_path: Path) -> None:
    """Before any weight is read."""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]["config"]))
    (tmp_path / "model.safetensors").write_bytes(b"not read")
    message = (
        rf"this model family is not supported\nfound: {REFUSED[name]}\ndo: use a model of a family in `layerboost ls"
    )
    with pytest.raises(ConfigError, match=message):
        check(recipe(tmp_path, text), tmp_path / "run")
    assert PUBLISHED[name]["config"]["model_type"] not in FAMILIES


def test_every_file_says_where_it_is_from() -> None:
    assert len(PUBLISHED) >= 20
    for name, entry in PUBLISHED.items():
        assert entry["checkpoint"].endswith(f"/{name}")
        assert entry["source"]
        assert entry["config"]["model_type"]
