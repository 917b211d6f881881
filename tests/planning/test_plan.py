"""The plan stage: what it advises, and that each measurement of a whole plan is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_pipeline import layerboost, write_recipe
from test_selection import with_mlps
from tiny import save_tiny

from layerboost.planning.stage import REPAIRED_KL, run_plan
from layerboost.probes.calibration import MEASURED
from layerboost.recipe import Plan, Recipe
from layerboost.schemas.artifact import fingerprint, write_json
from layerboost.schemas.plan import LayerPlan, read_plan
from layerboost.schemas.run import PLAN, SENSITIVITY


def test_a_knee_is_advised_only_where_less_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_json(tmp_path / SENSITIVITY, with_mlps())
    for fraction, named in ((0.7, False), (0.3, True)):
        caplog.clear()
        plan = run_plan(Recipe(plan=Plan(kv_fraction=1, parameter_fraction=fraction)), tmp_path)
        assert plan.predicted
        assert plan.predicted.quality_loss["kl"] > REPAIRED_KL
        [warning] = [record.getMessage() for record in caplog.records if "beyond what healing" in record.getMessage()]
        assert "raise plan.parameter_fraction" in warning
        assert ("the knee of the curve" in warning) == named


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
