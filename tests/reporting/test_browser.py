"""The report in a real browser: it draws, it answers the mouse, it opens at once, and it asks for nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from browser import Tab, find_browser, in_browser
from made_run import make_run

from layerboost.reporting.stage import run_report

CHARTS = [
    *("sensitivity", "sensitivity-retrieval", "frontier", "tasks", "positions", "retrieval"),
    *("heal-attention", "heal-lora", "throughput", "accuracy", "decode-latency", "decode-memory"),
]


@pytest.mark.skipif(find_browser() is None, reason="chromium is not installed")
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
        for name in CHARTS:
            point = f"#chart-{name} .scatterlayer .trace:first-child path.point"
            if not await tab.value(f"!!document.querySelector({json.dumps(point)})"):
                continue  # a line of many values has no points
            await tab.point_at(point)
            label = await tab.value(HOVERED % name)
            assert any(character.isdigit() for character in label), name
        assert await tab.value(f"{plots}.every(plot => plot.querySelectorAll('.modebar-btn').length == 1)")
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
