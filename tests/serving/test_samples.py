"""The model's own samples, by Transformers and by vLLM."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tiny import save_tiny, tiny_model, tiny_tokenizer

from layerboost.errors import ConfigError
from layerboost.model.checkpoint import find_model, load_tokenizer
from layerboost.recipe import Text, load_recipe
from layerboost.runtime import Runtime
from layerboost.serving import samples
from layerboost.serving.samples import transformers_generate, write_samples
from layerboost.text import SAMPLES, load_tokens, sample_documents, samples_missing

TOKENIZER = tiny_tokenizer()


def test_the_models_own_samples(tmp_path: Path) -> None:
    text = Text(source="self", sequence_tokens=16, self_samples=80)
    made_from = {"model": "tiny"}
    generate = transformers_generate(tiny_model(layers=2), TOKENIZER, 16)
    assert samples_missing(text, tmp_path, made_from)
    sample_documents(generate, text, tmp_path, 0, made_from)
    whole = (tmp_path / SAMPLES).read_text()
    assert len(whole.splitlines()) == 80
    assert not samples_missing(text, tmp_path, made_from)
    (tmp_path / SAMPLES).write_text("".join(line + "\n" for line in whole.splitlines()[:64]))
    assert samples_missing(text, tmp_path, made_from)
    sample_documents(generate, text, tmp_path, 0, made_from)
    assert (tmp_path / SAMPLES).read_text() == whole
    with pytest.raises(ConfigError, match="sampled from another model"):
        samples_missing(text, tmp_path, {"model": "other"})
    assert load_tokens(text, TOKENIZER, "train", 64, run=tmp_path).ids.shape == (4, 16)


@pytest.mark.server
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_samples_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = find_model(str(save_tiny(tmp_path / "model", layers=2)))
    values = {"model": str(source.folder), "text.source": "self", "text.sequence_tokens": 16, "text.self_samples": 70}
    recipe, tokenizer = load_recipe([], values), load_tokenizer(source)
    runtime = Runtime(torch.device("cpu"), torch.float32)
    with monkeypatch.context() as only_vllm:
        only_vllm.setattr(samples, "load_model", None)
        write_samples(recipe, tmp_path, source, tokenizer, runtime)
    lines = [json.loads(line)["text"] for line in (tmp_path / SAMPLES).read_text().splitlines()]
    assert len(lines) == 70
    assert len(set(lines)) > 60
    assert all(1 <= len(line.split()) <= 16 for line in lines if line)
    # Where vLLM fails, Transformers goes on from where it stopped.
    (tmp_path / SAMPLES).write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:64]))
    monkeypatch.setattr(samples.sys, "executable", "/bin/false")
    write_samples(recipe, tmp_path, source, tokenizer, runtime)
    assert len((tmp_path / SAMPLES).read_text().splitlines()) == 70
