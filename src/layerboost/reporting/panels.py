"""The report's panels; each names the files its numbers come from, and the command that makes a missing one."""

from __future__ import annotations

import shlex

import yaml

from layerboost.artifacts import Sensitivity, StageRecord
from layerboost.healing.metrics import MetricLine
from layerboost.reporting.figures import SENSITIVITIES, healing_figure, sensitivity_figure
from layerboost.reporting.page import Chart, Panel, Table
from layerboost.reporting.sources import MADE_BY, Sources, absent, model_order
from layerboost.reporting.text import ABSENT, duration, number, strategy, with_error

STAGES = {
    "fit": "Before them: least squares",
    "attention": "Stage 1: attention distillation",
    "lora": "Stage 2: LoRA distillation",
}


def layers_panel(sources: Sources) -> Panel:
    """The layer map and the sensitivities it was chosen from."""
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
        hidden = sum(variant.scores["kl"].mean <= 0 for variant in variants)
        if hidden:
            notes.append(f"{hidden} of {len(variants)} values are zero or below, off the log axis; the table has them.")
        if variants:
            for metric in _metrics(sensitivity):
                name = "chart-sensitivity" + (f"-{metric}" if metric != "kl" else "")
                title = SENSITIVITIES[metric][0]
                charts.append(Chart(name, title, sensitivity_figure(sensitivity, plan, metric)))
            tables.append(_sensitivity_table(sensitivity))
    if sources.plan_is_stale:
        warnings.append("sensitivity.json changed after plan.yaml was made from it: run `layerboost plan` again")
    files = ["plan.yaml", "sensitivity.json"]
    lines = _layer_lines(sensitivity) if sensitivity else {}
    return Panel("layers", "Layers", files, missing, warnings, plan, lines, notes, charts, tables)


def _metrics(sensitivity: Sensitivity) -> list[str]:
    """Those of SENSITIVITIES that were measured."""
    found = {metric for entry in sensitivity.layers for variant in entry.variants for metric in variant.scores}
    return [metric for metric in SENSITIVITIES if metric in found]


def _layer_lines(sensitivity: Sensitivity) -> dict[int, list[str]]:
    """By layer, a line a replacement: what it alone does to each metric."""
    metrics = _metrics(sensitivity)
    return {
        entry.layer: [
            f"{strategy(variant.attention, variant.window, variant.sink)}: "
            + ", ".join(
                f"{'KL' if metric == 'kl' else metric} {with_error(variant.scores[metric], signed=metric != 'kl')}"
                for metric in metrics
                if metric in variant.scores
            )
            for variant in entry.variants
        ]
        for entry in sensitivity.layers
    }


def _sensitivity_table(sensitivity: Sensitivity) -> Table:
    further = [metric for metric in _metrics(sensitivity) if metric != "kl"]
    rows = [
        [
            str(entry.layer),
            strategy(variant.attention, variant.window, variant.sink),
            with_error(variant.scores["kl"]),
            with_error(variant.scores["nll"], signed=True),
            *(
                with_error(variant.scores[metric], signed=True) if metric in variant.scores else ABSENT
                for metric in further
            ),
        ]
        for entry in sensitivity.layers
        for variant in entry.variants
    ]
    header = ["layer", "replaced by", "KL, nats per token", "NLL − base, nats per token"]
    header += [f"{metric}: {SENSITIVITIES[metric][1]}" for metric in further]
    return Table("Every sensitivity", header, rows, text_columns=(0, 1), folded=True)


def healing_panel(sources: Sources) -> Panel:
    """Loss against tokens of the stages that have one, and the validation points."""
    files = ["heal/metrics.jsonl"]
    if sources.metrics is None:
        return Panel("healing", "Healing", files, [absent("heal/metrics.jsonl")])
    if not sources.metrics:
        return Panel("healing", "Healing", files, ["heal/metrics.jsonl holds no line yet: run `layerboost heal`"])
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
        cells = [
            [
                line.stage,
                f"{line.step:,}",
                f"{line.tokens:,}",
                ABSENT if line.validation_kl is None else number(line.validation_kl, 4),
                ABSENT if line.validation_nll is None else number(line.validation_nll, 4),
            ]
            for line in validation
        ]
        header = ["stage", "step", "tokens", "KL, nats per token", "NLL, nats per token"]
        tables.append(Table("Validation", header, cells, text_columns=(0,), folded=len(cells) > 12))
    return Panel("healing", "Healing", files, charts=charts, tables=tables)


def _healing_row(title: str, lines: list[MetricLine]) -> list[str]:
    losses = [line.loss for line in lines if line.loss is not None]
    ends = [number(losses[0], 4), number(losses[-1], 4)] if losses else [ABSENT, ABSENT]
    last = lines[-1]
    return [title, f"{last.step:,}", f"{last.tokens:,}", duration(last.seconds), *ends]


def provenance_panel(sources: Sources) -> Panel:
    """What ran, when, where, on what, for how long, and with which settings."""
    missing, notes = [], []
    tables = []
    if sources.history is None or not sources.history.stages:
        missing.append(absent("run.json"))
    else:
        stages = sources.history.stages
        tables += [_stage_table(stages), _version_table(stages)]
        notes.append(_cost(stages))
    prints = _fingerprints(sources)
    if prints:
        tables.append(Table("Fingerprints", ["what", "fingerprint", "recorded in"], prints, text_columns=(0, 1, 2)))
    if sources.history and sources.history.stages:
        # As typed: where this machine keeps the program is nobody's business.
        commands = [
            [record.stage, f"`{shlex.join(['layerboost', *record.argv[1:]])}`"] for record in sources.history.stages
        ]
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
    """Time by stage, attempts that failed or were interrupted included."""
    seconds: dict[str, float] = {}
    for record in stages:
        seconds[record.stage] = seconds.get(record.stage, 0.0) + record.seconds
    each = ", ".join(f"{stage} {duration(taken)}" for stage, taken in seconds.items())
    return f"{duration(sum(seconds.values()))} in all, every attempt counted: {each}."


def _stage_table(stages: list[StageRecord]) -> Table:
    rows = [
        [
            record.stage,
            record.status + (f": {record.error}" if record.error else ""),
            duration(record.seconds),
            record.device,
            str(record.seed),
            record.started[:16].replace("T", " "),
            (record.git_revision or ABSENT)[:12],
        ]
        for record in stages
    ]
    header = ["stage", "status", "time", "device", "seed", "started (UTC)", "git revision"]
    return Table("Stages run", header, rows, text_columns=(0, 1, 3, 5, 6))


def _version_table(stages: list[StageRecord]) -> Table:
    found: dict[str, dict[str, None]] = {}
    for record in stages:
        for package, version in record.versions.items():
            found.setdefault(package, {})[version] = None
    return Table("Versions", ["package", "version"], [[name, ", ".join(seen)] for name, seen in found.items()], (0, 1))


def _fingerprints(sources: Sources) -> list[list[str]]:
    rows = []
    if sources.sensitivity:
        rows.append(
            [f"model {sources.sensitivity.model.name}", sources.sensitivity.model.fingerprint, "sensitivity.json"]
        )
        rows.append(["calibration text", sources.sensitivity.text, "sensitivity.json"])
    if sources.plan:
        rows.append([f"model {sources.plan.model.name}", sources.plan.model.fingerprint, "plan.yaml"])
        rows.append(["what the plan does", sources.plan.hash(), "plan.yaml"])
    if sources.quality:
        models = sources.quality.models
        rows += [[f"evaluated {name}", models[name], "eval/comparison.json"] for name in model_order(models)]
        if sources.quality.text:
            rows.append(["held-out text", sources.quality.text.fingerprint, "eval/comparison.json"])
    if sources.bench:
        models = sources.bench.models
        rows += [
            [f"config of benchmarked {name}", models[name], "bench/comparison.json"] for name in model_order(models)
        ]
    return [[row[0], f"`{row[1]}`", f"`{row[2]}`"] for row in rows]
