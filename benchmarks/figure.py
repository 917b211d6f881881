"""Draw the figures of the results, both before healing and with 95 % intervals.

    python benchmarks/figure.py [--out docs/images]

quality.svg: quality loss against KV bytes, from docs/results/selection.json, measured at commit 87df34c
(docs/results/selection.md). components.svg: each layer's attention and MLP, from
docs/results/components-sensitivity.json, measured at commit 5b192e9 (docs/results/components.md).
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

DOCS = Path(__file__).parents[1] / "docs"
TEXT = "books.jsonl.gz"
# Method in selection.json, label, colour.
METHODS = (
    ("LLM-Drop", "LLM-Drop (attention dropped by cosine)", "#737373"),
    ("paper's tiers", "the paper's rule (three tiers by removal score)", "#d55e00"),
    ("uniform", "full layers evenly spaced, the rest sliding", "#009e73"),
    ("budget, a fifth retrieval", "layerboost", "#0072b2"),
)
# Attention, MLP and its width in components-sensitivity.json, label, colour.
REPLACEMENTS = (
    ("full", "none", None, "MLP removed", "#d55e00"),
    ("full", "thin", 384, "MLP, a quarter of its neurons", "#004d3a"),
    ("full", "thin", 768, "MLP, half of its neurons", "#009e73"),
    ("full", "thin", 1152, "MLP, three quarters of its neurons", "#4db392"),
    ("none", "full", None, "attention removed", "#0072b2"),
)
WIDTH, HEIGHT = 860, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 520, 40, 340


@dataclass
class Chart:
    """An SVG with a linear horizontal axis and a logarithmic vertical one; `across`, `up`: their ends."""

    across: tuple[float, float]
    up: tuple[float, float]

    def __post_init__(self) -> None:
        self.svg = ElementTree.Element("svg")
        self.svg.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {HEIGHT}"}
        self.svg.attrib |= {"font-family": "sans-serif", "font-size": "13", "fill": "#222"}
        self.add("rect", width="100%", height="100%", fill="white")

    def x(self, value: float) -> float:
        """Return the horizontal position of a value."""
        return LEFT + (RIGHT - LEFT) * (value - self.across[0]) / (self.across[1] - self.across[0])

    def y(self, value: float) -> float:
        """Return the vertical position of a value."""
        low, high = self.up
        return BOTTOM - (BOTTOM - TOP) * math.log(value / low) / math.log(high / low)

    def add(self, tag: str, text: str | None = None, **attributes: str | float) -> None:
        """Add an element."""
        shown = {
            name.replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else str(value)
            for name, value in attributes.items()
        }
        ElementTree.SubElement(self.svg, tag, shown).text = text

    def axes(self, title: str, up: Iterable[float], across: dict[float, str], below: str) -> None:
        """Draw both axes: values with a line, values with a label, and what they are."""
        self.add("text", title, x=LEFT - 50, y=TOP - 16)
        for value in up:
            self.add("line", x1=LEFT, y1=self.y(value), x2=RIGHT, y2=self.y(value), stroke="#ddd")
            self.add("text", f"{value:g}", x=LEFT - 8, y=self.y(value) + 4, text_anchor="end")
        for value, label in across.items():
            self.add("line", x1=self.x(value), y1=BOTTOM, x2=self.x(value), y2=BOTTOM + 5, stroke="#222")
            self.add("text", label, x=self.x(value), y=BOTTOM + 20, text_anchor="middle")
        self.add("text", below, x=(LEFT + RIGHT) / 2, y=BOTTOM + 42, text_anchor="middle")

    def series(self, points: list[tuple[float, dict[str, Any]]], label: str, colour: str, beside: float) -> None:
        """Draw means with their intervals, and the label at the height of `beside`; points outside are left out."""
        points = [(at, score) for at, score in points if score["mean"] > self.up[0]]
        path = " ".join(f"{self.x(at):.1f},{self.y(score['mean']):.1f}" for at, score in points)
        self.add("polyline", points=path, fill="none", stroke=colour, stroke_width="1.5")
        for at, score in points:
            ends = (score["mean"] + sign * 1.96 * score["standard_error"] for sign in (-1, 1))
            low, high = (self.y(max(end, self.up[0])) for end in ends)
            self.add("line", x1=self.x(at), y1=low, x2=self.x(at), y2=high, stroke=colour, stroke_width="1.5")
            for end in (low, high):
                left, right = self.x(at) - 5, self.x(at) + 5
                self.add("line", x1=left, y1=end, x2=right, y2=end, stroke=colour, stroke_width="1.5")
            self.add("circle", cx=self.x(at), cy=self.y(score["mean"]), r=2.5, fill=colour)
        self.add("text", label, x=RIGHT + 8, y=beside + 4, fill=colour)


def quality() -> ElementTree.Element:
    """Return the figure of the README."""
    rows = json.loads((DOCS / "results" / "selection.json").read_text())["rows"]
    chart = Chart(across=(0.2, 0.55), up=(0.05, 5.0))  # fraction of the base's bytes; nats per token
    chart.axes(
        "KL to the base before healing, nats per token of unseen books",
        (0.05, 0.1, 0.2, 0.5, 1, 2, 5),
        {kv: f"{kv:.0%}" for kv in (0.2, 0.3, 0.4, 0.5)},
        "KV bytes per request of 1,024 tokens, as a fraction of the base's",
    )
    for method, label, colour in METHODS:
        plans = [row for row in rows if row["method"] == method and row["context_tokens"] == 1024]
        points = [(row["cost"], row["measured"][TEXT]["kl"]) for row in sorted(plans, key=lambda row: row["cost"])]
        chart.series(points, label, colour, chart.y(points[-1][1]["mean"]))
    return chart.svg


def components() -> ElementTree.Element:
    """Return the figure of docs/results/components.md."""
    layers = json.loads((DOCS / "results" / "components-sensitivity.json").read_text())["layers"]
    chart = Chart(across=(-0.5, len(layers) - 0.5), up=(0.005, 20.0))
    chart.axes(
        "KL to the base, one replacement at a time, nats per token of books",
        (0.01, 0.1, 1, 10),
        {layer: str(layer) for layer in range(0, len(layers), 5)},
        "layer",
    )
    for row, (attention, mlp, width, label, colour) in enumerate(REPLACEMENTS):
        points = [
            (entry["layer"], variant["scores"]["kl"])
            for entry in layers
            for variant in entry["variants"]
            if (variant["attention"], variant["mlp"], variant["mlp_width"]) == (attention, mlp, width)
        ]
        chart.series(points, label, colour, TOP + 40 + 22 * row)
    return chart.svg


FIGURES: dict[str, Callable[[], ElementTree.Element]] = {"quality.svg": quality, "components.svg": components}


def main() -> None:
    """Write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DOCS / "images", help="a directory")
    folder = parser.parse_args().out
    for name, draw in FIGURES.items():
        svg = draw()
        ElementTree.indent(svg)
        (folder / name).write_text(ElementTree.tostring(svg, encoding="unicode") + "\n")


if __name__ == "__main__":
    main()
