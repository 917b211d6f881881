"""The panels of layers, healing and provenance; each names the files its numbers come from."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import partial

import yaml

from layerboost.reporting.figures import SENSITIVITIES, healing_figure, sensitivity_figure
from layerboost.reporting.page import Chart, Panel, Table, tabulate
from layerboost.reporting.sources import MADE_BY, Sources, absent, model_order
from layerboost.reporting.text import ABSENT, duration, number, with_error
from layerboost.schemas.healing import MetricLine
from layerboost.schemas.plan import PlanFile
from layerboost.schemas.run import StageRecord
from layerboost.schemas.sensitivity import LayerSensitivity, Sensitivity, Variant
from layerboost.strategies import label

STAGES = {
    "fit": "Before them: least squares",
    "attention": "Stage 1: attention distillation",
    "lora": "Stage 2: LoRA distillation",
}


def layers_panel(sources: Sources) -> Panel:
    """Return the layer map and the sensitivities it was chosen from."""
    plan, sensitivity = sources.plan, sources.sensitivity
    missing, warnings, notes, charts, tables = [], [], [], [], []
    if plan is None:
        missing.append(absent("plan.yaml"))
    if sensitivity is None:
        missing.append(absent("sensitivity.json"))
    else:
        if not sensitivity.complete:
            warnings.append(
                f"sensitivity.json holds {len(sensitivity.layers)} of {sensitivity.model.layers} layers: "
                f"`{MADE_BY['sensitivity.json']}` continues it"
            )
        notes.append(
            "Damage of one replacement at a time, all other layers left as they are, over "
            f"{sensitivity.tokens:,} tokens in {sensitivity.sequences:,} sequences; bars are one standard error. "
            f"Base NLL: {with_error(sensitivity.base_nll)} nats per token."
        )
        variants = [variant for entry in sensitivity.layers for variant in entry.variants]
        if hidden := sum(variant.scores["kl"].mean <= 0 for variant in variants):
            notes.append(f"{hidden} of {len(variants)} values are zero or below, off the log axis; the table has them.")
        if variants:
            for metric in _metrics(sensitivity):
                name = "chart-sensitivity" + (f"-{metric}" if metric != "kl" else "")
                title = SENSITIVITIES[metric][0]
                charts.append(Chart(name, title, sensitivity_figure(sensitivity, plan, metric)))
            tables.append(_sensitivity_table(sensitivity))
            tables += [_heads_table(sensitivity, plan, metric) for metric in _head_metrics(sensitivity)]
    if sources.plan_is_stale:
        warnings.append("sensitivity.json changed after plan.yaml was made from it: run `layerboost plan` again")
    files = ["plan.yaml", "sensitivity.json"]
    lines = _layer_lines(sensitivity) if sensitivity else {}
    return Panel("layers", "Layers", files, missing, warnings, plan, lines, notes, charts, tables)


def _metrics(sensitivity: Sensitivity) -> list[str]:
    """Return those of SENSITIVITIES that were measured."""
    found = {metric for entry in sensitivity.layers for variant in entry.variants for metric in variant.scores}
    return [metric for metric in SENSITIVITIES if metric in found]


def _layer_lines(sensitivity: Sensitivity) -> dict[int, list[str]]:
    """Return by layer a line per replacement: what it alone does to each metric."""

    def line(variant: Variant) -> str:
        scores = [
            f"{'KL' if metric == 'kl' else metric} {with_error(variant.scores[metric], signed=metric != 'kl')}"
            for metric in SENSITIVITIES
            if metric in variant.scores
        ]
        return f"{label(variant)}: {', '.join(scores)}"

    return {entry.layer: [line(variant) for variant in (*entry.variants, *entry.heads)] for entry in sensitivity.layers}


def _sensitivity_table(sensitivity: Sensitivity) -> Table:
    Row = tuple[int, Variant]

    def score(metric: str, row: Row) -> str:
        found = row[1].scores.get(metric)
        return with_error(found, signed=metric != "kl") if found else ABSENT

    titles = {"kl": "KL, nats per token", "nll": "NLL − base, nats per token"}
    titles |= {metric: f"{metric}: {SENSITIVITIES[metric][1]}" for metric in _metrics(sensitivity) if metric != "kl"}
    columns: dict[str, Callable[[Row], str]] = {
        "layer": lambda row: str(row[0]),
        "replaced by": lambda row: label(row[1]),
        **{title: partial(score, metric) for metric, title in titles.items()},
    }
    rows = [(entry.layer, variant) for entry in sensitivity.layers for variant in (*entry.variants, *entry.heads)]
    return tabulate("Every sensitivity", rows, columns, text_columns=(0, 1), folded=True)


def _head_metrics(sensitivity: Sensitivity) -> list[str]:
    """Return the metrics of KV heads that plans are made from, none if heads were not measured."""
    found = {metric for entry in sensitivity.layers for variant in entry.heads for metric in variant.scores}
    return [metric for metric in ("kl", "retrieval") if metric in found]


def _heads_table(sensitivity: Sensitivity, plan: PlanFile | None, metric: str) -> Table:
    """Return the map of layers and KV heads: one metric of each head alone under the plan's window, or the shortest."""
    heads = range(sensitivity.model.kv_heads)
    measured = {variant.window for entry in sensitivity.layers for variant in entry.heads if variant.window}
    window = plan.window if plan and plan.window in measured else min(measured)
    full = (
        {entry.layer: [*heads] if not entry.changed else entry.full_kv_heads for entry in plan.layers} if plan else {}
    )

    def cell(head: int, entry: LayerSensitivity) -> str:
        for variant in entry.heads:
            if variant.window == window and head not in variant.full_kv_heads:
                kept = " (full)" if head in full.get(entry.layer, ()) else ""
                return with_error(variant.scores[metric], signed=metric != "kl") + kept
        return ABSENT

    columns: dict[str, Callable[[LayerSensitivity], str]] = {"layer": lambda entry: str(entry.layer)}
    columns |= {f"KV head {head}": partial(cell, head) for head in heads}
    title = f"{SENSITIVITIES[metric][1]}: each KV head alone under a window of {window}"
    title += "; (full): the plan keeps it" if plan else ""
    return tabulate(title, sensitivity.layers, columns, folded=True)


def healing_panel(sources: Sources) -> Panel:
    """Return loss against tokens of the stages that have one, and the validation points."""
    panel = partial(Panel, "healing", "Healing", ["heal/metrics.jsonl"])
    if sources.metrics is None:
        return panel([absent("heal/metrics.jsonl")])
    if not sources.metrics:
        return panel(["heal/metrics.jsonl holds no line yet: run `layerboost heal`"])
    charts, rows = [], []
    for stage, title in STAGES.items():
        lines = [line for line in sources.metrics if line.stage == stage]
        if any(line.loss is not None for line in lines):
            charts.append(Chart(f"chart-heal-{stage}", title, healing_figure(lines)))
        if lines:
            rows.append(_healing_row(title, lines))
    header = ["stage", "steps", "tokens", "time", "first loss", "last loss"]
    tables = [Table("Stages", header, rows)]
    validation = [line for line in sources.metrics if line.validation_kl is not None or line.validation_nll is not None]
    if validation:
        columns: dict[str, Callable[[MetricLine], str]] = {
            "stage": lambda line: line.stage,
            "step": lambda line: f"{line.step:,}",
            "tokens": lambda line: f"{line.tokens:,}",
            "KL, nats per token": lambda line: _number(line.validation_kl),
            "NLL, nats per token": lambda line: _number(line.validation_nll),
        }
        tables.append(tabulate("Validation", validation, columns, folded=len(validation) > 12))
    return panel(charts=charts, tables=tables)


def _number(value: float | None) -> str:
    return ABSENT if value is None else number(value, 4)


def _healing_row(title: str, lines: list[MetricLine]) -> list[str]:
    losses: list[float | None] = [line.loss for line in lines if line.loss is not None] or [None]
    last = lines[-1]
    taken = [f"{last.step:,}", f"{last.tokens:,}", duration(last.seconds)]
    return [title, *taken, _number(losses[0]), _number(losses[-1])]


def provenance_panel(sources: Sources) -> Panel:
    """Return what ran, when, where, on what, for how long, and with which settings."""
    missing, notes, tables = [], [], []
    stages = sources.history.stages if sources.history else []
    if not stages:
        missing.append(absent("run.json"))
    else:
        tables += [_stage_table(stages), _version_table(stages)]
        notes.append(_cost(stages))
    if prints := _fingerprints(sources):
        tables.append(Table("Fingerprints", ["what", "fingerprint", "recorded in"], prints, text_columns=(0, 1, 2)))
    if stages:
        # As typed: where this machine keeps the program is nobody's business.
        commands = [[record.stage, f"`{shlex.join(['layerboost', *record.argv[1:]])}`"] for record in stages]
        tables.append(Table("Commands", ["stage", "command"], commands, text_columns=(0, 1), folded=True))
    listing = None
    if sources.recipe is None:
        missing.append(absent("recipe.yaml"))
    else:
        text = yaml.safe_dump(sources.recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        listing = ("Recipe", text)
    files = ["run.json", "recipe.yaml"]
    return Panel("provenance", "Cost and provenance", files, missing, notes=notes, tables=tables, listing=listing)


def _cost(stages: list[StageRecord]) -> str:
    """Return the time by stage, attempts that failed or were interrupted included."""
    seconds: dict[str, float] = {}
    for record in stages:
        seconds[record.stage] = seconds.get(record.stage, 0.0) + record.seconds
    each = ", ".join(f"{stage} {duration(taken)}" for stage, taken in seconds.items())
    return f"{duration(sum(seconds.values()))} in all, every attempt counted: {each}."


def _stage_table(stages: list[StageRecord]) -> Table:
    columns: dict[str, Callable[[StageRecord], str]] = {
        "stage": lambda record: record.stage,
        "status": lambda record: record.status + (f": {record.error}" if record.error else ""),
        "time": lambda record: duration(record.seconds),
        "device": lambda record: record.device,
        "seed": lambda record: str(record.seed),
        "started (UTC)": lambda record: record.started[:16].replace("T", " "),
        "git revision": lambda record: (record.git_revision or ABSENT)[:12],
    }
    return tabulate("Stages run", stages, columns, text_columns=(0, 1, 3, 5, 6))


def _version_table(stages: list[StageRecord]) -> Table:
    found: dict[str, dict[str, None]] = {}
    for record in stages:
        for package, version in record.versions.items():
            found.setdefault(package, {})[version] = None
    return Table("Versions", ["package", "version"], [[name, ", ".join(seen)] for name, seen in found.items()], (0, 1))


def _fingerprints(sources: Sources) -> list[list[str]]:
    sensitivity, plan, quality, bench = sources.sensitivity, sources.plan, sources.quality, sources.bench
    rows = []
    if sensitivity:
        model = sensitivity.model
        rows += [(f"model {model.name}", model.fingerprint, "sensitivity.json")]
        rows += [("calibration text", sensitivity.text, "sensitivity.json")]
    if plan:
        rows += [(f"model {plan.model.name}", plan.model.fingerprint, "plan.yaml")]
        rows += [("what the plan does", plan.hash(), "plan.yaml")]
    if quality:
        file, models = "eval/comparison.json", quality.models
        rows += [(f"evaluated {name}", models[name], file) for name in model_order(models)]
        rows += [("held-out text", quality.text.fingerprint, file)] if quality.text else []
    if bench:
        file, models = "bench/comparison.json", bench.models
        rows += [(f"config of benchmarked {name}", models[name], file) for name in model_order(models)]
    return [[what, f"`{found}`", f"`{file}`"] for what, found, file in rows]
