"""The plan stage where it measures whole plans: each measurement is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_pipeline import layerboost, write_recipe
from test_selection import sensitivity
from tiny import layer_plans, save_tiny

from layerboost.planning.stage import run_plan
from layerboost.probes.calibration import MEASURED
from layerboost.recipe import parse_recipe
from layerboost.schemas.artifact import fingerprint, write_json
from layerboost.schemas.plan import LayerPlan, read_plan, write_plan
from layerboost.schemas.run import PLAN, SENSITIVITY


@pytest.mark.pipeline
def test_plans_are_measured_as_a_whole_and_every_measurement_is_kept(tmp_path: Path) -> None:
    write_recipe(tmp_path, save_tiny(tmp_path / "model"))
    run = tmp_path / "run"
    layerboost("measure", "--config", tmp_path / "recipe.yaml", "--run", run)

    def plan() -> list[LayerPlan]:
        layerboost("plan", "--run", run, "--set", "plan.method=greedy", "--set", "plan.kv_fraction=0.6")
        return read_plan(run / PLAN).layers

    found = plan()
    lines = (run / MEASURED).read_text().splitlines()
    measured = {entry["plan"] for entry in map(json.loads, lines)}
    assert fingerprint([entry.key() for entry in found]) in measured
    # All of it was measured: a second search asks the model for nothing.
    (run / PLAN).unlink()
    assert plan() == found
    assert (run / MEASURED).read_text().splitlines() == lines
    # A killed search goes on from the plans it has measured.
    (run / MEASURED).write_text("\n".join(lines[:3]) + "\n")
    (run / PLAN).unlink()
    assert plan() == found
    assert (run / MEASURED).read_text().splitlines()[:3] == lines[:3]


def test_an_edited_plan_is_not_lost_when_another_is_chosen(tmp_path: Path) -> None:
    write_json(tmp_path / SENSITIVITY, sensitivity())

    def plan(fraction: float) -> list[LayerPlan]:
        return run_plan(
            parse_recipe({"plan": {"kv_fraction": fraction, "context_tokens": 100}}, "test"), tmp_path
        ).layers

    chosen = plan(0.5)
    assert plan(0.6) != chosen
    assert not (tmp_path / "plan.edited.yaml").exists()
    edited = read_plan(tmp_path / PLAN).model_copy(update={"layers": layer_plans("fsnf")})
    write_plan(tmp_path / PLAN, edited)
    assert plan(0.6) == edited.layers
    assert plan(0.5) == chosen
    assert read_plan(tmp_path / "plan.edited.yaml").layers == edited.layers
