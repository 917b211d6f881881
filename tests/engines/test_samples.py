"""The model's own samples, by Transformers and by vLLM."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from offline import Vllm
from tiny import save_tiny, tiny_model, tiny_tokenizer

from layerboost.engines import samples
from layerboost.engines.samples import transformers_generate, write_samples
from layerboost.errors import ConfigError
from layerboost.model.base import Base, find_model
from layerboost.recipe import Text, load_recipe
from layerboost.runtime import Runtime
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


def sampled(folder: Path, run: Path) -> list[str]:
    """Have the run folder's samples written; return their texts."""
    values = {"model": str(folder), "text.source": "self", "text.sequence_tokens": 16, "text.self_samples": 70}
    runtime = Runtime(torch.device("cpu"), torch.float32)
    write_samples(load_recipe([], values), run, find_model(str(folder), runtime))
    return [json.loads(line)["text"] for line in (run / SAMPLES).read_text().splitlines()]


def check_samples(lines: list[str]) -> None:
    assert len(lines) == 70
    assert len(set(lines)) > 60
    assert all(1 <= len(line.split()) <= 16 for line in lines if line)


def test_where_vllm_fails_transformers_goes_on_from_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "model", layers=2)
    monkeypatch.setattr(samples, "vllm_version", lambda: "0.0")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    lines = sampled(folder, tmp_path)
    check_samples(lines)
    (tmp_path / SAMPLES).write_text("".join(json.dumps({"text": line}) + "\n" for line in lines[:64]))
    assert sampled(folder, tmp_path) == lines


@pytest.mark.server
def test_vllm_samples(vllm: Vllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def in_the_session(argv: list[str], *_: object, **__: object) -> AbstractContextManager[subprocess.Popen[bytes]]:
        assert vllm.ask({"samples": argv[-1]}) is None
        return subprocess.Popen(["true"])

    monkeypatch.setattr(samples, "guarded", in_the_session)
    monkeypatch.setattr(Base, "load", None)
    check_samples(sampled(save_tiny(tmp_path / "model", layers=2), tmp_path))


@pytest.mark.server
@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_samples_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Base, "load", None)
    check_samples(sampled(save_tiny(tmp_path / "model", layers=2), tmp_path))
