"""The base's own samples as text (`text.source: self`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from layerboost.model.base import Base
from layerboost.recipe import Recipe
from layerboost.text import Generate, sample_documents, samples_missing


def write_samples(recipe: Recipe, run: Path, base: Base) -> None:
    """Write the model's samples to the run folder if the recipe needs them and they are missing.

    Plain ancestral sampling at temperature 1 from the begin-of-text token.
    """
    if "self" not in recipe.text.sources:
        return
    made_from = {"model": base.fingerprint, "seed": recipe.seed, "text": recipe.text.model_dump(mode="json")}
    if samples_missing(recipe.text, run, made_from):
        generate = transformers_generate(base.load(), base.tokenizer, recipe.text.sequence_tokens)
        sample_documents(generate, recipe.text, run, recipe.seed, made_from)


def transformers_generate(model: Any, tokenizer: Any, tokens: int) -> Generate:
    """Return a function that samples texts of at most `tokens` tokens."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

    def generate(count: int, seed: int) -> list[str]:
        torch.manual_seed(seed)
        prompt = torch.full((count, 1), start, device=model.device)
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            # A model's own generation settings would sharpen its text.
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts: list[str] = tokenizer.batch_decode(out[:, 1:], skip_special_tokens=True)
        return texts

    return generate
