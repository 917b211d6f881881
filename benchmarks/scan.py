"""The scan of KV heads against the exact sweep, and whether its interactions predict whole plans.

    python benchmarks/scan.py RUN [--draws 6] [--scan-tokens 4096] [--plans 50] [--full 24] [--prompts 64]

RUN holds a sensitivity.json with exact scores of KV heads (measure.unit kv_head) at one window, and its recipe. Prints
JSON:

- `heads`: rank correlation of the two scores over all heads, their ratio, and how many of the best heads agree;
- `answers`: the same for what answers lose, of the recipe's retrieval prompts, with the first three heads of each;
- `prompts`: by number of prompts in a set, the fraction of the best heads that two disjoint sets of the `--prompts`
  prompts share, as the mean of 50 pairs of sets; of the 6 best, and of the `--full` best;
- `layers`: in how many layers the scores of heads add up to the layer's within a quarter;
- `plans`: of random plans with `--full` full KV heads, measured on the scan's text: rank correlation and ratio of each
  prediction (sums of exact scores; the scan's quadratic form; sums plus its interactions, `mixed`);
- `chosen`: the plan that each way chooses, measured on text that nothing was chosen on. `mixed` is a local search by
  swaps, with the interactions shrunk by the factor in its name.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
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


def plan_of(sensitivity: Sensitivity, sites: Sequence[LayerPlan], full: frozenset[int]) -> list[LayerPlan]:
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


def stability(lost: np.ndarray, full: int) -> dict[int, list[float]]:
    """By number of prompts: the fraction of the 6 and of the `full` best sites that two disjoint sets of prompts share;
    `lost`: `[prompts, sites]`."""
    draw, found = np.random.default_rng(0), {}
    for prompts in (2, 4, 8, 16, 32):
        orders = [draw.permutation(len(lost)) for _ in range(50)] if 2 * prompts <= len(lost) else []
        means = [[lost[order[start : start + prompts]].mean(0) for start in (0, prompts)] for order in orders]
        found[prompts] = [
            float(np.mean([len(best(one, count) & best(other, count)) / count for one, other in means]))
            for count in (6, full)
            if means
        ]
    return found


def swapped(start: frozenset[int], count: int, loss: Callable[[frozenset[int]], float]) -> frozenset[int]:
    """The best set that single swaps reach from `start`."""
    kept, least = start, loss(start)
    while True:
        near = [kept - {out} | {new} for out in kept for new in range(count) if new not in kept]
        found = min(near, key=loss)
        if (now := loss(found)) >= least - 1e-9:
            return kept
        kept, least = found, now


def main() -> None:
    """Print what the docstring above says."""
    parser = timing.parser(__doc__)
    parser.add_argument("run", type=Path)
    for name, default in (("draws", 6), ("scan-tokens", 4096), ("plans", 50), ("full", 24), ("prompts", 64)):
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
    products = scan(model, seen, sites, sinks, asked.draws, recipe.seed).flatten(0, 1).double().numpy()
    took = time.monotonic() - clock
    gram = products.T @ products / len(products) / 2
    single = np.diag(gram)
    result: dict[str, Any] = {
        "scan_s": round(took, 1),
        "heads": {
            "spearman": float(spearmanr(exact, single).statistic),
            "ratio": float((single / exact)[exact > np.median(exact)].mean()),
            f"of_the_best_{asked.full}": len(best(exact, asked.full) & best(single, asked.full)),
        },
        "layers": sum(adds_up(entry) for entry in sensitivity.layers),
    }
    count = len(sites)
    if prompts := load_prompts(recipe, base.tokenizer, asked.run):
        retrieval = [each.scores["retrieval"].mean for entry in sensitivity.layers for each in entry.heads]
        result["answers"] = answers(
            sites, np.array(retrieval), scan_answers(model, prompts, sites, sinks).mean(0).numpy()
        )
        settings = recipe.measure.model_copy(update={"retrieval_prompts": asked.prompts})
        more = load_prompts(recipe.model_copy(update={"measure": settings}), base.tokenizer, asked.run)
        result["prompts"] = stability(scan_answers(model, more, sites, sinks).numpy(), asked.full)
    print(json.dumps(result), flush=True)

    def predictions(full: frozenset[int]) -> dict[str, float]:
        windowed = np.array([index not in full for index in range(count)], dtype=float)
        sums, scanned = float(windowed @ exact), float(windowed @ gram @ windowed)
        between = scanned - float(windowed @ single)
        return {"sum": sums, "scan": scanned, "mixed": sums + between, "half": sums + between / 2}

    stream = LayerStream(model, sinks)
    probe, other = TextProbe(stream, seen[:2]), TextProbe(stream, unseen)

    def measured(full: frozenset[int], by: TextProbe) -> float:
        [losses] = by.losses([plan_of(sensitivity, sites, full)])
        return float(losses["kl"].mean())

    starts = {"sum": frozenset(best(exact, asked.full)), "scan_alone": frozenset(best(single, asked.full))}
    starts["mixed"] = swapped(starts["sum"], count, lambda full: predictions(full)["mixed"])
    starts["half"] = swapped(starts["sum"], count, lambda full: predictions(full)["half"])
    result["chosen"] = {
        name: {"unseen_kl": measured(full, other), **predictions(full)} for name, full in starts.items()
    }
    print(json.dumps(result, indent=1), flush=True)
    best_plan = sorted(starts["sum"])
    draws = drawn(best_plan, count, asked.plans)
    rows = [{"measured": measured(full, probe), **predictions(full)} for full in draws]
    result["plans"] = agreement(rows)
    print(json.dumps(result, indent=1))


def drawn(from_plan: list[int], count: int, plans: int) -> list[frozenset[int]]:
    """Random sets of as many of `count` sites as `from_plan` has, from nearly that one to any."""
    draw, sets = random.Random(0), []
    for _ in range(plans):
        kept = draw.sample(from_plan, draw.randrange(len(from_plan) + 1))
        rest = [index for index in range(count) if index not in kept]
        sets.append(frozenset(kept + draw.sample(rest, len(from_plan) - len(kept))))
    return sets


def agreement(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Rank correlation, mean ratio and root mean square logarithmic error of each prediction against `measured`."""
    real, found = np.array([row["measured"] for row in rows]), {}
    for name in rows[0].keys() - {"measured"}:
        values = np.array([row[name] for row in rows])
        found[name] = {
            "spearman": float(spearmanr(real, values).statistic),
            "ratio": float((values / real).mean()),
            "rms_log_error": float(np.sqrt(np.mean(np.log(values / real) ** 2))),
        }
    return found


if __name__ == "__main__":
    main()
