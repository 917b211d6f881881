"""Tiny random boosted checkpoints with a word-level tokenizer, built on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from layerboost.artifacts import LayerPlan
from layerboost.model.surgery import apply_plan

VOCABULARY = 200
WINDOW = 16
HEADS = 4


def layer_plans(letters: str) -> list[LayerPlan]:
    """One letter a layer: f(ull), s(liding), S(liding with a sink), n(one)."""
    kinds: dict[str, Any] = {
        "f": {"attention": "full"},
        "s": {"attention": "sliding", "window": WINDOW},
        "S": {"attention": "sliding", "window": WINDOW, "sink": True},
        "n": {"attention": "none"},
    }
    return [LayerPlan(layer=index, **kinds[letter]) for index, letter in enumerate(letters)]


def save_tiny(folder: Path, model_type: str, letters: str) -> Path:
    """Save a random model of a family with the plan `letters`; "" is a stock model of 4 full layers."""
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[model_type](
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=len(letters) or 4,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        # Large enough that attention matters to the logits.
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    if letters:
        plans = layer_plans(letters)
        apply_plan(model, plans, {plan.layer: torch.randn(HEADS) * 2 for plan in plans if plan.sink})
    model.save_pretrained(folder)
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{index}": index for index in range(3, VOCABULARY)}}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    return folder
