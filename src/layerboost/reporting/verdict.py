"""The three lines at the top of the report, and the summary that the command line prints."""

from __future__ import annotations

from typing import Any

from layerboost.costs.budget import base_kv_bytes, plan_kv_bytes, plan_parameters
from layerboost.recipe import Recipe
from layerboost.reporting.benchmark import bench_ratio
from layerboost.reporting.page import Finding
from layerboost.reporting.sources import MODELS, Sources, absent, model_order
from layerboost.reporting.text import ABSENT, number, percent, size, with_interval
from layerboost.schemas.evaluation import Change, EvalComparison, Gate
from layerboost.schemas.plan import PlanFile
from layerboost.schemas.run import last_made


def kv_bytes(plan: PlanFile, recipe: Recipe | None) -> tuple[int, int, int]:
    """Return KV bytes per request of plan and base, and the context in tokens at which they are counted.

    They are counted from the plan's layers, which may have been edited after the prediction was written. The context is
    the prediction's, or the recipe's, or the model's longest.
    """
    context = plan.model.max_context_tokens
    if plan.predicted:
        context = plan.predicted.context_tokens
    elif recipe:
        context = recipe.plan.context_tokens
    return plan_kv_bytes(plan.model, plan.layers, context), base_kv_bytes(plan.model, context), context


def findings(sources: Sources) -> list[Finding]:
    """Return KV bytes, throughput, quality: one line each."""
    return [_kv_finding(sources), _throughput_finding(sources), _quality_finding(sources)]


def summary(sources: Sources) -> dict[str, Any]:
    """Return the numbers of the verdict: None or an empty mapping for what was not measured."""
    kv = kv_bytes(sources.plan, sources.recipe) if sources.plan else None
    quality = sources.quality
    # Ratios to another model than the base are only on the page, under its name.
    ratio = bench_ratio(sources.bench) if sources.bench and sources.bench.reference == "base" else None
    scores = quality.scores if quality else {}
    values = {task: {name: found.value for name, found in entry.models.items()} for task, entry in scores.items()}
    return {
        "kv_fraction": kv[0] / kv[1] if kv else None,
        "throughput_ratio": ratio,
        "perplexity": {name: found.perplexity for name, found in quality.perplexity.items()} if quality else {},
        "average": values.pop("average", None),
        "tasks": values,
    }


def summary_table(values: dict[str, Any]) -> list[list[str]]:
    """Return rows for a terminal, header first: metric, base, converted, healed. `values`: what `summary` returned."""
    fraction, ratio = values["kv_fraction"], values["throughput_ratio"]
    cache = {} if fraction is None else {"base": 1.0, "converted": fraction, "healed": fraction}
    speed = {"base": "1", ratio.model: ratio.spread.as_ratio + ratio.warning} if ratio else {}
    at = f" (concurrency {ratio.concurrency})" if ratio else ""
    perplexity = {name: number(value, 4) for name, value in values["perplexity"].items()}
    scores = values["tasks"] | ({"average": values["average"]} if values["average"] else {})
    cells: dict[str, dict[str, str]] = {
        "KV bytes": {name: percent(value) for name, value in cache.items()},
        f"output tokens/s, ratio to base{at}": speed,
        "perplexity": perplexity,
        **{task: {name: percent(value) for name, value in found.items()} for task, found in scores.items()},
    }
    rows = [[metric, *(found.get(name, ABSENT) for name in MODELS)] for metric, found in cells.items()]
    return [["metric", *MODELS], *rows]


def _kv_finding(sources: Sources) -> Finding:
    files, plan = ["plan.yaml"], sources.plan
    if plan is None:
        return Finding(None, f"KV cache: {absent('plan.yaml')}.", files)
    planned, base, context = kv_bytes(plan, sources.recipe)
    sentence = (
        f"of the base's KV cache at {context:,} tokens of context: {size(planned)} per request against {size(base)}, "
        "counted from the plan's layers."
    )
    if plan.predicted and abs(plan.predicted.kv_fraction - planned / base) > 0.005:
        sentence += f" plan.yaml predicted {percent(plan.predicted.kv_fraction)}: its layers were edited later."
    if any(entry.mlp_changed for entry in plan.layers):
        kept = plan_parameters(plan.model, plan.layers) / plan.model.parameters
        sentence += f" The plan has {percent(kept)} of the base's parameters."
    cache = bench_ratio(sources.bench, "kv_cache_tokens") if sources.bench else None
    if cache:
        sentence += (
            f" In the benchmark, vLLM's KV cache had room for {cache.spread.median:.2f} × the tokens of "
            f"{cache.reference} ({cache.model})."
        )
        files = [*files, "bench/comparison.json"]
    return Finding(percent(planned / base), sentence, files)


def _throughput_finding(sources: Sources) -> Finding:
    files = ["bench/comparison.json"]
    if sources.bench is None:
        return Finding(None, f"Throughput: {absent('bench/comparison.json')}.", files)
    ratio = bench_ratio(sources.bench)
    if ratio is None:
        return Finding(None, "Throughput: bench/comparison.json has no two models to compare.", files)
    spread = ratio.spread
    if spread.repeats == 1:
        found = "one repeat, so its range is unknown and a small difference is not significant"
    else:
        shown = "no difference shown"
        if not spread.min <= 1 <= spread.max:
            shown = f"{'faster' if spread.min > 1 else 'slower'} in every repeat"
        found = f"{spread.min:.2f} to {spread.max:.2f} over {spread.repeats} interleaved repeats: {shown}"
    sentence = (
        f"the output tokens per second of {ratio.reference}: {ratio.model} at concurrency {ratio.concurrency}, "
        f"{found}{ratio.warning}."
    )
    return Finding(f"{spread.median:.2f} ×", sentence, files)


def _quality_finding(sources: Sources) -> Finding:
    files = ["eval/comparison.json"]
    quality = sources.quality
    if quality is None:
        return Finding(None, f"Quality: {absent('eval/comparison.json')}.", files)
    accuracy, text = _accuracy(quality), _text(quality)
    value = accuracy[0] or text[0]
    return Finding(value, " ".join([_gate(quality.gate), accuracy[1], text[1]]), files)


def _accuracy(quality: EvalComparison) -> tuple[str | None, str]:
    """Return the change of average accuracy, None without it, and a sentence on it."""
    if not quality.average:
        return None, "Tasks: not measured."
    models, chosen = quality.average.models, sum(task.selection for task in quality.tasks.values())
    names = model_order(models)
    last = last_made(names)
    values = " → ".join(f"{name} {percent(models[name].value)}" for name in names)
    rest = f" (without {chosen} on which layers were chosen)" if chosen else ""
    value, lost = percent(models[last].value), ""
    if change := quality.average.difference.get(last):
        moved = models[last].value - models["base"].value
        value = f"{'+' if moved > 0 else '−' if moved < 0 else ''}{abs(100 * moved):.1f} points"
        lost = f" ({last} − base: {with_interval(change, scale=100)} points; {certainty(change)})"
    return value, f"Average accuracy of {len(quality.tasks) - chosen} tasks{rest}: {values}{lost}."


def _text(quality: EvalComparison) -> tuple[str | None, str]:
    """Return the perplexity of the last model, None without one, and the sentence on held-out text."""
    losses = quality.perplexity
    if not losses:
        return None, "Perplexity: not measured."
    names = model_order(losses)
    last = last_made(names)
    values = " → ".join(f"{name} {number(losses[name].perplexity, 4)}" for name in names)
    change, kl = losses[last].nll_difference, with_interval(losses[last].kl, signed=False)
    lost = f" ({last} − base: {with_interval(change)} nats per token; KL {kl})" if change else ""
    return f"perplexity {number(losses[last].perplexity, 4)}", f"Perplexity: {values}{lost}."


def _gate(gate: Gate | None) -> str:
    if gate is None:
        return "No quality gate was set."
    unknown = sum(check.passed is None for check in gate.checks)
    rest = f", {unknown} not judged" if unknown else ""
    if gate.missed:
        missed = ", ".join(f"{check.what} {number(check.found or 0.0)}" for check in gate.missed)
        return (
            f"Quality gate: missed by {gate.model} in {len(gate.missed)} of {len(gate.checks)} checks{rest} ({missed})."
        )
    return f"Quality gate: passed by {gate.model} in {len(gate.checks) - unknown} of {len(gate.checks)} checks{rest}."


def certainty(change: Change) -> str:
    """Return what a paired difference of accuracies and its interval show."""
    if change.high < 0:
        seen = "a loss beyond the 95 % interval"
    elif change.low > 0:
        seen = "a gain beyond the 95 % interval"
    else:
        seen = f"no difference shown; these items show {number(100 * change.minimum_detectable, 2)} points or more"
    return f"{seen}; no worse than 1 point: {change.no_worse}"
