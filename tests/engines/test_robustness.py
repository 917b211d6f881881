"""A server that is killed, terminated or robbed of its model under load: a clear end, and what was measured is kept.

The subject is our handling of processes, so a stand-in serves; test_vllm.py kills a real one.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from processes import Forked, run_module
from tiny import save_tiny

from layerboost.benching.stage import run_bench
from layerboost.engines import vllm, vllm_server
from layerboost.engines.server import check_port
from layerboost.engines.vllm_server import served
from layerboost.errors import ConfigError, LayerboostError
from layerboost.recipe import Bench, Recipe, parse_recipe
from layerboost.schemas.artifact import read_json
from layerboost.schemas.benchmark import Comparison

STAND_IN = [sys.executable, str(Path(__file__).with_name("stand_in.py"))]
PATIENCE_S = 60
# A moment of load, then seconds of it.
LOADS = {"repeats": 1, "concurrency": [1, 8], "requests_per_concurrency": 2, "input_tokens": 32, "output_tokens": 400}


def use_the_stand_in(replace: Callable[[Any, str, Any], None]) -> None:
    """Put the stand-in where vLLM's commands are made."""
    replace(vllm, "vllm_command", lambda: STAND_IN)
    replace(vllm_server, "load_generator_command", lambda: [*STAND_IN, "load"])
    replace(vllm, "check_vllm", lambda: "0.0")


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    use_the_stand_in(monkeypatch.setattr)


def settings(port: int) -> dict[str, Any]:
    return {**LOADS, "kv_cache_gib": 0.25, "port": port, "startup_timeout_s": PATIENCE_S}


def kept(run: Path) -> Comparison:
    return read_json(run / "bench" / "comparison.json", Comparison, "layerboost bench")


def wait_for_load(file: Path, port: int) -> None:
    """Wait until a file exists and the server answers several requests at once."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        time.sleep(0.1)
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            running = re.search(r"^vllm:num_requests_running\{.*\} (\S+)$", answer.read().decode(), re.M)
            if running and float(running[1]) > 1 and file.exists():
                return


@contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    yield
    thread.join()


def kill_server(port: int) -> None:
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        if str(port) in command and "serve" in command and "bench" not in command and "guard.py" not in str(command):
            process.kill()


def zombies() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if child.status() == psutil.STATUS_ZOMBIE]


@pytest.mark.multiprocess
def test_a_killed_server_and_a_deleted_model_leave_what_was_measured(
    tmp_path: Path, free_port: int, survivors: Callable[[float], list[str]]
) -> None:
    models = {"base": save_tiny(tmp_path / "base"), "healed": save_tiny(tmp_path / "healed", "llama", "nSnf")}
    recipe: Recipe = parse_recipe({"bench": settings(free_port)}, "test")
    run, results = tmp_path / "run", tmp_path / "run" / "bench"

    def kill() -> None:
        wait_for_load(results / "base-c1-r0.json", free_port)
        kill_server(free_port)

    with meanwhile(kill), pytest.raises(LayerboostError, match="vLLM died while serving base") as raised:
        run_bench(recipe, run, models)
    assert raised.value.exit_code == 1
    assert survivors(2) == []
    assert zombies() == []
    assert [entry.file for entry in kept(run).measurements] == ["base-c1-r0.json"]
    assert not kept(run).complete
    before = (results / "base-c1-r0.json").read_text()

    def rob() -> None:
        wait_for_load(results / "base-c1-r0.json", free_port)
        shutil.rmtree(models["healed"])

    # Once more: what was lost is measured, what was kept is not. Meanwhile the other model's directory goes.
    with meanwhile(rob), pytest.raises(ConfigError, match="healed is not a model directory"):
        run_bench(recipe, run, models)
    assert survivors(2) == []
    assert [entry.file for entry in kept(run).measurements] == ["base-c1-r0.json", "base-c8-r0.json"]
    assert (results / "base-c1-r0.json").read_text() == before
    check_port(free_port)


def terminated(words: list[str]) -> None:
    """Run the command line against the stand-in."""
    use_the_stand_in(setattr)
    run_module("layerboost.cli", *words)


@pytest.mark.multiprocess
def test_a_terminated_benchmark_takes_everything_with_it(
    tmp_path: Path, free_port: int, survivors: Callable[[float], list[str]]
) -> None:
    base, run = save_tiny(tmp_path / "base"), tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(json.dumps({"bench": settings(free_port)}))
    words = ["bench", str(base), "--run", str(run), "--config", str(tmp_path / "recipe.yaml")]
    process = Forked(terminated, words, folder=tmp_path)
    wait_for_load(run / "bench" / "base-c1-r0.json", free_port)
    process.send(signal.SIGTERM)
    assert process.wait() == 130
    assert process.errors.read_text().rstrip().endswith("interrupted; run the same command again to resume")
    assert survivors(2) == []
    assert [entry.file for entry in kept(run).measurements] == ["base-c1-r0.json"]
    assert json.loads((run / "run.json").read_text())["stages"][-1]["status"] == "interrupted"


@pytest.mark.pipeline
def test_bench_measures_both_models_and_leaves_nothing_running(
    tmp_path: Path, free_port: int, survivors: Callable[[float], list[str]]
) -> None:
    models = {"base": save_tiny(tmp_path / "base"), "healed": save_tiny(tmp_path / "healed", "llama", "nSnf")}
    recipe = parse_recipe({"bench": settings(free_port) | {"concurrency": [1], "output_tokens": 8}}, "test")
    comparison = run_bench(recipe, tmp_path / "run", models)
    assert survivors(2) == []
    check_port(free_port)
    assert comparison.complete
    for name in models:
        raw = json.loads((tmp_path / "run" / "bench" / f"{name}-c1-r0.json").read_text())
        metrics = comparison.results[0].models[name]
        assert (raw["completed"], raw["total_output_tokens"]) == (2, 16)
        assert metrics["peak_rss_gib"].median > 0.001

    # A second call finds everything there; other lengths are refused.
    assert run_bench(recipe, tmp_path / "run", models) == comparison
    other = parse_recipe({"bench": recipe.bench.model_dump() | {"output_tokens": 9}}, "test")
    with pytest.raises(ConfigError, match=r"bench\.output_tokens was 8, is 9"):
        run_bench(other, tmp_path / "run", models)


def test_a_server_that_dies_says_why(tmp_path: Path, free_port: int, survivors: Callable[[float], list[str]]) -> None:
    folder = save_tiny(tmp_path / "model", "llama", "nf")
    (folder / "words.txt").write_text("RuntimeError: no such option")
    log_file = tmp_path / "server.log"
    with (
        pytest.raises(LayerboostError, match=r"vLLM died while serving it\n.*no such option") as raised,
        served("it", folder, Bench(port=free_port), log_file),
    ):
        raise AssertionError("it answered")
    assert raised.value.exit_code == 1
    assert str(log_file) in str(raised.value)
    assert survivors(2) == []
