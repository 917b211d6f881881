"""The whole pipeline on tiny models, through the command line, with a real vLLM server."""

from __future__ import annotations

import gc
import io
import json
import re
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from pictures import save_requests, save_with_processor
from PIL import Image
from processes import command, free_port
from safetensors.torch import load_file, save_file
from tiny import RUNTIME, save_text, save_tiny
from tiny_bench import rows, write_jsonl
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from layerboost import pipeline
from layerboost.check import Estimate, check_room
from layerboost.cli import main
from layerboost.compare import run_compare
from layerboost.errors import ConfigError, LayerboostError
from layerboost.model.base import Base
from layerboost.pipeline import run_all, run_stage
from layerboost.recipe import load_recipe, parse_recipe, recipe_yaml
from layerboost.schemas.artifact import read_json
from layerboost.schemas.plan import read_plan
from layerboost.schemas.run import SENSITIVITY
from layerboost.schemas.sensitivity import Sensitivity


@dataclass
class Ended:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def layerboost(*arguments: object, check: bool = True) -> Ended:
    """Run the command line in this process: its entry point, as the console script calls it."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", ["layerboost", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert not check or code == 0, err.getvalue()
    return Ended(code, out.getvalue(), err.getvalue())


def refused(*arguments: object, code: int = 2) -> str:
    """Run a command that ends with the code; return what it says."""
    ended = layerboost(*arguments, check=False)
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stderr


def sets(*settings: str) -> list[str]:
    """Return the words of a command line that give each setting, such as `heal.lr=0.5`, its value."""
    return [word for setting in settings for word in ("--set", setting)]


def write_recipe(folder: Path, model: Path, **changes: dict[str, Any]) -> Path:
    """A recipe that ends in seconds."""
    write_jsonl(folder / "piqa.jsonl", rows("piqa", 12))
    recipe: dict[str, Any] = {
        "model": str(model),
        "text": {"source": str(save_text(folder / "text.jsonl", words=120_000)), "sequence_tokens": 48},
        "measure": {"windows": [8, 16], "tokens": 192, "retrieval_prompts": 4, "retrieval_tokens": 128},
        "plan": {"kv_fraction": 0.4, "context_tokens": 64},
        "heal": {"fit_tokens": 256, "attention_tokens": 384, "tokens": 768, "batch_sequences": 2, "save_steps": 3},
        "evaluate": {
            "tasks": ["piqa"],
            "bench_data": str(folder),
            "perplexity_tokens": 480,
        },
        "bench": {
            "concurrency": [2],
            "requests_per_concurrency": 2,
            "repeats": 1,
            "input_tokens": 24,
            "output_tokens": 8,
            "kv_cache_gib": 1,
            "port": free_port(),
        },
    }
    for section, values in changes.items():
        recipe[section] |= values
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


@pytest.mark.parametrize("verb", ["plan", "convert", "evaluate", "bench", "report", "run", "compare"])
def test_torchrun_is_for_measure_and_heal(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = load_recipe([write_recipe(tmp_path, save_tiny(tmp_path / "model"))], {})
    whole = {"run": run_all, "compare": run_compare}.get(verb, partial(run_stage, verb))
    # Not through the command line, which ends a process of torchrun at once.
    with pytest.raises(ConfigError, match=f"layerboost {verb} does not run under torchrun"):
        whole(asked, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def models_alive() -> list[object]:
    return [found for found in gc.get_objects() if issubclass(type(found), PreTrainedModel)]


@pytest.mark.pipeline
def test_no_stage_leaves_a_model_behind(tmp_path: Path) -> None:
    """On a GPU the next stage, or its server, would start on a full card."""
    before = {id(model) for model in models_alive()}
    few = {"heal": {"fit_tokens": 96, "attention_tokens": 96, "tokens": 96}, "evaluate": {"perplexity_tokens": 96}}
    plan = {"method": "greedy", "search_tokens": 96, "window": 8}
    file = write_recipe(tmp_path, save_tiny(tmp_path / "model"), plan=plan, **few)
    left = {}
    for stage in ("measure", "plan", "convert", "heal", "evaluate"):
        run_stage(stage, load_recipe([file], {}), tmp_path / "run")
        left[stage] = [type(model).__name__ for model in models_alive() if id(model) not in before]
    assert not any(left.values()), left


ODD = "-a [b] {c} %s é\n;'x'"


@pytest.mark.pipeline
def test_a_run_goes_on_from_another_directory_and_under_odd_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / ODD, tmp_path / "elsewhere"
    here.mkdir()
    there.mkdir()
    save_tiny(here / "-m [1]")
    few = {"fit_tokens": 96, "attention_tokens": 96, "tokens": 96}
    evaluate = {"bench_data": ".", "perplexity_tokens": 96}
    file = write_recipe(here, Path("-m [1]"), text={"source": "text.jsonl"}, evaluate=evaluate, heal=few)
    run = ["--run", here / "-r [2]"]
    monkeypatch.chdir(here)
    layerboost("measure", "--config", file.name, "--run", "-r [2]")
    monkeypatch.chdir(there)
    for stage in ("plan", "convert", "heal", "evaluate", "report"):
        layerboost(stage, *run)
    kept = load_recipe([here / "-r [2]" / "recipe.yaml"], {})
    assert (kept.model, kept.text.source) == (str(here / "-m [1]"), str(here / "text.jsonl"))
    assert list(there.iterdir()) == []
    assert "KV bytes" in layerboost("report", *run).stdout


@pytest.mark.server
@pytest.mark.parametrize(
    ("family", "unit", "kv_fraction"),
    [("llama", "kv_head", 0.55), pytest.param("qwen3", "layer", 0.4, marks=pytest.mark.exhaustive)],
)
def test_the_whole_pipeline_and_a_second_run(family: str, unit: str, kv_fraction: float, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason='pip install ".[serve-cpu]" or ".[serve]"')
    recipe = write_recipe(
        tmp_path,
        save_tiny(tmp_path / "model", family),
        measure={"unit": unit},
        plan={"unit": unit, "kv_fraction": kv_fraction},
    )
    run = tmp_path / "run"
    first = json.loads(layerboost("run", "--config", recipe, "--run", run, "--json").stdout)
    assert first["kv_fraction"] <= kv_fraction
    assert (unit == "kv_head") == any(entry.full_kv_heads for entry in read_plan(run / "plan.yaml").layers)
    assert set(first["perplexity"]) == {"base", "converted", "healed"}
    quality = json.loads((run / "eval" / "comparison.json").read_text())["perplexity"]
    assert 0 == quality["base"]["kl"]["mean"] < quality["healed"]["kl"]["mean"] < quality["converted"]["kl"]["mean"]
    assert first["throughput_ratio"]["spread"]["median"] > 0
    made = {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")}
    second = json.loads(layerboost("run", "--config", recipe, "--run", run, "--json").stdout)
    assert second == first
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*.safetensors")} == made
    stages = json.loads((run / "run.json").read_text())["stages"]
    assert [stage["status"] for stage in stages] == ["done"] * 14
    assert (run / "report.html").stat().st_size > 10_000


@pytest.mark.multiprocess
def test_a_killed_measurement_goes_on(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "model", layers=12), measure={"tokens": 960})
    run = tmp_path / "run"
    process = command("measure", "--config", recipe, "--run", run, folder=tmp_path)
    process.kill_when((run / SENSITIVITY).exists)
    part = read_json(run / SENSITIVITY, Sensitivity, "")
    assert 0 < len(part.layers) < 12
    layerboost("measure", "--run", run, "--config", recipe)
    whole = read_json(run / SENSITIVITY, Sensitivity, "")
    assert whole.complete
    assert whole.layers[: len(part.layers)] == part.layers


def test_the_models_own_text(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "model"))
    run = tmp_path / "run"
    own = sets("text.self_samples=60", "measure.retrieval_prompts=0")
    layerboost("measure", "--config", recipe, "--run", run, "--text", "self", *own)
    assert len((run / "self_samples.jsonl").read_text().splitlines()) == 60
    assert yaml.safe_load((run / "recipe.yaml").read_text())["text"]["source"] == "self"
    layerboost("plan", "--run", run)
    layerboost("convert", "--run", run)


@pytest.mark.pipeline
def test_an_edited_plan_is_kept_and_another_budget_is_planned_anew(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "model"))
    run = tmp_path / "run"
    layerboost("measure", "--config", recipe, "--run", run)
    layerboost("plan", "--run", run)
    file = run / "plan.yaml"
    lines = (
        file.read_text().split("layers:\n")[0]
        + "layers:\n"
        + "".join(f"  - {{layer: {index}, attention: full}}\n" for index in range(4))
    )
    file.write_text(lines)
    layerboost("plan", "--run", run)
    assert read_plan(file).count("full") == 4
    assert read_plan(file).valid_prediction is None
    layerboost("convert", "--run", run)
    assert read_plan(run / "converted" / "plan.yaml").count("full") == 4
    assert "KV cache takes" not in (run / "converted" / "README.md").read_text()
    layerboost("plan", "--run", run, "--set", "plan.kv_fraction=0.3")
    assert read_plan(file).count("full") < 4


@pytest.mark.exhaustive
@pytest.mark.pipeline
def test_a_mixture_of_experts_goes_through_every_stage_and_keeps_its_routers(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "qwen3_moe")
    heal = {"attention_tokens": 4096, "tokens": 8192, "batch_sequences": 4, "lr": 3e-3, "save_steps": 100}
    recipe, run = write_recipe(tmp_path, model, heal=heal, bench={"engine": "transformers"}), tmp_path / "run"
    checked = json.loads(layerboost("check", "--config", recipe, "--run", run, "--json").stdout)
    assert checked["active_parameters"] < checked["parameters"]
    for stage in ("measure", "plan"):
        layerboost(stage, "--config", recipe, "--run", run)
    file = run / "plan.yaml"
    assert len(read_plan(file).layers) == 4
    kinds = ["full", "none", "sliding, window: 8", "full"]
    lines = "".join(f"  - {{layer: {index}, attention: {kind}}}\n" for index, kind in enumerate(kinds))
    file.write_text(file.read_text().split("layers:\n")[0] + "layers:\n" + lines)
    for stage in ("convert", "heal", "evaluate", "bench", "report"):
        layerboost(stage, "--run", run)
    quality = json.loads((run / "eval" / "comparison.json").read_text())["perplexity"]
    assert 0 == quality["base"]["kl"]["mean"] < quality["healed"]["kl"]["mean"] < quality["converted"]["kl"]["mean"]
    before, after = (load_file(folder / "model.safetensors") for folder in (model, run / "healed"))
    changed = {name.split(".experts.")[0] for name in after if not torch.equal(after[name], before[name])}
    assert not any("gate.weight" in name for name in changed)
    assert {name for name in changed if "mlp" in name} == {"model.layers.1.mlp"}
    assert "Each token uses" in (run / "healed" / "README.md").read_text()
    assert "M active)" in (run / "report.md").read_text()


@pytest.mark.exhaustive
@pytest.mark.pipeline
def test_a_vision_language_model_goes_through_every_stage_measured_and_healed_on_images(tmp_path: Path) -> None:
    model = save_with_processor(tmp_path / "model", "qwen3_vl", 4)
    requests = str(save_requests(tmp_path, 90, heights=(8, 16)))
    heal = {"traffic": requests, "attention_tokens": 2048, "tokens": 4096, "lr": 3e-3, "save_steps": 100}
    recipe = write_recipe(
        tmp_path,
        model,
        text={"sequence_tokens": 96},
        measure={"traffic": requests, "tokens": 600},
        heal=heal | {"batch_sequences": 4},
        bench={"engine": "transformers"},
    )
    run = tmp_path / "run"
    trusted = ["--set", "trust_remote_code=true"]  # the processor's
    layerboost("check", "--config", recipe, "--run", run, *trusted)
    done = json.loads(layerboost("run", "--config", recipe, "--run", run, "--json", *trusted).stdout)
    assert done["throughput_ratio"]
    quality = json.loads((run / "eval" / "comparison.json").read_text())["perplexity"]
    assert 0 == quality["base"]["kl"]["mean"] < quality["healed"]["kl"]["mean"] < quality["converted"]["kl"]["mean"]
    processor = AutoProcessor.from_pretrained(run / "healed", trust_remote_code=True)
    picture = Image.open(tmp_path / "0.png")
    prompt = processor(text=["w7 <image> w9 w8"], images=[picture], return_tensors="pt")
    healed = AutoModelForImageTextToText.from_pretrained(run / "healed")
    assert type(healed).__name__ == "LayerBoostQwen3VLForConditionalGeneration"
    answer = healed.generate(**prompt, max_new_tokens=5, min_new_tokens=5)
    assert answer.shape[1] == prompt["input_ids"].shape[1] + 5


@pytest.mark.pipeline
def test_a_damaged_model_misses_the_gate_with_exit_4_and_keeps_the_results(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "model"))
    run = tmp_path / "run"
    for stage in ("measure", "plan", "convert", "evaluate"):
        layerboost(stage, "--config", recipe, "--run", run)
    kl = json.loads((run / "eval" / "comparison.json").read_text())["perplexity"]["converted"]["kl"]["mean"]
    gate = sets(f"evaluate.max_kl={1.2 * kl}", "evaluate.max_task_drop=1")
    assert layerboost("evaluate", "--run", run, *gate).returncode == 0
    weights = run / "converted" / "model.safetensors"
    damaged = {name: tensor + 0.2 * torch.randn_like(tensor) for name, tensor in load_file(weights).items()}
    save_file(damaged, weights, metadata={"format": "pt"})
    assert "converted.text.json" in refused("evaluate", "--run", run, *gate)
    for file in (run / "eval").glob("converted.*"):
        file.unlink()
    told = refused("evaluate", "--run", run, *gate, code=4)
    assert "the quality gate was missed by converted" in told
    assert re.search(r"KL to the base +\d+\.\d{4} .* MISSED\n +piqa, drop .* passed", told)
    checks = json.loads((run / "eval" / "comparison.json").read_text())["gate"]["checks"]
    assert [check["passed"] for check in checks] == [False, True]
    layerboost("report", "--run", run)
    assert "Quality gate: missed by converted in 1 of 2 checks" in (run / "report.md").read_text()


@pytest.mark.pipeline
def test_a_missed_gate_ends_a_run_with_a_report_and_no_benchmark(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    recipe = write_recipe(tmp_path, model, evaluate={"max_kl": 1e-9}, bench={"engine": "transformers"})
    refused("run", "--config", recipe, "--run", tmp_path / "run", code=4)
    assert "Quality gate: missed by healed" in (tmp_path / "run" / "report.md").read_text()
    assert not (tmp_path / "run" / "bench").exists()


def test_a_late_refusal_leaves_a_run_the_recipe_of_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise ConfigError("not today")

    monkeypatch.setattr("layerboost.check.check", lambda *_: None)
    monkeypatch.setattr(pipeline, "STAGES", {"measure": lambda *_: None, "plan": refuse})
    first, second = (parse_recipe({"model": "m", "seed": seed}, "test") for seed in (1, 2))
    for recipe in (first, second):
        with pytest.raises(ConfigError, match="not today"):
            run_all(recipe, tmp_path)
        # What a new run made keeps its recipe; refused settings do not take the place of an earlier one's.
        assert (tmp_path / "recipe.yaml").read_text() == recipe_yaml(first)


def test_the_converted_model_is_not_benchmarked_if_there_is_a_healed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {name: Base(name, tmp_path / name, RUNTIME) for name in ("base", "converted", "healed")}
    monkeypatch.setattr(pipeline, "checkpoints", lambda *_: own)
    monkeypatch.setattr("layerboost.benching.stage.run_bench", lambda recipe, run, models, sweep: models)
    recipe = parse_recipe({"model": "m", "bench": {"checkpoints": {"other": "~/other"}}}, "test")
    folders = {name: tmp_path / name for name in ("base", "healed")}
    assert pipeline.bench(recipe, tmp_path) == folders | {"other": Path.home() / "other"}


def test_a_run_that_cannot_shard_is_refused_before_it_measures(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, save_tiny(tmp_path / "model"), heal={"shard": True})
    told = refused("run", "--config", recipe, "--run", tmp_path / "run")
    assert "heal.shard divides the model among the processes of torchrun" in told
    assert not (tmp_path / "run" / SENSITIVITY).exists()


@pytest.mark.parametrize(
    ("device", "memory", "weights_gib", "short"),
    [
        ("cpu", (9.5, 8.0), 1.0, "not enough memory on cpu: 9.5 GiB needed"),
        ("cuda:1", (9.5, 8.0), 1.0, "not enough memory on cuda:1: 9.5 GiB needed"),
        ("cuda:1", (7.5, 8.0), 1e6, "not enough host memory: 1000000.0 GiB needed"),
    ],
)
def test_memory_is_looked_at_where_healing_runs(
    device: str, memory: tuple[float, float], weights_gib: float, short: str
) -> None:
    estimate = Estimate("m", "llama", 4, 10, 10, device, *memory, 1.0, 2.0, 100, 10.0, 1.0, "not needed")
    with pytest.raises(LayerboostError) as caught:
        check_room(estimate, weights_gib, torch.device(device), "heal less")
    assert str(caught.value).startswith(short)
    fits = Estimate("m", "llama", 4, 10, 10, device, 1.0, 2.0, 1.0, 2.0, 100, 10.0, 1.0, "not needed")
    check_room(fits, 0.1, torch.device(device), "heal less")
