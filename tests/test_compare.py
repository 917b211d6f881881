"""Plans side by side, on a tiny model, through the command line; and the rows that ship."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_pipeline import layerboost, refused, write_recipe
from tiny import RUNTIME, save_tiny

from layerboost.compare import (
    SHIPPED,
    NotApplicable,
    check_applicable,
    every_layer_plan,
    read_rows,
    row_recipe,
    with_settings,
)
from layerboost.errors import ConfigError
from layerboost.model.base import find_model
from layerboost.planning.choices import metric_limits
from layerboost.recipe import load_recipe
from layerboost.schemas.comparison import EveryLayer
from layerboost.schemas.plan import read_plan

ROOT = Path(__file__).parents[1]
NOT_HEALED = {"heal.fit_tokens": 0, "heal.attention_tokens": 0, "heal.tokens": 0}


def write_rows(file: Path, **content: Any) -> Path:
    file.write_text(yaml.safe_dump({"schema_version": 1, "reference": "ours", **content}, sort_keys=False))
    return file


@pytest.mark.pipeline
def test_rows_are_compared_and_finished_ones_are_kept(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "model"), measure={"windows": [8], "retrieval_prompts": 0})
    rows = write_rows(
        tmp_path / "rows.yaml",
        set={"evaluate.retrieval_tokens": [128], "evaluate.retrieval_prompts": 2},
        evaluations={
            "quality": {},
            "text": {"rows": ["ours", "sliding"], "set": {"evaluate.tasks": [], "evaluate.retrieval_tokens": []}},
        },
        rows={
            "ours": {},
            "one_stage": {"plan": "ours", "one_stage": True},
            "random": {"set": {"plan.method": "random"}},
            "sliding": {"plan": {"attention": "sliding", "sink": True}, "set": NOT_HEALED},
            "tight": {"set": {"plan.method": "uniform", "plan.kv_fraction": 0.01}},
            "wide": {"plan": {"attention": "sliding", "window": 48, "sink": True}},
            "as_wide": {"plan": "wide"},
            "all_thin": {"plan": {"mlp": "thin"}},
        },
    )
    run = tmp_path / "run"
    shown = layerboost("compare", rows, "--config", recipe, "--run", run, "--json").stdout
    found = json.loads(shown)
    assert {name: row["models"] for name, row in found["rows"].items()} == {
        "ours": ["converted", "healed"],
        "one_stage": ["healed"],
        "random": ["converted", "healed"],
        "sliding": ["converted"],
    }
    assert list(found["left_out"]) == ["tight", "wide", "as_wide", "all_thin"]
    assert all(row["kv_fraction"] <= 0.4 for row in found["rows"].values())
    assert found["rows"]["sliding"]["window"] == 25  # 0.4 of a context of 64
    assert found["rows"]["sliding"]["sinks"] == 4
    quality, text = found["evaluations"]["quality"], found["evaluations"]["text"]
    assert list(text["models"]) == ["base", "ours-converted", "ours-healed", "sliding-converted"]
    against = {name: row["against"] for name, row in found["rows"].items()}
    assert {name: list(each) for name, each in against.items()} == {
        "ours": [],
        "one_stage": ["quality"],
        "random": ["quality"],
        "sliding": ["quality", "text"],
    }
    # What is compared is the difference of the two models' own differences from the base.
    kl = {name: part["kl"]["mean"] for name, part in quality["perplexity"].items()}
    assert against["random"]["quality"]["kl"]["mean"] == pytest.approx(kl["random-healed"] - kl["ours-healed"])
    average = {name: part["mean"] for name, part in quality["average"]["difference"].items()}
    expected = average["sliding-converted"] - average["ours-healed"]
    assert against["sliding"]["quality"]["average"]["mean"] == pytest.approx(expected)
    exact = {name: [group["models"][name]["value"] for group in quality["retrieval"]["groups"]] for name in kl}
    change = sum(exact["one_stage-healed"]) - sum(exact["ours-healed"])
    assert against["one_stage"]["quality"]["retrieval"]["mean"] == pytest.approx(change / len(exact["base"]))
    # The same tokens of healing, in one stage.
    steps = [json.loads(line) for line in (run / "compare" / "one_stage" / "heal" / "metrics.jsonl").open()]
    assert {step["stage"] for step in steps} == {"lora"}
    assert found["rows"]["one_stage"]["healing_tokens"] == steps[-1]["tokens"] == 384 + 768
    page = (run / "compare" / "comparison.md").read_text()
    assert page.count("\n| ours | ") == 2
    assert "\n| base | – | – | 100.0 % | 100.0 % | – |" in page
    assert "`as_wide` is skipped: its plan is that of wide, which is skipped." in page

    made = {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")}
    assert layerboost("compare", rows, "--run", run, "--json").stdout == shown
    random = run / "compare" / "random"
    more = write_rows(
        tmp_path / "more.yaml",
        set={"evaluate.tasks": []},
        rows={
            "ours": {},
            "whole": {"run": str(random)},
            "plan": {"plan": str(random / "plan.yaml"), "set": NOT_HEALED},
            "one_stage": {"plan": str(random / "plan.yaml"), "set": NOT_HEALED},
        },
    )
    again = json.loads(layerboost("compare", more, "--run", run, "--json").stdout)
    found_again = {name: part["kl"]["mean"] for name, part in again["evaluations"][""]["perplexity"].items()}
    assert again["rows"]["plan"]["models"] == ["converted"]
    assert found_again["whole-healed"] == kl["random-healed"]
    # Converted again, no longer the model of the first row, which stays.
    assert found_again["plan-converted"] == found_again["one_stage-converted"] == pytest.approx(kl["random-converted"])
    assert {file: file.stat().st_mtime_ns for file in made} == made


@pytest.mark.exhaustive
@pytest.mark.pipeline
def test_linear_attention_next_to_windows(tmp_path: Path) -> None:
    """The kinds of rows of benchmarks/linearisation.yaml, with a few steps each."""
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "model"), measure={"windows": [8], "retrieval_prompts": 0})
    linear = {"attention": "linear", "sink": False, "feature_map": "lolcats"}
    rows = write_rows(
        tmp_path / "rows.yaml",
        set={"evaluate.tasks": [], "heal.fit_tokens": 0},
        rows={
            "ours": {"set": NOT_HEALED},
            "lolcats": {"plan": {"attention": "linear", "window": 8, "feature_map": "lolcats"}},
            "lolcats-window": {"window_only": "lolcats"},
            "liger": {
                "plan": {"attention": "linear", "window": 8, "feature_map": "liger"},
                "set": {"heal.attention_tokens": 0},
            },
            "liger-window": {"window_only": "liger"},
            "delta": {"plan": {"attention": "linear", "window": 8, "feature_map": "delta"}},
            "delta-window": {"window_only": "delta"},
            "lolcats-ours": {"plan": "ours", "sliding": linear},
            "ours-12": {"plan": "ours", "sliding": {"window": 12}, "set": NOT_HEALED},
            "wrong": {"plan": "ours", "sliding": {"attention": "linear"}},
        },
    )
    run = tmp_path / "run"
    found = json.loads(layerboost("compare", rows, "--config", recipe, "--run", run, "--json").stdout)
    assert found["left_out"] == {"wrong": "its sliding layers cannot be replaced"}
    plans = {
        name: read_plan(run / "compare" / name / "plan.yaml").layers for name in ("ours", "lolcats-ours", "ours-12")
    }
    sliding = [entry.layer for entry in plans["ours"] if entry.window]
    assert sliding
    assert [entry.layer for entry in plans["lolcats-ours"] if entry.feature_map] == sliding
    assert [(entry.layer, entry.sink) for entry in plans["ours-12"] if entry.window == 12] == [
        (entry.layer, entry.sink) for entry in plans["ours"] if entry.window
    ]
    models = found["evaluations"][""]["perplexity"]
    assert models["lolcats-healed"]["kl"]["mean"] < models["lolcats-converted"]["kl"]["mean"]
    # The same weights without the state: another model, at fewer bytes.
    for name in ("lolcats", "liger", "delta"):
        assert models[f"{name}-window-converted"]["kl"]["mean"] != models[f"{name}-healed"]["kl"]["mean"]
        cut, healed = (
            run / "compare" / folder / "model.safetensors" for folder in (f"{name}-window/converted", f"{name}/healed")
        )
        weights = load_file(healed)
        assert all(torch.equal(value, weights[key]) for key, value in load_file(cut).items())
        assert found["rows"][f"{name}-window"]["kv_fraction"] < found["rows"][name]["kv_fraction"]
        assert found["rows"][f"{name}-window"]["layers"] == {"full": 0, "sliding": 4, "none": 0}


@pytest.mark.exhaustive
@pytest.mark.pipeline
def test_attention_mlps_and_whole_layers_at_equal_parameters(tmp_path: Path) -> None:
    """The kinds of rows of benchmarks/components.yaml."""
    measure = {"windows": [8], "retrieval_prompts": 0, "components": ["attention", "mlp"]}
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "model"), measure=measure)
    rows = write_rows(
        tmp_path / "rows.yaml",
        set={"evaluate.tasks": [], "plan.kv_fraction": 1, "plan.parameter_fraction": 0.7, **NOT_HEALED},
        rows={
            "ours": {},
            "mlp": {"set": {"plan.components": ["mlp"]}},
            "attention": {"set": {"plan.components": ["attention"]}},
            "uniform": {"plan": {"mlp": "thin"}},
            "shortgpt": {"set": {"plan.method": "block_influence"}},
            "joint": {"set": {"plan.method": "cosine", "plan.components": ["attention", "mlp"]}},
            "none_left": {"set": {"plan.components": ["attention"], "plan.parameter_fraction": 0.1}},
        },
    )
    run = tmp_path / "run"
    found = json.loads(layerboost("compare", rows, "--config", recipe, "--run", run, "--json").stdout)
    assert list(found["left_out"]) == ["none_left"]
    assert all(row["parameter_fraction"] <= 0.7 for row in found["rows"].values())
    assert found["rows"]["mlp"]["layers"]["full"] == 4
    assert found["rows"]["attention"]["mlps"] == {}
    [width] = {entry.mlp_width for entry in read_plan(run / "compare" / "uniform" / "plan.yaml").layers}
    base = find_model(str(tmp_path / "model"), RUNTIME).info
    # One neuron more per layer would be above the budget.
    above = found["rows"]["uniform"]["parameter_fraction"] + 4 * base.neuron_parameters / base.parameters
    assert width
    assert above > 0.7
    whole = found["rows"]["shortgpt"]
    assert whole["mlps"] == {"none": whole["layers"]["none"]}
    assert "; MLPs: 4 thin" in (run / "compare" / "comparison.md").read_text()


@pytest.mark.parametrize("file", [*SHIPPED.glob("*.yaml"), *(ROOT / "benchmarks").glob("*.yaml")], ids=lambda f: f.stem)
def test_the_rows_that_ship_are_valid(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    rows = read_rows(str(file))
    recipe = with_settings(load_recipe([], {}), rows.set)
    for each in rows.evaluations.values():
        with_settings(recipe, each.set)
    known: list[str] = []
    for name, row in rows.rows.items():
        row_recipe(recipe, row)
        if isinstance(row.plan, str) and row.plan not in known:
            read_plan(Path(row.plan))
        known.append(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": {"other": {}}}, "not among the rows: ours"),
        ({"rows": {"ours": {"plans": "x"}}}, "rows.ours.plans: Extra inputs"),
        ({"rows": {"ours": {"window_only": "ours"}}}, "rows.ours.window_only: ours is not an earlier row"),
        ({"rows": {"ours": {"set": {"heal.token": 5}}}}, "did you mean heal.tokens"),
        ({"rows": {"ours": {"set": {"seed.x": 5}}}}, "unknown recipe key: seed.x"),
    ],
)
def test_a_mistake_in_the_rows_is_named_before_anything_is_done(
    tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    rows = write_rows(tmp_path / "rows.yaml", **content)
    assert message in refused("compare", rows, "tiny", "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_rows_are_answered_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match="no such rows"):
        read_rows("equal-costs")
    assert read_rows("equal-cost").reference == "ours"


def test_the_default_rows_fit_any_recipe() -> None:
    """Controls refuse KV heads, limits and components, which only the recipe's own plan has."""
    settings = {"plan.unit": "kv_head", "plan.max_kl": 0.1, "plan.components": ["attention"]}
    recipe = with_settings(load_recipe([], {}), settings)
    plans = [row_recipe(recipe, row).plan for row in read_rows("equal-cost").rows.values()]
    controls = [plan for plan in plans if plan.method != "budget"]
    assert {plan.method for plan in controls} == {"threshold", "cosine", "uniform", "random"}
    for plan in controls:
        assert plan.unit == "layer"
        assert not metric_limits(plan)
        assert plan.method == "cosine" or plan.components is None


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
    plan = every_layer_plan(EveryLayer(attention="sliding", window=25, sink=sink), base, load_recipe([], {}))
    if why is None:
        check_applicable(plan, base.config, sequence_tokens)
        return
    with pytest.raises(NotApplicable, match=why):
        check_applicable(plan, base.config, sequence_tokens)
