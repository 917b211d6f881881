"""Imports go down only, and files stay readable."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "layerboost"
# From the bottom up; a module may import from its own folder and from lower rows.
FLOORS = [
    {"errors", "terminal", "strategies"},
    {"files"},
    {"recipe"},
    {"schemas"},
    {"runtime"},
    {"run_folder", "costs", "rows"},
    {"text"},
    {"traffic", "retrieval"},
    {"model"},
    {"probes"},
    {"tasks", "vllm_plugin", "exporting"},
    {"engines"},
    {"converting", "measuring", "planning", "healing", "evaluating", "benching", "reporting"},
    {"check"},
    {"pipeline", "tables"},
    {"compare", "api"},
    {"cli"},
]
FILES = sorted(SOURCE.rglob("*.py"))


def floor(module: str) -> int:
    return next(index for index, names in enumerate(FLOORS) if module in names)


def imports(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("layerboost."):
            found.append(node.module)
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("layerboost.")]
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_go_down_only(file: Path) -> None:
    own = file.relative_to(SOURCE).with_suffix("").parts
    if own == ("__init__",):
        return
    for name in imports(file):
        parts = name.split(".")[1:]
        if parts[0] != own[0]:
            assert floor(parts[0]) < floor(own[0]), f"{file.name} imports {name}"


def test_floors_are_complete() -> None:
    tops = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert tops - {"__init__"} == set().union(*FLOORS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_files_and_functions_stay_short(file: Path) -> None:
    text = file.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, node.name


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_text_is_utf_8_in_every_locale(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        # A distribution's metadata have no encoding to choose.
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".read_text", ".write_text")):
            named = {keyword.arg for keyword in node.keywords}
            assert "encoding" in named or file.name == "plugin.py", f"line {node.lineno}"


def test_what_travels_in_a_checkpoint_stands_alone() -> None:
    joined = ("families", "attention", "caches", "linear_attention", "mlp", "modeling")
    for index, name in enumerate(joined):
        assert set(imports(SOURCE / "model" / f"{name}.py")) <= {f"layerboost.model.{each}" for each in joined[:index]}


def test_what_runs_inside_vllm_imports_the_model_alone() -> None:
    for file in (SOURCE / "vllm_plugin").glob("*.py"):
        assert all(name.startswith(("layerboost.model.", "layerboost.vllm_plugin.")) for name in imports(file)), file


def test_json_files_are_written_in_one_place() -> None:
    """Which refuses numbers that are not finite. Not files: arguments of processes, a request, a message, a row that is
    read; and a model's config as its library writes it."""
    others = {
        "engines/llama_cpp.py",
        "engines/transformers.py",
        "engines/vllm_server.py",
        "rows.py",
    }
    others |= {f"model/{name}.py" for name in ("base", "integrity", "tokenizer")}
    dumping = {str(file.relative_to(SOURCE)) for file in FILES if "json.dump" in file.read_text()}
    assert dumping - others == {"schemas/artifact.py"}
