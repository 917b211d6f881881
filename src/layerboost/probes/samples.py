"""The base's own samples as text (`text.source: self`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from layerboost.errors import ConfigError
from layerboost.files import write_text
from layerboost.model.base import Base
from layerboost.recipe import Recipe
from layerboost.runtime import Progress
from layerboost.schemas.artifact import json_text, write_json
from layerboost.text import SAMPLES, SAMPLES_FROM

SAMPLES_AT_ONCE = 64


def write_samples(recipe: Recipe, run: Path, base: Base) -> None:
    """Write the model's samples to RUN/self_samples.jsonl if the recipe needs them; resume after a kill.

    Raise ConfigError if those in the folder were sampled from another model or with other settings.
    """
    if "self" not in recipe.text.sources:
        return
    file, record, wanted = run / SAMPLES, run / SAMPLES_FROM, recipe.text.self_samples
    made_from = {"model": base.fingerprint, "seed": recipe.seed, "text": recipe.text.model_dump(mode="json")}
    if record.is_file() and json.loads(record.read_text(encoding="utf-8")) != made_from:
        raise ConfigError(
            f"{file} was sampled from another model or with other settings",
            do=f"use another --run folder, or delete {record} and {file}",
        )
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    if len(lines) >= wanted:
        return
    write_json(record, made_from)
    model = base.load()
    with Progress("sampling text from the model", wanted, "samples") as progress:
        progress.skip(len(lines))
        while len(lines) < wanted:
            count = min(SAMPLES_AT_ONCE, wanted - len(lines))
            torch.manual_seed(recipe.seed * 1_000_003 + len(lines))
            samples = sampled(model, base.tokenizer, count, recipe.text.sequence_tokens)
            lines += [json_text({"text": sample}, SAMPLES) for sample in samples]
            write_text(file, "\n".join(lines) + "\n")
            progress.advance(count)


def sampled(model: Any, tokenizer: Any, count: int, tokens: int) -> list[str]:
    """Return texts of at most `tokens` tokens: ancestral samples at temperature 1 from the begin-of-text token."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
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
    return list(tokenizer.batch_decode(out[:, 1:], skip_special_tokens=True))
