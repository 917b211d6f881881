"""GGUF files as MODEL: what Transformers leaves out of them is put back, or the file is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tiny import RUNTIME, plan_file, save_checkpoint, tiny_config, tiny_model
from tokenizers import Regex, Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from layerboost.errors import ConfigError
from layerboost.exporting.gguf_tokenizer import SPLITTERS
from layerboost.exporting.stage import run_export
from layerboost.model.base import find_model, open_base
from layerboost.model.gguf_config import check_every_tensor, complete_config
from layerboost.model.surgery import apply_plan
from layerboost.recipe import Recipe
from layerboost.text import opening_ids

IDS = torch.arange(5, 200)[None]
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 3's: a text begins with a token, and words are taken whole: no merge makes `aab`."""
    words = ["<s>", "</s>", "a", "b", "ab", "aab", *(f"t{index}" for index in range(6, 257))]
    bpe = Tokenizer(BPE({word: index for index, word in enumerate(words)}, [("a", "b")], ignore_merges=True))
    [pattern] = [pattern for (pattern, _), name in SPLITTERS.items() if name == "llama-bpe"]
    bpe.pre_tokenizer = Sequence(
        [Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def exported(folder: Path, **changes: Any) -> tuple[Path, torch.Tensor]:
    """A Llama as GGUF, and its logits."""
    model = tiny_model("llama", 3, vocab_size=257, **changes)
    logits = model(IDS).logits.detach()
    plan = plan_file("fff")
    save_checkpoint(folder, apply_plan(model, plan.layers), plan, llama3_tokenizer())
    return Path(run_export(folder, "gguf", kind="f32").folder), logits


@torch.no_grad()
def test_the_frequencies_of_llama_3_are_scaled_as_in_the_model(tmp_path: Path) -> None:
    """Llama 3.1 and later: llama.cpp writes them as a tensor, which Transformers passes over."""
    file, logits = exported(tmp_path / "llama", rope_parameters=LLAMA3)
    assert any(tensor.name == "rope_freqs.weight" for tensor in gguf.GGUFReader(file).tensors)
    base = find_model(str(file), RUNTIME)
    assert base.config.rope_parameters == LLAMA3
    assert torch.allclose(base.load()(IDS).logits, logits, atol=1e-5)


def test_frequencies_of_another_form_are_refused(tmp_path: Path) -> None:
    file, _ = exported(tmp_path / "llama", rope_parameters=LINEAR)
    with pytest.raises(ConfigError, match=r"cannot take from a GGUF file\n.*scaled by rope_freqs.weight"):
        find_model(str(file), RUNTIME).config  # noqa: B018


def test_text_has_the_tokens_of_the_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Llama 3 and Gemma fail without their begin-of-text token, which Transformers does not read from GGUF."""
    file, logits = exported(tmp_path / "llama")
    base, run = find_model(str(file), RUNTIME), tmp_path / "run"
    unpacked = open_base(Recipe(model=str(file)), run, RUNTIME)
    assert (base.gguf, unpacked.gguf, unpacked.folder) == (file.name, None, run / "base")
    for tokenizer in (base.tokenizer, unpacked.tokenizer):
        assert opening_ids(tokenizer) == [0]
        assert tokenizer("aab bab")["input_ids"] == llama3_tokenizer()("aab bab")["input_ids"]
    assert torch.allclose(unpacked.load()(IDS).logits, logits, atol=1e-5)
    assert "splits text" not in caplog.text


def test_a_text_begins_without_a_token_if_the_file_says_so(tmp_path: Path) -> None:
    file, _ = exported(tmp_path / "llama")
    says = gguf.GGUFReader(file, "r+").get_field("tokenizer.ggml.add_bos_token")
    assert says
    says.parts[says.data[0]][0] = False
    assert opening_ids(find_model(str(file), RUNTIME).tokenizer) == []


def write(file: Path, architecture: str, settings: dict[str, Any], *tensors: str) -> Path:
    """A GGUF file of settings alone, and of large tensors of these names."""
    writer = gguf.GGUFWriter(file, architecture)
    for key, value in settings.items():
        match value:
            case float():
                writer.add_float32(f"{architecture}.{key}", value)
            case int():
                writer.add_uint32(f"{architecture}.{key}", value)
            case _:
                writer.add_string(f"{architecture}.{key}", value)
    for name in (*tensors, "token_embd.weight"):
        writer.add_tensor(name, np.ones((1000, 1000), np.float32))
    for put in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        put()
    writer.close()
    return file


Value = Callable[[Any], Any]
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 128}
COMPLETED: dict[str, tuple[str, dict[str, Any], Value, Any]] = {
    "starcoder2": ("starcoder2", {"rope.freq_base": 999999.0}, lambda c: c.rope_parameters["rope_theta"], 999999.0),
    "phi3": ("phi3", {"attention.sliding_window": 100}, lambda c: c.sliding_window, 100),
    "partial": ("phi3", {"rope.dimension_count": 24}, lambda c: c.rope_parameters["partial_rotary_factor"], 0.75),
    "gemma2": ("gemma2", {"attn_logit_softcapping": 7.0}, lambda c: c.attn_logit_softcapping, 7.0),
    "linear": (
        "qwen2", {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0},
        lambda c: (c.rope_parameters["rope_type"], c.rope_parameters["factor"]), ("linear", 3.0),
    ),
    "gemma3": (
        "gemma3_text", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        lambda c: [c.rope_parameters[kind]["rope_type"] for kind in ("full_attention", "sliding_attention")],
        ["linear", "default"],
    ),
    "yarn": (
        "qwen2", YARN | {"rope.scaling.yarn_beta_fast": 16.0},
        lambda c: [c.rope_parameters[key] for key in ("rope_type", "original_max_position_embeddings", "beta_fast")],
        ["yarn", 128, 16.0],
    ),
    "no window": ("phi3", {"attention.sliding_window": 0}, lambda c: c.sliding_window, None),
    "nothing new": (
        "qwen2", {"rope.scaling.type": "none", "attention.sliding_window": 1 << 20, "rope.dimension_count": 32},
        lambda c: c == tiny_config("qwen2", 2), True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPLETED)
def test_settings_that_transformers_leaves_out(case: str, tmp_path: Path) -> None:
    family, settings, value, expected = COMPLETED[case]
    config = tiny_config(family, 2)
    complete_config(config, write(tmp_path / "model.gguf", family, settings))
    assert value(config) == expected


@pytest.mark.parametrize(
    ("family", "settings", "found"),
    [
        ("llama", {"attention.scale": 0.1}, "attention.scale 0.1"),
        ("llama", {"attention.sliding_window": 16}, "a sliding window of 16"),
        ("llama", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30"),
        ("qwen2", {"rope.dimension_count": 16}, "rotary embeddings of 16 of 32 dimensions"),
        ("qwen2", {"rope.scaling.type": "longrope"}, "scaled by longrope"),
        ("qwen2", YARN | {"rope.scaling.attn_factor": 0.5}, "scaled by yarn"),
        ("qwen2", {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, "scaled by yarn"),
    ],
)
def test_settings_that_a_config_cannot_hold(family: str, settings: Any, found: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=found):
        complete_config(tiny_config(family, 2), write(tmp_path / "model.gguf", family, settings))


def test_tensors_that_are_not_loaded_are_noticed(tmp_path: Path) -> None:
    file = write(tmp_path / "model.gguf", "llama", {}, "blk.0.attn_q.bias")
    with pytest.raises(ConfigError, match="weights that are not in a llama model"):
        check_every_tensor(tiny_model(layers=2), file)
