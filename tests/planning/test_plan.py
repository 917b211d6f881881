"""The plan stage where it measures whole plans: each measurement is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_pipeline import layerboost, write_recipe
from test_selection import sensitivity
from tiny import RUNTIME, layer_plans, plan_file, save_tiny

from layerboost.errors import ConfigError, InfeasibleBudget
from layerboost.model.base import find_model
from layerboost.planning.stage import check, run_plan
from layerboost.probes.calibration import MEASURED
from layerboost.recipe import Recipe
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
        settings = {"kv_fraction": fraction, "context_tokens": 100}
        return run_plan(Recipe.model_validate({"plan": settings}), tmp_path).layers

    chosen = plan(0.5)
    assert plan(0.6) != chosen
    assert not (tmp_path / "plan.edited.yaml").exists()
    edited = read_plan(tmp_path / PLAN).model_copy(update={"layers": layer_plans("fsnf")})
    write_plan(tmp_path / PLAN, edited)
    assert plan(0.6) == edited.layers
    assert plan(0.5) == chosen
    again = read_plan(tmp_path / PLAN).model_copy(update={"layers": layer_plans("nfff")})
    write_plan(tmp_path / PLAN, again)
    assert plan(0.6) != chosen
    for name, kept in (("plan.edited.yaml", edited), ("plan.edited.2.yaml", again)):
        assert read_plan(tmp_path / name).layers == kept.layers


def test_an_edited_plan_is_kept_once_though_no_other_is_found(tmp_path: Path) -> None:
    write_json(tmp_path / SENSITIVITY, sensitivity())
    settings = {"kv_fraction": 0.5, "context_tokens": 100}
    plan = run_plan(Recipe.model_validate({"plan": settings}), tmp_path)
    write_plan(tmp_path / PLAN, plan.model_copy(update={"layers": layer_plans("fsnf")}))
    for _ in range(2):
        with pytest.raises(InfeasibleBudget):
            run_plan(Recipe.model_validate({"plan": settings | {"max_kl": -1}}), tmp_path)
    assert [file.name for file in tmp_path.glob("plan.edited*")] == ["plan.edited.yaml"]


def for_llama_cpp(model: Path, **plan: object) -> Recipe:
    bench = {"engine": "llama.cpp"}
    settings = {"kv_fraction": 0.4, "context_tokens": 100} | plan
    return Recipe.model_validate({"model": str(model), "bench": bench, "plan": settings, "measure": {"windows": [16]}})


def test_a_plan_that_llama_cpp_could_not_run_is_named_before_it_is_healed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    qwen, llama = (save_tiny(tmp_path / family, family) for family in ("qwen3", "llama"))
    base, run = find_model(str(qwen), RUNTIME), tmp_path / "run"
    run.mkdir()
    with pytest.raises(ConfigError, match=r"llama.cpp runs no qwen3 with sinks[\s\S]*plan.sinks=false"):
        check(for_llama_cpp(qwen), run, base)
    check(for_llama_cpp(qwen, sinks=False), run, base)
    check(for_llama_cpp(llama), run, find_model(str(llama), RUNTIME))
    write_json(run / SENSITIVITY, sensitivity())
    with caplog.at_level("WARNING", "layerboost"):
        plan = run_plan(for_llama_cpp(qwen), run)
        [warned] = [record.message for record in caplog.records if "could not run this plan" in record.message]
        assert "has a sink" in warned
        assert "plan without sinks (plan.sinks=false): gguf step35 holds that" in warned
        with pytest.raises(ConfigError, match="has a sink"):
            check(for_llama_cpp(qwen), run, base)
        check(for_llama_cpp(qwen, sinks=False), run, base)  # which will choose again
        caplog.clear()
        assert run_plan(for_llama_cpp(qwen, sinks=False), run) != plan
        assert "could not run this plan" not in caplog.text
    check(for_llama_cpp(qwen, sinks=False), run, base)
    with pytest.raises(ConfigError, match=r"llama.cpp runs no qwen3 with sinks"):
        check(for_llama_cpp(qwen), run, base)
    write_plan(run / PLAN, plan_file("fSsf", model=plan.model))
    with pytest.raises(ConfigError, match="layer 1 has a sink"):
        check(for_llama_cpp(qwen, sinks=False), run, base)
