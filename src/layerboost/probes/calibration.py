"""What damage is measured on: calibration text and retrieval prompts made from it, and plans measured on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerboost.data.retrieval import KINDS, Prompts, retrieval_prompts
from layerboost.data.text import load_tokens
from layerboost.data.traffic import load_calibration
from layerboost.errors import ConfigError
from layerboost.files import write_text
from layerboost.model.base import open_base
from layerboost.model.checkpoint import check_same_model
from layerboost.model.sinks import calibrate_sinks
from layerboost.model.stream import LayerStream
from layerboost.probes.metrics import check_finite
from layerboost.probes.probe import TextProbe, first_difference
from layerboost.recipe import Recipe
from layerboost.runtime import Runtime, log
from layerboost.schemas.artifact import fingerprint, json_text, not_finite
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.sensitivity import Sensitivity

MEASURED = "measured_plans.jsonl"


def load_prompts(recipe: Recipe, tokenizer: Any, run: Path | None) -> list[Prompts]:
    """Retrieval prompts of the recipe in batches: passkeys and key-value pairs, half each, in calibration text."""
    settings = recipe.measure
    wanted, skipped = filler_tokens(recipe), settings.skip_tokens
    if wanted == 0:
        return []
    filler = load_tokens(recipe.text, tokenizer, "calibration", skipped + wanted, run=run).ids.flatten()[skipped:]
    per_batch = max(1, settings.batch_sequences * recipe.text.sequence_tokens // settings.retrieval_tokens)
    batches = []
    for text, kind in zip(filler[:wanted].chunk(len(KINDS)), KINDS, strict=True):
        count = len(text) // settings.retrieval_tokens
        prompts = retrieval_prompts(tokenizer, text, kind, settings.retrieval_tokens, count, recipe.seed)
        batches += prompts.batches(per_batch)
    return batches


def filler_tokens(recipe: Recipe) -> int:
    """Tokens of calibration text that the retrieval prompts take, as many prompts of each kind."""
    each = -(-recipe.measure.retrieval_prompts // len(KINDS))
    return len(KINDS) * each * recipe.measure.retrieval_tokens


def open_measured(
    recipe: Recipe, run: Path, sensitivity: Sensitivity, windows: Sequence[int], runtime: Runtime
) -> MeasuredPlans:
    """The base on calibration text and retrieval prompts, to measure plans with these windows; keeps them in the run
    folder.

    Sinks are those of `measure`; the text is its first `plan.search_tokens` tokens. Raises ConfigError.
    """
    base = open_base(recipe, run, runtime)
    check_same_model(sensitivity, base.info, run)
    every = load_calibration(recipe, base.tokenizer, recipe.measure.tokens, run)
    text = load_calibration(recipe, base.tokenizer, recipe.plan.search_tokens, run)
    prompts = load_prompts(recipe, base.tokenizer, run)
    model = base.load()
    size, device = recipe.measure.batch_sequences, runtime.device
    sinks = calibrate_sinks(
        model, [part.to(device) for part in every.batches(size)], range(len(sensitivity.layers)), windows
    )
    probe = TextProbe(LayerStream(model, sinks), [part.to(device) for part in text.batches(size)], prompts)
    asked = [row for batch in prompts for row in batch.ids.tolist()]
    dtype = str(runtime.dtype)
    made_from = fingerprint(sensitivity.model.fingerprint, every.fingerprint, text.fingerprint, asked, dtype)
    kept = KeptByPlan(run / MEASURED, made_from)
    log.info("%d plans were measured before", len(kept.found))
    return MeasuredPlans(probe, kept)


class KeptByPlan:
    """What was found about plans, a line each in a file, so that a killed search goes on.

    `made_from`: fingerprint of all a finding depends on besides the plan; others' lines stay in the file.
    """

    def __init__(self, file: Path, made_from: str) -> None:
        self.file, self.made_from = file, made_from
        self.lines: list[str] = []
        self.found: dict[str, Any] = {}
        for line in file.read_text().splitlines() if file.is_file() else []:
            try:
                entry = json.loads(line)
                if wrong := not_finite(entry):
                    raise ValueError(wrong)
            except ValueError:
                raise ConfigError(f"{file} cannot be read", found=line[:80], do="delete it") from None
            self.lines.append(line)
            if entry["made_from"] == made_from:
                self.found[entry["plan"]] = entry["found"]

    def __call__(self, plan: Sequence[LayerPlan], find: Callable[[], Any]) -> Any:
        """What was found about this plan, or is found now and kept."""
        key = fingerprint([entry.model_dump() for entry in plan])
        if key not in self.found:
            self.found[key] = find()
            line = {"made_from": self.made_from, "plan": key, "found": self.found[key]}
            self.lines.append(json_text(line, str(self.file)))
            write_text(self.file, "\n".join(self.lines) + "\n")
        return self.found[key]


class MeasuredPlans:
    """What whole plans lose, by metric. Calling it with a plan measures it, or reads it back."""

    def __init__(self, probe: TextProbe, kept: KeptByPlan) -> None:
        self.probe, self.kept = probe, kept
        self.asked: list[Sequence[LayerPlan]] = []

    def __call__(self, plan: Sequence[LayerPlan]) -> Mapping[str, float]:
        found: Mapping[str, float] = self.kept(plan, lambda: self._measure(plan))
        self.asked.append(plan)
        return found

    def _measure(self, plan: Sequence[LayerPlan]) -> Mapping[str, float]:
        self._follow(plan)
        streams = self.probe.streams
        # These layers are to be run for this plan anyway; kept, they serve the next ones too.
        for layer in range(max(streams.inputs), first_difference(streams.kept, plan)):
            streams.advance(layer)
        [damages] = self.probe.damages([plan])
        # `mse` is of one layer, not of a plan.
        found = {metric: float(values.mean()) for metric, values in damages.items() if metric != "mse"}
        check_finite("a plan that was tried", found, streams.stream.model.dtype)
        return found

    def _follow(self, plan: Sequence[LayerPlan]) -> None:
        """Keep the streams of a plan asked for before that is one change away, once the kept one is far."""
        if _changes(plan, self.probe.streams.kept) > 2:
            near = next((asked for asked in reversed(self.asked) if _changes(plan, asked) == 1), None)
            if near is not None:
                self.probe.streams.follow(near)


def _changes(one: Sequence[LayerPlan], other: Sequence[LayerPlan]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=True))
