"""oneDNN's float32 products against PyTorch's own, at a model's shapes.

    python benchmarks/products.py [--hidden 576] [--inner 1536] [--vocabulary 49152] [--rank 64] [--rows 1 32 512 2048]

The three products of a linear layer: its output, the gradient to its input, the gradient to its weight. Prints a line
for each shape, the ratios, then JSON.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import timing
import torch
from torch.autograd import grad
from torch.nn import functional as F

from layerboost.model import linear


def compare(rows: int, width: int, out: int, repeats: int) -> dict[str, Any]:
    """One layer `[out, width]` on `rows` tokens; each gradient by itself, as of a frozen layer or of an adapter."""
    x, weight, gradient = torch.randn(rows, width), torch.randn(out, width), torch.randn(rows, out)
    layers = {"pytorch": F.linear, "onednn": linear.linear}
    products: dict[str, dict[str, Callable[[], Any]]] = {
        "output": {way: partial(layer, x, weight) for way, layer in layers.items()}
    }
    for name in ("to input", "to weight"):
        leaf = (x if name == "to input" else weight).clone().requires_grad_()
        given = (leaf, weight) if name == "to input" else (x, leaf)
        made = {way: layer(*given) for way, layer in layers.items()}
        products[name] = {way: partial(grad, made[way], leaf, gradient, retain_graph=True) for way in layers}
    result: dict[str, Any] = {}
    for name, ways in products.items():
        spent = timing.in_turn({way: partial(timing.seconds, call) for way, call in ways.items()}, repeats)
        gflops = {way: 2e-9 * rows * width * out / statistics.median(taken) for way, taken in spent.items()}
        result[name] = {"gflop_per_s": gflops, "ratio": timing.ratio(spent["pytorch"], spent["onednn"])}
    print(
        f"{rows:>5} tokens, {width} to {out}: "
        + ", ".join(f"{name} {timing.times(found['ratio'])}" for name, found in result.items())
    )
    return {"rows": rows, "width": width, "out": out, **result}


def main() -> None:
    """Compare, print, then JSON."""
    parser = timing.parser(__doc__, repeats=15)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--rank", type=int, default=64, help="of an adapter, whose two layers are thin")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 512, 2048])
    asked = parser.parse_args()
    linear.IS_FASTER, linear.FEWEST_TOKENS = True, 1  # that is the question here
    hidden, inner, rank = asked.hidden, asked.inner, asked.rank
    shapes = [(hidden, hidden), (hidden, inner), (inner, hidden), (hidden, asked.vocabulary)]
    shapes += [(hidden, rank), (rank, inner)]
    timing.show([compare(rows, *shape, asked.repeats) for rows in asked.rows for shape in shapes], asked)


if __name__ == "__main__":
    main()
