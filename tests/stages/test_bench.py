from __future__ import annotations

import importlib.util
import json
import socket
from pathlib import Path
from typing import Any

import pytest

from layerboost.artifacts import read_json, write_json
from layerboost.errors import ConfigError
from layerboost.recipe import Recipe, parse_recipe
from layerboost.serving.results import Comparison, Measurement
from layerboost.stages.bench import _checked, _opened, run_bench, validate_bench

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Directories that pass for models until something loads them."""
    found = {}
    for name in ("base", "healed"):
        folder = found[name] = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 64}))
        (folder / "pytorch_model.bin").touch()
    return found


def recipe(**changes: Any) -> Recipe:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    small = {"concurrency": [1, 2], "requests_per_concurrency": 1, "input_tokens": 32, "output_tokens": 8, "port": port}
    return parse_recipe({"bench": {**small, **changes}}, "test")


def finish(run: Path, asked: Recipe, models: dict[str, Path]) -> Comparison:
    """Write what a finished run leaves behind."""
    comparison = _opened(_checked(asked, run, models, False))
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


def test_a_finished_run_starts_no_server(tmp_path: Path, models: dict[str, Path]) -> None:
    finish(tmp_path, recipe(), models)
    # Another port, and one concurrency fewer, change nothing about what was measured: it stays.
    comparison = run_bench(recipe(concurrency=[2]), tmp_path, models)
    assert comparison["complete"]
    assert comparison["reference"] == "base"
    assert [result["concurrency"] for result in comparison["results"]] == [1, 2]
    assert comparison["results"][0]["ratios"]["healed"]["output_tokens_per_s"]["mean"] == 2
    assert read_json(tmp_path / "bench" / "comparison.json", Comparison, "bench").complete


def test_a_lost_result_is_measured_again(tmp_path: Path, models: dict[str, Path]) -> None:
    finish(tmp_path, recipe(), models)
    (tmp_path / "bench" / "base-c2-r0.json").unlink()
    left = _opened(_checked(recipe(), tmp_path, models, False))
    assert [entry.file for entry in left.measurements] == ["base-c1-r0.json", "healed-c1-r0.json", "healed-c2-r0.json"]


def test_results_of_other_settings_are_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    finish(tmp_path, recipe(), models)
    with pytest.raises(ConfigError, match=r"bench\.requests_per_concurrency was 1\.0, is 3\.0") as raised:
        validate_bench(recipe(requests_per_concurrency=3), tmp_path, models)
    assert "--run" in str(raised.value)
    assert str(tmp_path / "bench") in str(raised.value)


def test_results_of_another_model_are_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    finish(tmp_path, recipe(), models)
    (models["healed"] / "config.json").write_text(json.dumps({"model_type": "llama", "sliding_window": 8}))
    with pytest.raises(ConfigError, match="config of healed was"):
        run_bench(recipe(), tmp_path, models)


def test_requests_must_fit_the_context(tmp_path: Path, models: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="base has a context of 64 tokens"):
        validate_bench(recipe(input_tokens=57), tmp_path, models)
    validate_bench(recipe(input_tokens=56), tmp_path, models)


def test_a_taken_port_is_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        asked = recipe(port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="another process listens there"):
            validate_bench(asked, tmp_path, models)


def test_a_truncated_comparison_is_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    finish(tmp_path, recipe(), models)
    file = tmp_path / "bench" / "comparison.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(ConfigError, match="not a valid Comparison"):
        validate_bench(recipe(), tmp_path, models)
