"""The three lines at the top, and the summary the command line prints: no more than the files' numbers allow."""

from __future__ import annotations

from typing import Any

from layerboost.reporting.benchmark import Ratio, bench_ratio
from layerboost.reporting.page import Finding
from layerboost.reporting.quality import nll_difference
from layerboost.reporting.sources import MODELS, Sources, absent, model_order
from layerboost.reporting.text import ABSENT, interval, number, percent, size
from layerboost.schemas.evaluation import Change, EvalComparison
from layerboost.search.costs import base_kv_bytes, plan_kv_bytes


def kv_bytes(sources: Sources) -> tuple[int, int, int] | None:
    """KV bytes a request of plan and base, and the context in tokens they are counted at; None without a plan.

    Counted from the plan's layers, which a person may have edited after the prediction was written. The context is the
    prediction's, or the recipe's, or the model's longest.
    """
    plan = sources.plan
    if plan is None:
        return None
    if plan.predicted:
        context = plan.predicted.context_tokens
    elif sources.recipe:
        context = sources.recipe.plan.context_tokens
    else:
        context = plan.model.max_context_tokens
    return plan_kv_bytes(plan.model, plan.layers, context), base_kv_bytes(plan.model, context), context


def findings(sources: Sources) -> list[Finding]:
    """KV bytes, throughput, quality: one line each."""
    return [_kv_finding(sources), _throughput_finding(sources), _quality_finding(sources)]


def summary(sources: Sources) -> dict[str, Any]:
    """The numbers of the verdict as plain values; what was not measured is None or an empty mapping."""
    kv = kv_bytes(sources)
    # A benchmark without the base has ratios to another model; they are on the page, under its name.
    ratio = bench_ratio(sources.bench) if sources.bench and sources.bench.reference == "base" else None
    quality = sources.quality
    return {
        "kv_fraction": kv[0] / kv[1] if kv else None,
        "throughput_ratio": None
        if ratio is None
        else {
            "median": ratio.spread.median,
            "low": ratio.spread.min if ratio.spread.repeats > 1 else None,
            "high": ratio.spread.max if ratio.spread.repeats > 1 else None,
            "repeats": ratio.spread.repeats,
            "text": f"{ratio.spread.as_ratio}{ratio.warning}",
            "concurrency": ratio.concurrency,
            "model": ratio.model,
        },
        "perplexity": {name: found.perplexity for name, found in quality.perplexity.items()} if quality else {},
        "tasks": {
            task: {name: found.value for name, found in entry.models.items()} for task, entry in quality.tasks.items()
        }
        if quality
        else {},
        "average": {name: found.value for name, found in quality.average.models.items()}
        if quality and quality.average
        else None,
    }


def summary_table(values: dict[str, Any]) -> list[list[str]]:
    """Rows for a terminal, header first: metric, base, converted, healed. `values` is what `run_report` returned."""
    models = MODELS
    fraction, ratio = values["kv_fraction"], values["throughput_ratio"]
    kv = [ABSENT] * 3 if fraction is None else [percent(1.0), percent(fraction), percent(fraction)]
    speed = [ABSENT] * 3
    title = "output tokens/s, ratio to base"
    if ratio:
        title += f" (concurrency {ratio['concurrency']})"
        speed[0] = "1"
        if ratio["model"] in models:
            speed[models.index(ratio["model"])] = ratio["text"]
    perplexity = values["perplexity"]
    rows = [
        ["metric", *models],
        ["KV bytes", *kv],
        [title, *speed],
        ["perplexity", *(number(perplexity[name], 4) if name in perplexity else ABSENT for name in models)],
    ]
    scores = dict(values["tasks"])
    if values["average"]:
        scores["average"] = values["average"]
    for task, found in scores.items():
        rows.append([task, *(percent(found[name]) if name in found else ABSENT for name in models)])
    return rows


def _kv_finding(sources: Sources) -> Finding:
    files = ["plan.yaml"]
    counted = kv_bytes(sources)
    if counted is None or sources.plan is None:
        return Finding(None, f"KV cache: {absent('plan.yaml')}.", files)
    planned, base, context = counted
    sentence = (
        f"of the base's KV cache at {context:,} tokens of context: {size(planned)} a request against {size(base)}, "
        "counted from the plan's layers."
    )
    predicted = sources.plan.predicted
    if predicted and abs(predicted.kv_fraction - planned / base) > 0.005:
        sentence += f" plan.yaml predicted {percent(predicted.kv_fraction)}: its layers were edited since."
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
        return Finding(None, "Throughput: bench/comparison.json compares no two models.", files)
    sentence = (
        f"the output tokens per second of {ratio.reference}: {ratio.model} at concurrency {ratio.concurrency}, "
        f"{_spread(ratio)}"
    )
    return Finding(f"{ratio.spread.median:.2f} ×", sentence, files)


def _spread(ratio: Ratio) -> str:
    found = ratio.spread
    if found.repeats < 2:
        return f"one repeat, so its range is unknown and a small difference means nothing{ratio.warning}."
    text = f"{found.min:.2f} to {found.max:.2f} over {found.repeats} interleaved repeats"
    if found.min <= 1 <= found.max:
        return f"{text}: no difference shown{ratio.warning}."
    return f"{text}: {'faster' if found.min > 1 else 'slower'} in every repeat{ratio.warning}."


def _quality_finding(sources: Sources) -> Finding:
    files = ["eval/comparison.json"]
    quality = sources.quality
    if quality is None:
        return Finding(None, f"Quality: {absent('eval/comparison.json')}.", files)
    sentences, value = [], None
    if quality.average:
        names, last = _ends(quality.average.models)
        values = [f"{name} {percent(quality.average.models[name].value)}" for name in names]
        sentences.append(f"Average accuracy of {_headline(quality)}: {' → '.join(values)}{_average(quality, last)}.")
        value = percent(quality.average.models[last].value)
        if "base" in quality.average.models and last != "base":
            change = quality.average.models[last].value - quality.average.models["base"].value
            value = f"{'+' if change > 0 else '−' if change < 0 else ''}{abs(100 * change):.1f} points"
    else:
        sentences.append("Tasks: not measured.")
    if quality.perplexity:
        names, last = _ends(quality.perplexity)
        values = [f"{name} {number(quality.perplexity[name].perplexity, 4)}" for name in names]
        sentences.append(f"Perplexity: {' → '.join(values)}{_losses(quality, last)}.")
        value = value or f"perplexity {number(quality.perplexity[last].perplexity, 4)}"
    else:
        sentences.append("Perplexity: not measured.")
    return Finding(value, " ".join([_gate(quality), *sentences]), files)


def _gate(quality: EvalComparison) -> str:
    gate = quality.gate
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


def _headline(quality: EvalComparison) -> str:
    chosen = sum(task.selection for task in quality.tasks.values())
    rest = f" (without {chosen} that layers were chosen on)" if chosen else ""
    return f"{len(quality.tasks) - chosen} tasks{rest}"


def _ends(models: dict[str, Any]) -> tuple[list[str], str]:
    """The models in order, and the one that the page is about: healed, else converted, not a further checkpoint."""
    names = model_order(models)
    return names, next((name for name in ("healed", "converted") if name in names), names[-1])


def _average(quality: EvalComparison, name: str) -> str:
    found = quality.average.difference.get(name) if quality.average else None
    if found is None or name == "base":
        return ""
    points = interval(100 * found.mean, 100 * found.low, 100 * found.high, signed=True)
    return f" ({name} − base: {points} points; {certainty(found)})"


def _losses(quality: EvalComparison, name: str) -> str:
    difference = nll_difference(quality, name)
    if difference is None:
        return ""
    kl = quality.perplexity[name].kl
    return f" ({name} − base: {difference} nats per token; KL {interval(kl.mean, kl.low, kl.high)})"


def certainty(change: Change) -> str:
    """What a paired difference of accuracies and its interval allow to be said."""
    if change.high < 0:
        seen = "a loss beyond the 95 % interval"
    elif change.low > 0:
        seen = "a gain beyond the 95 % interval"
    else:
        seen = f"no difference shown, of which these items show {number(100 * change.detectable, 2)} points or more"
    return f"{seen}; no worse than 1 point: {change.no_worse}"
