"""Plans at equal cost, on a tiny model, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_pipeline import layerboost, write_recipe
from tiny import RUNTIME, save_tiny

from layerboost.artifacts import LayerPlan, PlanFile, read_plan
from layerboost.compare import Unsuited, check_all_sliding, rows
from layerboost.model.base import find_model
from layerboost.recipe import load_recipe

ROWS = list(rows(load_recipe([], {})))


@pytest.mark.pipeline
def test_every_plan_is_compared_at_equal_cost_and_goes_on(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path, save_tiny(tmp_path / "model", layers=6), measure={"windows": [8], "retrieval_prompts": 0}
    )
    run = tmp_path / "run"
    changes = ["--set", "evaluate.retrieval_tokens=[128]", "--set", "evaluate.retrieval_prompts=2"]
    layerboost("measure", "--config", recipe, "--run", run)
    found = json.loads(layerboost("compare", "--config", recipe, "--run", run, "--json", *changes).stdout)
    assert [row["name"] for row in found["rows"]] + list(found["left_out"]) == ROWS
    assert found["left_out"] == {}
    assert all(row["kv_fraction"] <= 0.4 for row in found["rows"])
    assert found["rows"][0]["lead"] is None
    folder = run / "compare"
    assert read_plan(folder / "all_sliding" / "plan.yaml").window == 25
    assert {row["name"]: row["sinks"] for row in found["rows"]}["all_sliding_sink"] == 6
    evaluated = json.loads((folder / "eval" / "comparison.json").read_text())
    assert set(evaluated["models"]) == {
        "base",
        *(f"{row}-{stage}" for row in ROWS for stage in ("converted", "healed")),
    }
    for row in found["rows"][1:]:
        # The lead is the difference of the two models' own differences from the base.
        for key, means in (
            ("kl", {name: text["kl"]["mean"] for name, text in evaluated["perplexity"].items()}),
            ("average", {name: each["mean"] for name, each in evaluated["average"]["difference"].items()}),
        ):
            assert row["lead"][key]["mean"] == pytest.approx(means["ours-healed"] - means[f"{row['name']}-healed"])
    healed = json.loads((folder / "ours" / "heal" / "metrics.jsonl").read_text().splitlines()[-1])
    assert healed["tokens"] == 768
    page = (folder / "comparison.md").read_text()
    assert all(f"| {row} | healed |" in page for row in ROWS)
    assert (folder / "comparison.html").stat().st_size < 6_000_000
    made = {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")}
    # The settings of the first call lie in the run's recipe.
    assert json.loads(layerboost("compare", "--run", run, "--json").stdout) == found
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.safetensors")} == made


@pytest.mark.parametrize(
    ("family", "sequence_tokens", "sink", "why"),
    [
        ("llama", 25, True, "sinks are fitted on text longer than the window of 25"),
        ("gemma2", 64, False, "layer 0 already slides"),
        ("llama", 26, True, None),
        ("llama", 25, False, None),
    ],
)
def test_what_cannot_slide_is_known_before_anything_is_healed(
    tmp_path: Path, family: str, sequence_tokens: int, sink: bool, why: str | None
) -> None:
    base = find_model(str(save_tiny(tmp_path / "model", family)), RUNTIME)
    config, info = base.config, base.info
    slides = [LayerPlan(layer=n, attention="sliding", window=25, sink=sink) for n in range(info.layers)]
    plan = PlanFile(model=info, method="all sliding", layers=slides)
    if why is None:
        check_all_sliding(plan, config, sequence_tokens)
        return
    with pytest.raises(Unsuited, match=why):
        check_all_sliding(plan, config, sequence_tokens)


def test_without_sensitivities_the_command_that_makes_them_is_named(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "model"))
    ended = layerboost("compare", "--config", recipe, "--run", tmp_path / "run", check=False)
    assert ended.returncode == 2
    assert "make it with `layerboost measure`" in ended.stderr
