"""Real servers killed, terminated or robbed of their model under load: a clear end, and what was measured is kept."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import subprocess
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
from tiny import save_tiny

from layerboost.artifacts import read_json
from layerboost.errors import ConfigError, LayerboostError
from layerboost.recipe import Recipe, parse_recipe
from layerboost.serving.command import check_port
from layerboost.serving.results import Comparison
from layerboost.stages.bench import run_bench

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
PATIENCE_S = 300
# A moment of load, then seconds of it.
LOADS = {"repeats": 1, "concurrency": [1, 8], "requests_per_concurrency": 2, "input_tokens": 32, "output_tokens": 300}


def settings(port: int) -> dict[str, Any]:
    return {**LOADS, "kv_cache_gib": 0.25, "port": port, "startup_timeout_s": PATIENCE_S}


def kept(run: Path) -> Comparison:
    return read_json(run / "bench" / "comparison.json", Comparison, "layerboost bench")


def wait_for_load(file: Path, port: int) -> None:
    """Until a file is there and the server answers several requests at once."""
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


def test_a_terminated_benchmark_takes_everything_with_it(
    tmp_path: Path, free_port: int, survivors: Callable[[float], list[str]]
) -> None:
    base, run = save_tiny(tmp_path / "base"), tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(json.dumps({"bench": settings(free_port)}))
    command = [
        sys.executable,
        "-m",
        "layerboost.cli",
        "bench",
        base,
        "--run",
        run,
        "--config",
        tmp_path / "recipe.yaml",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for_load(run / "bench" / "base-c1-r0.json", free_port)
        process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert told.rstrip().endswith("interrupted; run the same command again to go on")
    assert survivors(2) == []
    assert [entry.file for entry in kept(run).measurements] == ["base-c1-r0.json"]
    assert json.loads((run / "run.json").read_text())["stages"][-1]["status"] == "interrupted"
