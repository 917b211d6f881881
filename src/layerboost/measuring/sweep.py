"""The sweep: every layer with every replacement, each variant run from the model's own input to that layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from layerboost.model.modeling import base_layer_types
from layerboost.probes.metrics import BaseText, check_finite, score
from layerboost.probes.probe import Losses, Probe, TextProbe
from layerboost.runtime import Progress, rank, world_size
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.sensitivity import LayerSensitivity, Variant
from layerboost.strategies import FULL, STRATEGIES, WINDOW


@torch.no_grad()
def sweep(
    probes: Sequence[Probe],
    windows: tuple[int, ...],
    done: list[LayerSensitivity],
    save: Callable[[list[LayerSensitivity]], None],
    plan: Sequence[LayerPlan] | None = None,
) -> None:
    """Score every layer of a stock model that is not in `done`; call `save` with all layers so far after each.

    With `plan`, the other layers are as in the plan, and a score is the plan's loss with this layer replaced minus its
    loss with this layer full. Memory: one hidden state per token for the base's output and for two layers, and
    the prefix caches of `TextProbe`.
    Under torchrun the ranks take turns with the layers; `save` is called on all of them.
    """
    streams = [probe.streams for probe in probes]
    count = len(streams[0].stream.layers)
    for each in streams:
        each.follow(plan or each.plan)
    layers, own, world = list(done), rank(), world_size()
    pending: list[LayerSensitivity] = []
    # A variant of layer i runs the layers from i up, so early layers take longer.
    passes = [count - index for index in range(count)]
    with Progress("measuring sensitivity", sum(passes), "layer passes") as progress:
        progress.skip(sum(passes[: len(done)]))
        for index in range(count):
            for each in streams:
                each.advance(index)
            if index >= len(done):
                if (index - len(done)) % world == own:
                    pending.append(_measure(probes, index, windows, plan is not None))
                if (index - len(done)) % world == world - 1 or index == count - 1:
                    layers += _gathered(pending, world)
                    pending = []
                    save(layers)
                progress.advance(passes[index])
            for each in streams:
                del each.inputs[index]


def candidates(model: PreTrainedModel, layer: int, windows: Sequence[int]) -> list[LayerPlan]:
    """Return every replacement of one layer: each strategy but full attention with all of its settings.

    A layer that slides in the base can only be removed.
    """
    slides = base_layer_types(model.config)[layer] == "sliding_attention"
    return [
        LayerPlan(layer=layer, attention=name, **fields)
        for name, strategy in STRATEGIES.items()
        if name != FULL and not (slides and WINDOW in strategy.settings)
        for fields in strategy.variants(windows)
    ]


def _measure(probes: Sequence[Probe], index: int, windows: tuple[int, ...], on_plan: bool) -> LayerSensitivity:
    current = probes[0].streams.plan
    options = candidates(probes[0].streams.stream.model, index, windows)
    if on_plan:  # the loss of the other layers, this one being full
        options.append(LayerPlan(layer=index, attention=FULL))
    plans = [[*current[:index], option, *current[index + 1 :]] for option in options]
    found: list[Losses] = [{} for _ in plans]
    for probe in probes:
        for losses, new in zip(found, probe.losses(plans), strict=True):
            losses.update(new)
    if on_plan:
        rest = found.pop()
        for losses in found:  # relative to the plan's own layer, not to the full one
            losses.pop("mse", None)
        found = [{m: v - rest[m] for m, v in losses.items()} for losses in found]
    counts = {metric: n for probe in probes for metric, n in probe.counts().items()}
    variants = []
    for option, losses in zip(options, found, strict=False):
        if not option.strategy.keeps_weights:
            losses["cosine"] = _cosine(probes, index)
        scores = {metric: score(values, counts[metric]) for metric, values in losses.items()}
        means = {metric: one.mean for metric, one in scores.items()}
        check_finite(f"layer {index} made {option.attention}", means, probes[0].streams.stream.model.dtype)
        variants.append(Variant(attention=option.attention, window=option.window, sink=option.sink, scores=scores))
    return LayerSensitivity(layer=index, variants=variants)


def _cosine(probes: Sequence[Probe], index: int) -> torch.Tensor:
    """Return 1 − cosine of the stream before and after the attention, averaged per sequence (LLM-Drop, section 3)."""
    parts = []
    for probe in probes:
        if isinstance(probe, TextProbe):
            for sample, hidden in zip(probe.samples, probe.streams.inputs[index], strict=True):
                if isinstance(sample, BaseText):
                    after = hidden + probe.streams.stream.attention_output(index, hidden)
                    before, with_it = sample.rows(hidden).float(), sample.rows(after).float()
                    parts.append(1 - sample.by_sequence(torch.cosine_similarity(before, with_it, dim=-1)))
    return torch.cat(parts)


def _gathered(pending: list[LayerSensitivity], world: int) -> list[LayerSensitivity]:
    """Return the layers that all ranks have measured since the last call, in order."""
    if world == 1:
        return pending
    parts: list[list[LayerSensitivity]] = [[] for _ in range(world)]
    torch.distributed.all_gather_object(parts, pending)
    return sorted((entry for part in parts for entry in part), key=lambda entry: entry.layer)
