"""Draw the figure of the README: quality loss against KV bytes, before healing, with 95 % intervals.

    python benchmarks/figure.py [--out docs/images/quality.svg]

The numbers are those of docs/results/selection.json, measured at commit 87df34c (docs/results/selection.md).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "selection.json"
TEXT = "books.jsonl.gz"
# Method in the file, label, colour.
SERIES = (
    ("LLM-Drop", "LLM-Drop (attention dropped by cosine)", "#737373"),
    ("paper's tiers", "the paper's rule (three tiers by removal score)", "#d55e00"),
    ("uniform", "full layers evenly spaced, the rest sliding", "#009e73"),
    ("budget, a fifth retrieval", "layerboost", "#0072b2"),
)
WIDTH, HEIGHT = 860, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 520, 40, 340
KV = (0.2, 0.55)  # fraction of the base's bytes, linear
KL = (0.05, 5.0)  # nats per token, logarithmic


def x(kv: float) -> float:
    """Return the horizontal position of a fraction of the base's KV bytes."""
    return LEFT + (RIGHT - LEFT) * (kv - KV[0]) / (KV[1] - KV[0])


def y(kl: float) -> float:
    """Return the vertical position of a KL."""
    return BOTTOM - (BOTTOM - TOP) * math.log(kl / KL[0]) / math.log(KL[1] / KL[0])


def figure(rows: list[dict[str, Any]]) -> ElementTree.Element:
    """Return the SVG of `rows`, the plans of selection.json."""
    svg = ElementTree.Element("svg")

    def add(tag: str, text: str | None = None, **attributes: str | float) -> None:
        shown = {
            name.replace("_", "-"): f"{value:.1f}" if isinstance(value, float) else str(value)
            for name, value in attributes.items()
        }
        ElementTree.SubElement(svg, tag, shown).text = text

    svg.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {HEIGHT}"}
    svg.attrib |= {"font-family": "sans-serif", "font-size": "13", "fill": "#222"}
    add("rect", width="100%", height="100%", fill="white")
    add("text", "KL to the base before healing, nats per token of unseen books", x=LEFT - 50, y=TOP - 16)
    for kl in (0.05, 0.1, 0.2, 0.5, 1, 2, 5):
        add("line", x1=LEFT, y1=y(kl), x2=RIGHT, y2=y(kl), stroke="#ddd")
        add("text", f"{kl:g}", x=LEFT - 8, y=y(kl) + 4, text_anchor="end")
    for kv in (0.2, 0.3, 0.4, 0.5):
        add("line", x1=x(kv), y1=BOTTOM, x2=x(kv), y2=BOTTOM + 5, stroke="#222")
        add("text", f"{kv:.0%}", x=x(kv), y=BOTTOM + 20, text_anchor="middle")
    below = "KV bytes per request of 1,024 tokens, as a fraction of the base's"
    add("text", below, x=(LEFT + RIGHT) / 2, y=BOTTOM + 42, text_anchor="middle")
    for method, label, colour in SERIES:
        plans = [row for row in rows if row["method"] == method and row["context_tokens"] == 1024]
        points = [(row["cost"], row["measured"][TEXT]["kl"]) for row in sorted(plans, key=lambda row: row["cost"])]
        path = " ".join(f"{x(kv):.1f},{y(kl['mean']):.1f}" for kv, kl in points)
        add("polyline", points=path, fill="none", stroke=colour, stroke_width="1.5")
        for kv, kl in points:
            low, high = (y(kl["mean"] + sign * 1.96 * kl["standard_error"]) for sign in (-1, 1))
            add("line", x1=x(kv), y1=low, x2=x(kv), y2=high, stroke=colour, stroke_width="1.5")
            for end in (low, high):
                add("line", x1=x(kv) - 5, y1=end, x2=x(kv) + 5, y2=end, stroke=colour, stroke_width="1.5")
            add("circle", cx=x(kv), cy=y(kl["mean"]), r=2.5, fill=colour)
        add("text", label, x=RIGHT + 8, y=y(points[-1][1]["mean"]) + 4, fill=colour)
    ElementTree.indent(svg)
    return svg


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS.parents[1] / "images" / "quality.svg")
    svg = figure(json.loads(RESULTS.read_text())["rows"])
    parser.parse_args().out.write_text(ElementTree.tostring(svg, encoding="unicode") + "\n")


if __name__ == "__main__":
    main()
