from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from tiny import RUNTIME, layer_plans, save_text, save_tiny

from layerboost.model.base import find_model
from layerboost.pipeline import run_stage
from layerboost.recipe import Recipe, parse_recipe
from layerboost.schemas.plan import PlanFile, write_plan
from layerboost.schemas.run import PLAN


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    values = {
        "model": str(folder / "model"),
        "text": {"source": str(folder / "text.jsonl"), "sequence_tokens": 48},
        "measure": {"windows": [8], "tokens": 192},
        **changes,
    }
    return parse_recipe(values, "the test")


def test_a_checkpoint_of_the_same_plan_stays_and_one_of_another_dtype_does_not(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", layers=3)
    save_text(tmp_path / "text.jsonl")
    source, run = find_model(str(tmp_path / "model"), RUNTIME), tmp_path / "run"
    run.mkdir()
    info = source.info
    write_plan(run / PLAN, PlanFile(model=info, method="test", layers=layer_plans("fSn", 8)))
    weights = run / "converted" / "model.safetensors"
    for dtype, made in (("float32", True), ("float32", False), ("bfloat16", True)):
        before = weights.stat().st_mtime_ns if weights.exists() else 0
        run_stage("convert", recipe_of(tmp_path, dtype=dtype), run)
        assert (weights.stat().st_mtime_ns > before) == made
        assert {str(value.dtype) for value in load_file(weights).values()} == {f"torch.{dtype}"}
