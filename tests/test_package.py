"""The wheel: built from this checkout, installed into an environment of its own, run from there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from tiny import save_text, save_tiny

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `layerboost` of an environment that has the wheel, and its dependencies from this one. Needs no network."""
    for name in ("build", "hatchling"):
        pytest.importorskip(name, reason='pip install ".[dev]"')
    folder = tmp_path_factory.mktemp("package")
    build: list[str | Path] = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("layerboost-*.whl")
    venv.create(folder / "venv", symlinks=True)
    python = folder / "venv" / "bin" / "python"
    pip: list[str | Path] = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--no-deps",
        "--no-index",
        wheel,
    ]
    subprocess.run(pip, check=True, capture_output=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # Paths in a .pth file are searched last, and .pth files there are not read: an editable install is not found.
    (site / "dependencies.pth").write_text("\n".join(path for path in sys.path if "site-packages" in path))
    return python.with_name("layerboost")


def run(command: Path, *words: str | Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([command, *words], check=True, capture_output=True, text=True, env=environment).stdout


def files(folder: Path) -> set[str]:
    return {
        str(file.relative_to(folder))
        for file in folder.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }


@pytest.mark.multiprocess
def test_the_wheel_has_every_file(command: Path) -> None:
    (installed,) = command.parents[1].glob("lib/python*/site-packages/layerboost")
    recipes = {f"recipes/{file}" for file in files(ROOT / "recipes")}
    assert files(installed) == files(ROOT / "src" / "layerboost") | recipes


@pytest.mark.multiprocess
def test_the_wheel_has_its_commands_and_recipes(command: Path) -> None:
    assert "measure" in run(command, "--help")
    recipes = json.loads(run(command, "ls", "recipes", "--json"))
    assert {Path(file).name for file in recipes.values()} == {file.name for file in (ROOT / "recipes").glob("*.yaml")}
    assert all(Path(file).is_relative_to(command.parents[1]) for file in recipes.values())
    assert "llama" in run(command, "ls", "families")


@pytest.mark.multiprocess
def test_the_wheel_checks_a_model(command: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="check looks for vLLM")
    model, text = save_tiny(tmp_path / "model"), save_text(tmp_path / "text.jsonl", words=200_000)
    settings = {
        "measure.windows": "[16]",
        "measure.tokens": 512,
        "measure.retrieval_prompts": 0,
        "text.sequence_tokens": 64,
        "heal.fit_tokens": 0,
        "heal.attention_tokens": 512,
        "heal.tokens": 512,
        "evaluate.tasks": "[]",
        "evaluate.perplexity_tokens": 512,
        "bench.input_tokens": 16,
        "bench.output_tokens": 16,
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    found = json.loads(run(command, "check", model, "--text", text, "--run", tmp_path / "run", "--json", *words))
    assert (found["family"], found["layers"]) == ("llama", 4)
