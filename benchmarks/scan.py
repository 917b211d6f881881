"""The scan of KV heads against the exact sweep.

    python benchmarks/scan.py RUN [--draws 6] [--scan-tokens 4096] [--full 24]

RUN holds a sensitivity.json with exact scores of KV heads (measure.unit kv_head) at one window, and its recipe. Prints
JSON:

- `heads`: rank correlation of the two scores over all heads, their ratio, and how many of the best heads agree;
- `answers`: rank correlation of what answers lose, of the recipe's retrieval prompts, and the first three of each;
- `layers`: in how many layers the scores of heads add up to the layer's within a quarter;
- `unseen_kl_exact`, `unseen_kl_scan`: of the plans with the `--full` best heads full by either score, on text that
  nothing was chosen on.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timing
from scipy.stats import spearmanr

from layerboost.measuring.scan import scan, scan_answers
from layerboost.measuring.sweep import head_candidates
from layerboost.model.base import open_base
from layerboost.model.sinks import calibrate_sinks
from layerboost.model.stream import LayerStream
from layerboost.probes.calibration import load_prompts
from layerboost.probes.probe import TextProbe
from layerboost.recipe import load_recipe
from layerboost.runtime import start_runtime
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.sensitivity import LayerSensitivity, Sensitivity, read_sensitivity
from layerboost.text import load_tokens

UNSEEN_TOKENS = 8192


def plan_of(sensitivity: Sensitivity, sites: Sequence[LayerPlan], full: set[int]) -> list[LayerPlan]:
    """The plan in which the sites `full` keep full attention and all others have the window."""
    heads = sensitivity.model.kv_heads
    layers = []
    for layer in range(sensitivity.model.layers):
        own = [index for index, site in enumerate(sites) if site.layer == layer]
        kept = tuple(
            sorted(
                head for index in own if index in full for head in set(range(heads)) - set(sites[index].full_kv_heads)
            )
        )
        if len(kept) == heads:
            layers.append(LayerPlan(layer=layer, attention="full"))
        else:
            layers.append(sites[own[0]].model_copy(update={"full_kv_heads": kept}))
    return layers


def best(values: np.ndarray, count: int) -> set[int]:
    """The sites with the highest values."""
    return set(np.argsort(-values)[:count].tolist())


def adds_up(entry: LayerSensitivity) -> bool:
    """Whether a layer's window loses as much KL as its heads' windows together, within a quarter."""
    whole = min(variant.scores["kl"].mean for variant in entry.variants if variant.window)
    return abs(sum(variant.scores["kl"].mean for variant in entry.heads) / whole - 1) <= 0.25


def answers(sites: Sequence[LayerPlan], exact: np.ndarray, scanned: np.ndarray) -> dict[str, Any]:
    """Rank correlation of two scores, and the first three sites of each as layer, full KV heads, both scores."""

    def first(values: np.ndarray) -> list[Any]:
        order = np.argsort(-values)[:3].tolist()
        return [
            [sites[index].layer, sites[index].full_kv_heads, exact[index], float(scanned[index])] for index in order
        ]

    return {"spearman": float(spearmanr(exact, scanned).statistic), "exact": first(exact), "scan": first(scanned)}


def main() -> None:
    """Print what the docstring above says."""
    parser = timing.parser(__doc__)
    parser.add_argument("run", type=Path)
    for name, default in (("draws", 6), ("scan-tokens", 4096), ("full", 24)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    recipe = load_recipe([asked.run / "recipe.yaml"], {})
    sensitivity, base = read_sensitivity(asked.run), open_base(recipe, asked.run, start_runtime(recipe))
    model = base.load()
    size, text = recipe.measure.batch_sequences, recipe.text
    every = load_tokens(text, base.tokenizer, "calibration", asked.scan_tokens + UNSEEN_TOKENS, run=asked.run)
    batches = list(every.batches(size))
    own = asked.scan_tokens // (size * text.sequence_tokens)
    seen, unseen = batches[:own], batches[own:]
    [window] = {each.window for entry in sensitivity.layers for each in entry.heads if each.window}
    sinks = calibrate_sinks(model, seen, range(sensitivity.model.layers), [window])
    heads = sensitivity.model.kv_heads
    sites = [site for entry in sensitivity.layers for site in head_candidates(entry.variants, entry.layer, heads, 1)]
    exact = np.array([variant.scores["kl"].mean for entry in sensitivity.layers for variant in entry.heads])
    clock = time.monotonic()
    scanned = scan(model, seen, sites, sinks, asked.draws, recipe.seed).double().square().mean((0, 1)).numpy() / 2
    result: dict[str, Any] = {
        "scan_s": round(time.monotonic() - clock, 1),
        "heads": {
            "spearman": float(spearmanr(exact, scanned).statistic),
            "ratio": float((scanned / exact)[exact > np.median(exact)].mean()),
            f"of_the_best_{asked.full}": len(best(exact, asked.full) & best(scanned, asked.full)),
        },
        "layers": sum(adds_up(entry) for entry in sensitivity.layers),
    }
    if prompts := load_prompts(recipe, base.tokenizer, asked.run):
        retrieval = [each.scores["retrieval"].mean for entry in sensitivity.layers for each in entry.heads]
        lost = scan_answers(model, prompts, sites, sinks).mean(0).numpy()
        result["answers"] = answers(sites, np.array(retrieval), lost)
    probe = TextProbe(LayerStream(model, sinks), unseen)
    for name, scores in (("exact", exact), ("scan", scanned)):
        [losses] = probe.losses([plan_of(sensitivity, sites, best(scores, asked.full))])
        result[f"unseen_kl_{name}"] = float(losses["kl"].mean())
    timing.show(result, asked)


if __name__ == "__main__":
    main()
