"""Calibration text, retrieval prompts made from it, and plans measured on both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerboost.errors import ConfigError
from layerboost.files import write_text
from layerboost.model.base import open_base
from layerboost.model.checkpoint import check_same_model
from layerboost.model.sinks import calibrate_sinks
from layerboost.model.stream import LayerStream
from layerboost.model.thinning import thin_mlps
from layerboost.probes.metrics import check_finite
from layerboost.probes.probe import TextProbe, first_difference
from layerboost.recipe import Recipe
from layerboost.retrieval import KINDS, Prompts, retrieval_prompts
from layerboost.runtime import Runtime, log
from layerboost.schemas.artifact import fingerprint, json_text, not_finite
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.sensitivity import Sensitivity
from layerboost.text import load_tokens
from layerboost.traffic import load_calibration, load_mlp_fit

MEASURED = "measured_plans.jsonl"


def load_prompts(recipe: Recipe, tokenizer: Any, run: Path | None) -> list[Prompts]:
    """Return the recipe's retrieval prompts in batches: passkeys and key-value pairs, half each."""
    settings = recipe.measure
    needed, skipped = filler_tokens(recipe), settings.skip_tokens
    if needed == 0:
        return []
    filler = load_tokens(recipe.text, tokenizer, "calibration", skipped + needed, run=run).ids.flatten()[skipped:]
    per_batch = max(1, settings.batch_sequences * recipe.text.sequence_tokens // settings.retrieval_tokens)
    batches = []
    for text, kind in zip(filler[:needed].chunk(len(KINDS)), KINDS, strict=True):
        count = len(text) // settings.retrieval_tokens
        prompts = retrieval_prompts(tokenizer, text, kind, settings.retrieval_tokens, count, recipe.seed)
        batches += prompts.batches(per_batch)
    return batches


def filler_tokens(recipe: Recipe) -> int:
    """Return the tokens of calibration text that the retrieval prompts need, each kind the same number."""
    each = -(-recipe.measure.retrieval_prompts // len(KINDS))
    return len(KINDS) * each * recipe.measure.retrieval_tokens


def open_measured(
    recipe: Recipe, run: Path, sensitivity: Sensitivity, windows: Sequence[int], runtime: Runtime
) -> MeasuredPlans:
    """Return a function that measures plans with these windows on calibration text and retrieval prompts.

    The run folder caches the results. Sinks are those of `measure`; the text is its first `plan.search_tokens` tokens.
    Raise ConfigError for another base or for text that cannot be used.
    """
    base = open_base(recipe, run, runtime)
    check_same_model(sensitivity, base.info, run)
    every = load_calibration(recipe, base.tokenizer, recipe.measure.tokens, run)
    text = load_calibration(recipe, base.tokenizer, recipe.plan.search_tokens, run)
    prompts = load_prompts(recipe, base.tokenizer, run)
    model = base.load()
    size, device = recipe.measure.batch_sequences, runtime.device
    sinks = calibrate_sinks(model, every.batches(size, device), sensitivity.model.attention_layers, windows)
    widths = {
        (layer.layer, each.mlp_width) for layer in sensitivity.layers for each in layer.variants if each.mlp_width
    }
    fit = load_mlp_fit(recipe, base.tokenizer, run) if widths else None
    fitted_on = fit.batches(size, device) if fit else []
    stream = LayerStream(model, sinks, thin_mlps(model, fitted_on, sorted(widths)))
    probe = TextProbe(stream, text.batches(size, device), prompts)
    asked = [row for batch in prompts for row in batch.ids.tolist()]
    texts = [every.fingerprint, text.fingerprint, asked, str(runtime.dtype), *([fit.fingerprint] if fit else [])]
    made_from = fingerprint(sensitivity.model.fingerprint, *texts)
    measured = MeasuredPlans(probe, run / MEASURED, made_from)
    log.info("%d plans were measured before", len(measured.results))
    return measured


class MeasuredPlans:
    """Measures the quality loss of plans, by metric; results are lines of a file, so that a killed search can resume.

    `made_from`: fingerprint of all that a result depends on, apart from the plan; lines of others stay in the file.
    """

    def __init__(self, probe: TextProbe, file: Path, made_from: str) -> None:
        self.probe, self.file, self.made_from = probe, file, made_from
        self.measured: list[Sequence[LayerPlan]] = []
        self.lines: list[str] = []
        self.results: dict[str, Mapping[str, float]] = {}
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            try:
                entry = json.loads(line)
                if wrong := not_finite(entry):
                    raise ValueError(wrong)
            except ValueError:
                raise ConfigError(f"{file} cannot be read", found=line[:80], do="delete it") from None
            self.lines.append(line)
            if entry["made_from"] == made_from:
                self.results[entry["plan"]] = entry["found"]

    def __call__(self, plan: Sequence[LayerPlan]) -> Mapping[str, float]:
        """Return the losses of a plan, from the file if they are there."""
        key = fingerprint([entry.key() for entry in plan])
        if key not in self.results:
            self.results[key] = self._measure(plan)
            line = {"made_from": self.made_from, "plan": key, "found": self.results[key]}
            self.lines.append(json_text(line, str(self.file)))
            write_text(self.file, "\n".join(self.lines) + "\n")
        self.measured.append(plan)
        return self.results[key]

    def _measure(self, plan: Sequence[LayerPlan]) -> Mapping[str, float]:
        streams = self.probe.streams
        # From a plan that is far from this one, go to a measured plan that is one change away.
        if _changes(plan, streams.plan) > 2:
            near = next((other for other in reversed(self.measured) if _changes(plan, other) == 1), streams.plan)
            streams.follow(near)
        # These layers must run for this plan anyway; later plans can use their outputs.
        for layer in range(max(streams.inputs), first_difference(streams.plan, plan)):
            streams.advance(layer)
        [losses] = self.probe.losses([plan])
        # `mse` is of one layer, not of a plan.
        means = {metric: float(values.mean()) for metric, values in losses.items() if metric != "mse"}
        check_finite("a plan that was tried", means, streams.stream.model.dtype)
        return means


def _changes(one: Sequence[LayerPlan], other: Sequence[LayerPlan]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))
