"""The benchmark scripts start: what they import and the options they take exist. The GPU kit runs, in tiny sizes."""

from __future__ import annotations

import json
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = [file for file in sorted(BENCHMARKS.rglob("*.py")) if "__main__" in file.read_text()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_starts(script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    assert "options:" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_the_gpu_kit_runs_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All parts, most of them in this process; the page; what has ended does not run again."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    kit = runpy.run_path(str(BENCHMARKS / "gpu" / "kit.py"))
    for part in ("attention", "sweep", "heal"):
        kit["measure"](part, kit["TINY"], tmp_path)
        rows = json.loads((tmp_path / f"{part}.json").read_text())
        assert [row for row in rows if "error" in row or row.get("holds") is False] == []
    capsys.readouterr()
    kit["main"].__globals__.update(TOTAL_S=1e6, LIMITS_S=dict.fromkeys(kit["PARTS"], 1e6))  # on a busy machine
    monkeypatch.setattr(sys, "argv", ["kit.py", "--tiny", "--out", str(tmp_path), "--parts", "decode", "tests"])
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            kit["main"]()
        assert ended.value.code == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["decode ...", "tests ..."], "each ran once"
    results = json.loads((tmp_path / "results.json").read_text())
    assert {row["way"] for row in results["parts"]["decode"]["rows"]} == {"norm and head", "full", "none", "window 16"}
    assert "skipped" in results["parts"]["tests"]["rows"][-1]["result"]
    assert (tmp_path / "results.md").read_text() in printed.out


def test_the_gpu_kit_lists_the_projects_own_versions() -> None:
    project = tomllib.loads((BENCHMARKS.parent / "pyproject.toml").read_text())["project"]
    known = {*project["dependencies"], *project["optional-dependencies"]["dev"]}
    lines = (BENCHMARKS / "gpu" / "requirements.txt").read_text().splitlines()
    listed = {line for line in lines if re.match("[a-z]", line)}
    listed |= set(re.findall(r'"((?:accelerate|peft)\S+)"', (BENCHMARKS.parent / "docs/guide/gpus.md").read_text()))
    assert {"accelerate>=1.10,<2", "transformers>=5.19,<6"} <= listed <= known
