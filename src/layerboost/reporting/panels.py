"""The panels of layers, healing and provenance; each names the files its numbers come from."""

from __future__ import annotations

import shlex

from layerboost.recipe import recipe_yaml
from layerboost.reporting.figures import SENSITIVITIES, healing_figure, sensitivity_figure
from layerboost.reporting.page import Panel, Table
from layerboost.reporting.sources import MADE_BY, Sources, model_order
from layerboost.reporting.text import ABSENT, duration, number, with_error
from layerboost.schemas.healing import MetricLine
from layerboost.schemas.plan import PlanFile
from layerboost.schemas.run import StageRecord
from layerboost.schemas.sensitivity import LayerSensitivity, Sensitivity, Variant

STAGES = {
    "fit": "Before them: least squares",
    "attention": "Stage 1: attention distillation",
    "lora": "Stage 2: LoRA distillation",
}
# Columns of validations, where any has a value.
VALIDATION = {
    "validation_kl": "KL, nats per token",
    "validation_nll": "NLL, nats per token",
    "validation_answer_kl": "KL of answers",
}


def layers_panel(sources: Sources) -> Panel:
    """Return the layer map and the sensitivities it was chosen from."""
    plan, sensitivity = sources.plan, sources.sensitivity
    panel = sources.panel("layers", "Layers", "plan.yaml", "sensitivity.json")
    panel.plan = plan
    if sensitivity is None:
        return panel
    if not sensitivity.complete:
        panel.warnings.append(
            f"sensitivity.json holds {len(sensitivity.layers)} of {sensitivity.model.layers} layers: "
            f"`{MADE_BY['sensitivity.json']}` continues it"
        )
    if plan and plan.sensitivity not in (None, sources.sensitivity_hash):
        panel.warnings.append("sensitivity.json changed after plan.yaml was made from it: run `layerboost plan` again")
    panel.notes.append(
        "Quality loss of one replacement at a time, with all other layers unchanged, over "
        f"{sensitivity.tokens:,} tokens in {sensitivity.sequences:,} sequences; bars are one standard error. "
        f"Base NLL: {with_error(sensitivity.base_nll)} nats per token."
    )
    variants = [variant for entry in sensitivity.layers for variant in entry.variants]
    if hidden := sum(variant.scores["kl"].mean <= 0 for variant in variants):
        panel.notes.append(
            f"{hidden} of {len(variants)} KL values are not above zero: not on the log axis, but listed."
        )
    metrics = _measured(variants)
    for metric in metrics:
        name = "sensitivity" + (f"-{metric}" if metric != "kl" else "")
        panel.chart(name, SENSITIVITIES[metric][0], sensitivity_figure(sensitivity, plan, metric))
    panel.tables.append(_sensitivity_table(sensitivity, metrics))
    heads = [variant for entry in sensitivity.layers for variant in entry.heads]
    panel.tables.extend(_heads_table(sensitivity, plan, metric) for metric in _measured(heads))
    return panel


def _measured(variants: list[Variant]) -> list[str]:
    """Return those of SENSITIVITIES that were measured."""
    return [metric for metric in SENSITIVITIES if any(metric in variant.scores for variant in variants)]


def _score(variant: Variant, metric: str) -> str:
    return with_error(variant.scores.get(metric), signed=metric != "kl")


def _sensitivity_table(sensitivity: Sensitivity, measured: list[str]) -> Table:
    titles = {"kl": "KL, nats per token", "nll": "NLL − base, nats per token"}
    titles |= {metric: f"{metric}: {SENSITIVITIES[metric][1]}" for metric in measured if metric != "kl"}
    rows = [
        [str(entry.layer), variant.label, *(_score(variant, metric) for metric in titles)]
        for entry in sensitivity.layers
        for variant in (*entry.variants, *entry.heads)
    ]
    return Table("Every sensitivity", ["layer", "replaced by", *titles.values()], rows, (0, 1), folded=True)


def _heads_table(sensitivity: Sensitivity, plan: PlanFile | None, metric: str) -> Table:
    """Return the map of layers and KV heads: one metric of each head alone under the plan's window, or the shortest."""
    heads = range(sensitivity.model.kv_heads)
    measured = {variant.window for entry in sensitivity.layers for variant in entry.heads if variant.window}
    window = plan.window if plan and plan.window in measured else min(measured)
    layers = plan.layers if plan else []
    full = {entry.layer: [*heads] if not entry.attention_changed else entry.full_kv_heads for entry in layers}

    def cell(head: int, entry: LayerSensitivity) -> str:
        for variant in entry.heads:
            if variant.window == window and head not in variant.full_kv_heads:
                kept = " (full)" if head in full.get(entry.layer, ()) else ""
                return _score(variant, metric) + kept
        return ABSENT

    title = f"{SENSITIVITIES[metric][1]}: each KV head alone under a window of {window}"
    title += "; (full): the plan keeps it" if plan else ""
    rows = [[str(entry.layer), *(cell(head, entry) for head in heads)] for entry in sensitivity.layers]
    return Table(title, ["layer", *(f"KV head {head}" for head in heads)], rows, folded=True)


def healing_panel(sources: Sources) -> Panel:
    """Return loss against tokens of the stages that have one, and the validation points."""
    panel = sources.panel("healing", "Healing", "heal/metrics.jsonl")
    if not sources.metrics:
        return panel
    rows = []
    for stage, title in STAGES.items():
        lines = [line for line in sources.metrics if line.stage == stage]
        if any(line.loss is not None for line in lines):
            panel.chart(f"heal-{stage}", title, healing_figure(lines))
        if lines:
            rows.append(_healing_row(title, lines))
    panel.tables.append(Table("Stages", ["stage", "steps", "tokens", "time", "first loss", "last loss"], rows))
    checked = [line for line in sources.metrics if line.validation_kl is not None or line.validation_nll is not None]
    shown = [name for name in VALIDATION if any(getattr(line, name) is not None for line in checked)]
    if checked:
        header = ["stage", "step", "tokens", *(VALIDATION[name] for name in shown)]
        validation = [
            [line.stage, f"{line.step:,}", f"{line.tokens:,}", *(number(getattr(line, name), 4) for name in shown)]
            for line in checked
        ]
        panel.tables.append(Table("Validation", header, validation, folded=len(validation) > 12))
    return panel


def _healing_row(title: str, lines: list[MetricLine]) -> list[str]:
    losses: list[float | None] = [line.loss for line in lines if line.loss is not None] or [None]
    last = lines[-1]
    taken = [f"{last.step:,}", f"{last.tokens:,}", duration(last.seconds)]
    return [title, *taken, number(losses[0], 4), number(losses[-1], 4)]


def provenance_panel(sources: Sources) -> Panel:
    """Return what ran, when, where, on what, for how long, and with which settings."""
    panel = sources.panel("provenance", "Cost and provenance", "run.json", "recipe.yaml")
    if sources.recipe:
        panel.recipe = recipe_yaml(sources.recipe)
    stages = sources.history.stages if sources.history else []
    if stages:
        panel.tables.extend([_stage_table(stages), _version_table(stages)])
        panel.notes.append(_cost(stages))
    if prints := _fingerprints(sources):
        panel.tables.append(Table("Fingerprints", ["what", "fingerprint", "recorded in"], prints, (0, 1, 2)))
    if stages:
        # As typed, without the program's path on this machine.
        commands = [[record.stage, f"`{shlex.join(['layerboost', *record.argv[1:]])}`"] for record in stages]
        panel.tables.append(Table("Commands", ["stage", "command"], commands, text_columns=(0, 1), folded=True))
    return panel


def _cost(stages: list[StageRecord]) -> str:
    """Return the time by stage, with attempts that failed or were interrupted."""
    seconds: dict[str, float] = {}
    for record in stages:
        seconds[record.stage] = seconds.get(record.stage, 0.0) + record.seconds
    each = ", ".join(f"{stage} {duration(taken)}" for stage, taken in seconds.items())
    return f"{duration(sum(seconds.values()))} in all, every attempt counted: {each}."


def _stage_table(stages: list[StageRecord]) -> Table:
    def cells(record: StageRecord) -> list[str]:
        status = record.status + (f": {record.error}" if record.error else "")
        started, revision = record.started[:16].replace("T", " "), (record.git_revision or ABSENT)[:12]
        return [record.stage, status, duration(record.seconds), record.device, str(record.seed), started, revision]

    header = ["stage", "status", "time", "device", "seed", "started (UTC)", "git revision"]
    return Table("Stages run", header, [cells(record) for record in stages], text_columns=(0, 1, 3, 5, 6))


def _version_table(stages: list[StageRecord]) -> Table:
    versions: dict[str, dict[str, None]] = {}
    for record in stages:
        for package, version in record.versions.items():
            versions.setdefault(package, {})[version] = None
    return Table(
        "Versions", ["package", "version"], [[name, ", ".join(seen)] for name, seen in versions.items()], (0, 1)
    )


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
    return [[what, f"`{value}`", f"`{file}`"] for what, value, file in rows]
