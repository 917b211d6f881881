"""The report in a real browser: it draws, it answers the mouse, it opens at once, and it asks for nothing."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from browser import Tab, in_browser
from made_run import make_run

from layerboost.errors import ConfigError
from layerboost.reporting import images
from layerboost.reporting.stage import run_report

CHARTS = [
    *("sensitivity", "sensitivity-retrieval", "frontier", "tasks", "positions", "retrieval"),
    *("heal-attention", "heal-lora", "throughput", "accuracy", "decode-latency", "decode-memory"),
]


def has_browser() -> bool:
    try:
        return bool(images.find_browser())
    except ConfigError:
        return False


needs_browser = pytest.mark.skipif(not has_browser(), reason="chromium is not installed")


@needs_browser
def test_a_browser_draws_every_chart_and_hovering_tells_values(tmp_path: Path) -> None:
    file = run_report(make_run(tmp_path / "run", "odd </script> name"))["report"]

    async def visit(tab: Tab) -> None:
        await tab.open(file)
        # Time of one core until all of the text stands; the charts follow from the top.
        assert await tab.cpu_seconds() < 2
        await tab.until("[...document.querySelectorAll('.plot')].every(plot => plot.querySelector('.main-svg'))")
        plots = "[...document.querySelectorAll('.plot')]"
        assert await tab.value(f"{plots}.map(plot => plot.id)") == [f"chart-{name}" for name in CHARTS]
        marks = "plot.querySelectorAll('.main-svg').length && plot.querySelectorAll('path.point, path.js-line').length"
        assert all(await tab.value(f"{plots}.map(plot => {marks})"))
        shown = "[...document.querySelectorAll('.layers .values')].filter(each => each.checkVisibility())"
        shown += ".map(each => each.innerText)"
        assert await tab.value(shown) == []
        await tab.point_at(".layers > li:nth-child(6)")
        [text] = await tab.value(shown)
        assert text.startswith("layer 5: none\n")
        assert "sliding 64 + sink: KL 0." in text
        for name in CHARTS:
            point = f"#chart-{name} .scatterlayer .trace:first-child path.point"
            if not await tab.value(f"!!document.querySelector({json.dumps(point)})"):
                continue  # a line of many values has no points
            await tab.point_at(point)
            label = await tab.value(HOVERED % name)
            assert any(character.isdigit() for character in label), name
        assert tab.complaints == []
        assert tab.requested == [file.as_uri()]

    in_browser(tmp_path, visit)


# Plotly waits for the mouse to rest, and for a frame to draw in.
HOVERED = """(async () => {
  for (let attempt = 0; attempt < 200; attempt++) {
    const label = document.querySelector('#chart-%s .hoverlayer').textContent;
    if (label) return label;
    await new Promise(done => setTimeout(done, 25));
  }
  return "";
})()"""


@needs_browser
def test_charts_become_png_files_that_the_markdown_shows(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run_report(run, png=True)
    files = sorted((run / "figures").iterdir())
    assert {file.stem for file in files} == set(CHARTS)
    for file in files:
        data = file.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", data[16:24]) == (1800, 920)
        assert 10_000 < len(data) < 500_000
    text = (run / "report.md").read_text()
    assert all(f"](figures/{name}.png)" in text for name in CHARTS)
    run_report(run)
    assert "figures/" not in (run / "report.md").read_text()


def test_without_a_browser_the_ways_to_figures_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(tmp_path / "run")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match=r"none is installed(.|\n)*layerboost report --png"):
        run_report(run, png=True)
    assert not (run / "report.html").exists()
