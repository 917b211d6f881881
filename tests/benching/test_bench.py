from __future__ import annotations

import importlib.util
import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import forked, free_port
from tiny import edit_config, info, layer_plans, save_tiny

from layerboost.benching.stage import _checked, _opened, run_bench
from layerboost.costs.memory import CPU_DEFAULTS, GPU_DEFAULTS, CacheSettings, plan_serving
from layerboost.engines import transformers
from layerboost.errors import ConfigError
from layerboost.recipe import Recipe, parse_recipe
from layerboost.reporting.benchmark import decode_table
from layerboost.schemas.artifact import read_json, write_json
from layerboost.schemas.benchmark import Comparison, Measurement
from layerboost.schemas.plan import PlanFile, write_plan
from layerboost.schemas.run import PLAN

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Small ones with a short context."""
    return {name: save_tiny(tmp_path / name, layers=1, max_position_embeddings=64) for name in ("base", "healed")}


def recipe(**changes: Any) -> Recipe:
    small = {"concurrency": [1, 2], "requests_per_concurrency": 1, "input_tokens": 32, "output_tokens": 8, "repeats": 1}
    return parse_recipe({"bench": {**small, "port": free_port(), **changes}}, "test")


def opened(asked: Recipe, run: Path, models: dict[str, Path], decode_sweep: bool = False) -> Comparison:
    """What `run_bench` finds out before it serves anything."""
    return _opened(_checked(asked, run, models, decode_sweep))


def finish(run: Path, asked: Recipe, models: dict[str, Path]) -> Comparison:
    """Write what a finished run leaves behind."""
    comparison = opened(asked, run, models)
    for name in models:
        for concurrency in asked.bench.concurrency:
            file = f"{name}-c{concurrency}-r0.json"
            write_json(run / "bench" / file, {"completed": 2})
            comparison.measurements.append(
                Measurement(
                    model=name,
                    concurrency=concurrency,
                    repeat=0,
                    file=file,
                    seed=0,
                    metrics={"output_tokens_per_s": 2.0 if name == "healed" else 1.0},
                )
            )
    write_json(run / "bench" / "comparison.json", comparison)
    return comparison


@needs_vllm
def test_a_finished_run_starts_no_server(tmp_path: Path, models: dict[str, Path]) -> None:
    finish(tmp_path, recipe(), models)
    # Another port, and one concurrency fewer, change nothing about what was measured: it stays.
    comparison = run_bench(recipe(concurrency=[2]), tmp_path, models)
    assert comparison.complete
    assert comparison.reference == "base"
    assert [result.concurrency for result in comparison.results] == [1, 2]
    assert comparison.results[0].ratios["healed"]["output_tokens_per_s"].median == 2
    assert read_json(tmp_path / "bench" / "comparison.json", Comparison, "bench") == comparison


@needs_vllm
def test_a_lost_result_is_measured_again(tmp_path: Path, models: dict[str, Path]) -> None:
    finish(tmp_path, recipe(), models)
    (tmp_path / "bench" / "base-c2-r0.json").unlink()
    left = opened(recipe(), tmp_path, models)
    assert [entry.file for entry in left.measurements] == ["base-c1-r0.json", "healed-c1-r0.json", "healed-c2-r0.json"]


@needs_vllm
def test_results_of_other_settings_are_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    finish(tmp_path, recipe(), models)
    with pytest.raises(ConfigError, match=r"bench\.requests_per_concurrency was 1\.0, is 3\.0") as raised:
        opened(recipe(requests_per_concurrency=3), tmp_path, models)
    assert "--run" in str(raised.value)
    assert str(tmp_path / "bench") in str(raised.value)


@needs_vllm
def test_results_of_another_model_are_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    finish(tmp_path, recipe(), models)
    edit_config(models["healed"], rope_theta=8.0)
    with pytest.raises(ConfigError, match="config of healed was"):
        run_bench(recipe(), tmp_path, models)


@needs_vllm
def test_requests_must_fit_the_context(tmp_path: Path, models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="base has a context of 64 tokens"):
        opened(recipe(input_tokens=57), tmp_path, models)
    opened(recipe(input_tokens=56), tmp_path, models)


def test_requests_must_fit_the_context_of_a_wrapper(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llava", layers=1, max_position_embeddings=64)
    asked = recipe(engine="transformers", input_tokens=57)
    with pytest.raises(ConfigError, match="base has a context of 64 tokens"):
        opened(asked, tmp_path / "run", {"base": folder})


@needs_vllm
def test_a_taken_port_is_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        asked = recipe(port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="another process listens there"):
            opened(asked, tmp_path, models)


def advise(folder: Path, context_tokens: int = 512) -> PlanFile:
    """Put a plan for this context length into the directory of a model."""
    settings = {"context_tokens": context_tokens, "concurrency": 4}
    plan = PlanFile(model=info(2), method="budget", settings=settings, layers=layer_plans("sf"))
    write_plan(folder / PLAN, plan)
    return plan


@needs_vllm
@pytest.mark.parametrize("engine", [CPU_DEFAULTS, GPU_DEFAULTS])
def test_every_model_is_served_with_the_flags_of_the_plan(
    engine: CacheSettings, tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those for the machine that serves, wherever the plan was made."""
    monkeypatch.setattr("layerboost.engines.vllm.runs_on_cpu", lambda: engine == CPU_DEFAULTS)
    plan = advise(models["healed"])
    found = plan_serving(plan, engine)
    assert found
    flags = found.flags
    assert flags[0] == "--max-num-batched-tokens"
    job = _checked(recipe(server_args=["--block-size=16"]), tmp_path, models, False)
    assert job.bench.server_args == (*flags[:2], "--block-size=16")
    assert _opened(job).settings["server_args"] == list(job.bench.server_args)
    # Another checkpoint that needs other flags: no ratio to the base is fair to both.
    other = models | {"other": tmp_path / "other"}
    shutil.copytree(models["healed"], other["other"])
    assert _checked(recipe(server_args=["--block-size=16"]), tmp_path, other, False).bench.server_args == (
        job.bench.server_args
    )
    advise(other["other"], context_tokens=32_768)
    with pytest.raises(ConfigError, match=r"healed: --max-num-batched-tokens \d+.*other: --"):
        opened(recipe(), tmp_path, other)
    # As the message says: choose for all of them.
    chosen = ["--max-num-batched-tokens=512", "--block-size=16"]
    assert _checked(recipe(server_args=chosen), tmp_path, other, False).bench.server_args == tuple(chosen)


@needs_vllm
def test_flags_are_those_of_the_layers_that_are_there(tmp_path: Path, models: dict[str, Path]) -> None:
    """A plan that a person edited: flags are computed where the server starts, and stand in no file."""
    advise(models["healed"])
    file = models["healed"] / PLAN
    assert "serving" not in yaml.safe_load(file.read_text())
    assert _checked(recipe(), tmp_path, models, False).bench.server_args != ()
    edited = file.read_text().replace("layer: 0, attention: sliding, window: 16", "layer: 0, attention: full")
    file.write_text(edited)
    assert _checked(recipe(), tmp_path, models, False).bench.server_args == ()


@pytest.mark.pipeline
def test_transformers_in_place_of_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "guarded", forked)
    models = {"base": save_tiny(tmp_path / "base"), "healed": save_tiny(tmp_path / "healed", "llama", "nSnf")}
    asked = recipe(engine="transformers", concurrency=[2], repeats=2)
    found = run_bench(asked, tmp_path, models)
    assert found.complete
    assert [entry.model for entry in found.measurements] == ["base", "healed", "healed", "base"]
    (at,) = found.results
    assert at.ratios["healed"]["output_tokens_per_s"].median > 0
    assert json.loads((tmp_path / "bench" / "base-c2-r0.json").read_text())["total_output_tokens"] == 16
    assert found.settings["engine"] == "transformers"
    assert run_bench(asked, tmp_path, models) == found
    with pytest.raises(ConfigError, match=r"bench\.output_tokens was 8, is 9"):
        opened(recipe(engine="transformers", output_tokens=9), tmp_path, models)


@pytest.mark.pipeline
def test_a_decode_sweep_has_a_result_per_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers, "guarded", forked)
    models = {"base": save_tiny(tmp_path / "base")}
    settings = {"engine": "transformers", "decode_batch": 2}
    sweep = run_bench(recipe(**settings, decode_lengths=[4, 128]), tmp_path, models, decode_sweep=True)
    assert [(at.concurrency, at.output_tokens) for at in sweep.results] == [(2, 4), (2, 128)]
    short, long = (json.loads((tmp_path / "bench" / f"base-decode{n}-r0.json").read_text()) for n in (4, 128))
    assert (short["total_output_tokens"], long["total_output_tokens"]) == (2 * 4, 2 * 128)
    assert all(at.models["base"]["latency_ms_median"].median > 0 for at in sweep.results)
    table = decode_table(sweep)
    assert [row[:2] for row in table.rows] == [["4", "base"], ["128", "base"]]
    assert {len(row) for row in table.rows} == {len(table.header)}

    # Another length is added to it, and what was measured stays.
    before = (tmp_path / "bench" / "base-decode4-r0.json").read_text()
    longer = run_bench(recipe(**settings, decode_lengths=[4, 12]), tmp_path, models, decode_sweep=True)
    assert [at.output_tokens for at in longer.results] == [4, 12, 128]
    assert (tmp_path / "bench" / "base-decode4-r0.json").read_text() == before
    assert sorted(file.name for file in (tmp_path / "bench").iterdir()) == [
        "base-decode12-r0.json",
        "base-decode128-r0.json",
        "base-decode4-r0.json",
        "decode_sweep.json",
        "logs",
    ]


@needs_vllm
def test_engines_are_not_mixed(tmp_path: Path, models: dict[str, Path]) -> None:
    finish(tmp_path, recipe(), models)
    with pytest.raises(ConfigError, match=r"bench\.engine was 'vllm', is 'transformers'"):
        opened(recipe(engine="transformers"), tmp_path, models)


def test_what_transformers_computes_in_is_not_mixed(tmp_path: Path, models: dict[str, Path]) -> None:
    asked = recipe(engine="transformers")
    finish(tmp_path, asked, models)
    assert opened(asked, tmp_path, models).environment["dtype"] == "float32"
    with pytest.raises(ConfigError, match=r"dtype was 'float32', is 'bfloat16'"):
        opened(asked.model_copy(update={"dtype": "bfloat16"}), tmp_path, models)
