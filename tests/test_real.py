"""The real SmolLM2-135M from PyPI: it speaks, and still does after its layers were changed, saved and loaded.

Its exports are in tests/exporting and tests/vllm_plugin.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from smollm2 import CAPITALS, MODEL, boosted_default
from tiny import RUNTIME

from layerboost.model.base import find_model
from layerboost.model.card import origin_of
from layerboost.model.integrity import check_checkpoint
from layerboost.recipe import Card


@pytest.mark.real
def test_the_embedded_default_speaks_english_before_and_after(tmp_path: Path) -> None:
    folder = boosted_default(tmp_path, sinks=True, heads=True)
    source = find_model(MODEL, RUNTIME, tmp_path)
    model, tokenizer = source.load(), source.tokenizer
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=4, do_sample=False)[0])
    origin = origin_of(source.folder, source.name, Card())
    assert ("license", "apache-2.0") in origin.licence
    check_checkpoint(folder)
    text = tokenizer(CAPITALS * 10, return_tensors="pt")
    out = find_model(str(folder), RUNTIME).load().generate(**text, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, text["input_ids"].shape[1] :])
