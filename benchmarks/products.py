"""oneDNN's float32 products against PyTorch's own, at a model's shapes.

    python benchmarks/products.py [--hidden 576] [--inner 1536] [--vocabulary 49152] [--rank 64] [--rows 1 32 512 2048]

The three products of a linear layer: its output, the gradient to its input, the gradient to its weight. Both ways in
turn, the median of --rounds. Prints a line for each, the ratios, then JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd import grad
from torch.nn import functional as F

from layerboost.model import linear


def seconds(ways: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median of each way, in turn."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def compare(rows: int, width: int, out: int, rounds: int) -> dict[str, Any]:
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
    result: dict[str, Any] = {"rows": rows, "width": width, "out": out}
    for name, ways in products.items():
        spent = seconds(ways, rounds)
        gflops = {way: 2e-9 * rows * width * out / taken for way, taken in spent.items()}
        result[name] = {"gflop_per_s": gflops, "ratio": spent["pytorch"] / spent["onednn"]}
    parts = (f"{name} {each['ratio']:.2f}" for name, each in result.items() if isinstance(each, dict))
    print(f"{rows:>5} tokens, {width} to {out}: " + ", ".join(parts))
    return result


def main() -> None:
    """Compare, print, then JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--inner", type=int, default=1536)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--rank", type=int, default=64, help="of an adapter, whose two layers are thin")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 512, 2048])
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args()
    linear.IS_FASTER, linear.FEWEST_TOKENS = True, 1  # that is the question here
    hidden, inner = given.hidden, given.inner
    shapes = [(hidden, hidden), (hidden, inner), (inner, hidden), (hidden, given.vocabulary)]
    shapes += [(hidden, given.rank), (given.rank, inner)]
    found = [compare(rows, *shape, given.rounds) for rows in given.rows for shape in shapes]
    print(json.dumps({"cpu_capability": torch.backends.cpu.get_cpu_capability(), "products": found}, indent=1))


if __name__ == "__main__":
    main()
