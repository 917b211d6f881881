"""The measure stage through the command line: tasks, traffic, changed models, ranks, bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_pipeline import layerboost, refused, sets, write_recipe
from tiny import RUNTIME, layer_plans, save_tiny, tiny_model, tiny_tokenizer
from tiny_bench import rows, write_jsonl

from layerboost.errors import ConfigError
from layerboost.measuring.stage import check
from layerboost.model.base import find_model
from layerboost.pipeline import run_stage
from layerboost.planning.stage import check as check_plan_stage
from layerboost.probes.calibration import open_measured
from layerboost.recipe import load_recipe, parse_recipe
from layerboost.schemas.plan import read_plan
from layerboost.schemas.run import SENSITIVITY


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, validation items, traffic and a recipe."""
    folder = tmp_path_factory.mktemp("measure")
    write_jsonl(folder / "arc_easy_validation.jsonl", rows("arc_easy", 9))
    words = [" ".join(f"w{3 + (5 * row + word) % 190}" for word in range(20 + row)) for row in range(6)]
    write_jsonl(folder / "traffic.jsonl", [{"prompt": text, "answer": text[:30]} for text in words])
    write_recipe(folder, save_tiny(folder / "model"), measure={"tasks": ["arc_easy"], "task_items": 7})
    return folder


def measured(folder: Path, run: Path, *settings: str) -> dict[str, Any]:
    layerboost("measure", "--config", folder / "recipe.yaml", "--run", run, *sets(*settings))
    return dict(json.loads((run / SENSITIVITY).read_text()))


def test_tasks_are_measured_and_another_list_is_refused(folder: Path, tmp_path: Path) -> None:
    found = measured(folder, tmp_path)
    assert found["settings"]["tasks"] == ["arc_easy"]
    assert list(found["base_tasks"]) == ["arc_easy"]
    for layer in found["layers"]:
        assert {variant["scores"]["benchmark"]["count"] for variant in layer["variants"]} == {7}
    for setting in ("measure.task_items=6", "measure.tasks=[]"):
        assert "was made from something else" in refused("measure", "--run", tmp_path, "--set", setting)
    told = refused("measure", "--run", tmp_path, "--set", "measure.tasks=[piqa]")
    assert "layers cannot be chosen on task piqa" in told


def test_traffic_takes_the_place_of_the_calibration_text(folder: Path, tmp_path: Path) -> None:
    traffic = f"measure.traffic={folder / 'traffic.jsonl'}"
    found = measured(folder, tmp_path, traffic, "measure.tasks=[]")
    assert found["sequences"] == 6
    assert found["base_tasks"] is None
    answers = [json.loads(line)["answer"].split() for line in (folder / "traffic.jsonl").read_text().splitlines()]
    counts = {v["scores"]["kl"]["count"] for layer in found["layers"] for v in layer["variants"]}
    assert counts == {sum(map(len, answers))}
    # Windows that no row outgrows gain nothing; sinks are fitted on the same rows.
    long = ("--config", folder / "recipe.yaml", *sets(traffic, "measure.windows=[40]"))
    told = refused("measure", "--run", tmp_path / "b", *long)
    assert "a window of 40 cannot be measured on measure.traffic" in told
    layerboost("plan", "--run", tmp_path)
    layerboost("convert", "--run", tmp_path)


@pytest.mark.pipeline
def test_on_a_plan_and_no_plan_from_it(folder: Path, tmp_path: Path) -> None:
    measured(folder, tmp_path / "base", "measure.tasks=[]")
    layerboost("plan", "--run", tmp_path / "base")
    plan = tmp_path / "base" / "plan.yaml"
    words = ("--config", folder / "recipe.yaml", "--run", tmp_path / "again", "--set", f"measure.plan={plan}")
    shown = layerboost("measure", *words)
    assert all(metric in shown.stdout for metric in ("kl", "retrieval", "benchmark", "median ±"))
    found = json.loads((tmp_path / "again" / SENSITIVITY).read_text())
    assert found["settings"]["plan"]
    assert "measured on a changed model" in refused("plan", "--run", tmp_path / "again")
    assert not (tmp_path / "again" / "plan.yaml").exists()
    layerboost("measure", "--run", tmp_path / "base", "--compare", tmp_path / "again")


@pytest.mark.multiprocess
def test_two_ranks_write_the_file_of_one(folder: Path, tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    files, outputs = [], []
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    for name, command in (("one", [sys.executable, "-m"]), ("two", torchrun)):
        words = ["measure", "--config", str(folder / "recipe.yaml"), "--run", str(tmp_path / name)]
        ended = subprocess.run([*command, "layerboost.cli", *words], capture_output=True, text=True, check=False,
                               env=environment)  # fmt: skip
        assert ended.returncode == 0, ended.stderr
        files.append((tmp_path / name / SENSITIVITY).read_bytes())
        outputs.append(ended)
    assert files[0] == files[1]
    assert outputs[0].stdout == outputs[1].stdout
    assert outputs[1].stderr.count("device cpu") == 1
    assert len(json.loads((tmp_path / "two" / "run.json").read_text())["stages"]) == 1
    assert {file.name for file in (tmp_path / "two").iterdir()} == {SENSITIVITY, "run.json", "recipe.yaml", ".lock"}


def test_a_base_that_is_not_finite_is_refused(folder: Path, tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[7, 3] = torch.inf
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    run = tmp_path / "run"
    settings = sets("measure.tasks=[]", f"model={tmp_path / 'model'}")
    for command in ("measure", "check"):
        told = refused(command, "--config", folder / "recipe.yaml", "--run", run, *settings)
        assert "model.layers.1.mlp.down_proj.weight: 1 of 6,144, the first is inf at [7, 3]" in told
    assert not (run / SENSITIVITY).exists()


def test_text_shorter_than_a_sequence_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("w3 w4 w5 " * 4)
    words = ("--config", folder / "recipe.yaml", "--run", tmp_path / "run", "--text", tmp_path / "short.txt")
    assert "the calibration text is too short" in refused("measure", *words)
    assert {file.name for file in (tmp_path / "run").iterdir()} == {"run.json", ".lock"}


def test_what_is_given_is_read_though_the_model_has_yet_to_write_its_text(folder: Path, tmp_path: Path) -> None:
    """No text is there, but tasks and traffic are."""
    base = find_model(str(folder / "model"), RUNTIME)
    settings = yaml.safe_load((folder / "recipe.yaml").read_text())
    settings["text"] |= {"source": "self", "self_samples": 200}

    def validate(**measure: Any) -> None:
        recipe = parse_recipe(settings | {"measure": settings["measure"] | measure}, "test")
        check(recipe, tmp_path, base)

    validate()
    longer = {"text": settings["text"] | {"sequence_tokens": 10**4}, "measure": {"windows": [8], "tokens": 20_000}}
    with pytest.raises(ConfigError, match="own samples would be longer than its context"):
        check(parse_recipe(settings | longer, "test"), tmp_path, base)
    write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "w3", "answer": ""}] * 3)
    with pytest.raises(ConfigError, match="must hold two rows to score"):
        validate(traffic=str(tmp_path / "bad.jsonl"))
    with pytest.raises(ConfigError, match="layers cannot be chosen on task piqa"):
        validate(tasks=["piqa"])


@pytest.mark.pipeline
def test_kv_heads_are_measured_planned_and_converted(folder: Path, tmp_path: Path) -> None:
    """From the exact sweep and from the scan: a plan that keeps single KV heads full."""
    heads = ("measure.unit=kv_head", "plan.unit=kv_head", "measure.tasks=[]")
    for scores in ("exact", "scan"):
        run = tmp_path / scores
        settings = (*heads, f"measure.head_scores={scores}", "measure.scan_draws=2")
        found = measured(folder, run, *settings)
        for layer in found["layers"]:
            assert [variant["full_kv_heads"] for variant in layer["heads"]] == [[1], [0]] * 2
            assert all(("nll" in variant["scores"]) == (scores == "exact") for variant in layer["heads"])
        other = "exact" if scores == "scan" else "scan"
        options = sets(*settings, f"measure.head_scores={other}")
        # Estimates are not taken for exact scores, or the reverse.
        assert "head_scores: " in refused("measure", "--config", folder / "recipe.yaml", "--run", run, *options)
        before = (run / SENSITIVITY).read_text()
        assert measured(folder, run, *settings) == found
        assert (run / SENSITIVITY).read_text() == before
        layerboost("plan", "--run", run, "--set", "plan.kv_fraction=0.55")
    plan = read_plan(tmp_path / "exact" / "plan.yaml")
    assert any(entry.full_kv_heads for entry in plan.layers)
    assert "full KV heads" in layerboost("plan", "--run", tmp_path / "exact").stdout
    layerboost("convert", "--run", tmp_path / "exact")
    config = json.loads((tmp_path / "exact" / "converted" / "config.json").read_text())
    assert config["full_kv_heads"] == {
        str(entry.layer): list(entry.full_kv_heads) for entry in plan.layers if entry.full_kv_heads
    }
    assert "| full KV heads |" in (tmp_path / "exact" / "converted" / "README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("measure.unit=kv_head", "measure.head_group=3"), "groups of 3, 2 KV heads per layer\ndo: choose one of 1"),
        (("measure.unit=kv_head", "measure.head_group=2"), "cannot be split into groups"),
        (("measure.unit=kv_head", "measure.head_scores=scan", "measure.plan=plan.yaml"), "the scan estimates scores"),
    ],
)
def test_kv_heads_that_cannot_be_measured(
    folder: Path, tmp_path: Path, settings: tuple[str, ...], message: str
) -> None:
    words = ("--config", folder / "recipe.yaml", "--run", tmp_path, *sets(*settings, "measure.tasks=[]"))
    assert message in refused("measure", *words)


def test_a_scan_has_two_metrics_to_plan_by(folder: Path, tmp_path: Path) -> None:
    heads = {"measure.unit": "kv_head", "measure.head_scores": "scan", "plan.unit": "kv_head"}
    asked = load_recipe([folder / "recipe.yaml"], {**heads, "plan.metric": "nll"})
    with pytest.raises(ConfigError, match="the plan needs nll of KV heads, and the scan estimates KL and retrieval"):
        check_plan_stage(asked, tmp_path, find_model(str(folder / "model"), RUNTIME))


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {"num_key_value_heads": 1}), ("mistral", {"sliding_window": 16})]
)
def test_models_without_heads_to_split(family: str, changes: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """One KV head per layer is refused; layers that all slide in the base have no scores of heads."""
    model = save_tiny(tmp_path / "model", family, **changes)
    options = sets("measure.unit=kv_head", "measure.head_scores=scan", "measure.tasks=[]", "measure.windows=[16]")
    words = ("measure", model, "--config", folder / "recipe.yaml", "--run", tmp_path, *options)
    if family == "llama":
        assert "set measure.unit and plan.unit to layer" in refused(*words)
        return
    layerboost(*words)
    layerboost("plan", "--run", tmp_path, *sets("plan.unit=kv_head", "plan.kv_fraction=0.8"))


def test_a_plan_by_kv_heads_needs_their_scores(folder: Path, tmp_path: Path) -> None:
    measured(folder, tmp_path, "measure.tasks=[]")
    assert "needs scores of KV heads" in refused("plan", "--run", tmp_path, "--set", "plan.unit=kv_head")


def test_a_changed_text_for_the_fit_of_mlps_is_noticed(tmp_path: Path) -> None:
    """What is measured on is the same: the rows of calibration prompts after it are not."""
    save_tiny(tmp_path / "model", layers=2)
    words = [" ".join(f"w{3 + (5 * row + word) % 190}" for word in range(24)) for row in range(12)]
    write_jsonl(tmp_path / "traffic.jsonl", [{"text": text} for text in words])
    values = {
        "model": str(tmp_path / "model"),
        "text": {"source": str(tmp_path / "traffic.jsonl"), "sequence_tokens": 24},
        "measure": {
            "traffic": str(tmp_path / "traffic.jsonl"),
            "windows": [8],
            "tokens": 96,
            "retrieval_prompts": 0,
            "components": ["attention", "mlp"],
        },
        "plan": {"method": "greedy", "parameter_fraction": 0.9, "search_tokens": 96},
    }
    recipe = parse_recipe(values, "the test")
    sensitivity = run_stage("measure", recipe, tmp_path / "run")
    assert run_stage("measure", recipe, tmp_path / "run") == sensitivity
    measured = open_measured(recipe, tmp_path / "run", sensitivity, [8], RUNTIME)
    measured(layer_plans("ft", 8))
    again = open_measured(recipe, tmp_path / "run", sensitivity, [8], RUNTIME)
    assert len(again.results) == 1
    write_jsonl(tmp_path / "traffic.jsonl", [{"text": text} for text in [*words[:4], *reversed(words[4:])]])
    with pytest.raises(ConfigError, match="was made from something else\nfound: mlp_fit: ") as raised:
        run_stage("measure", recipe, tmp_path / "run")
    assert "text:" not in raised.value.found
    assert not open_measured(recipe, tmp_path / "run", sensitivity, [8], RUNTIME).results
