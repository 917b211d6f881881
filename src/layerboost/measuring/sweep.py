"""The sweep: every layer with every replacement, each variant run from the model's own input to that layer.

With `head_group`, also every group of a layer's KV heads with every window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

from layerboost.model.modeling import ATTENTION, base_layer_types
from layerboost.probes.metrics import BaseText, check_finite, score
from layerboost.probes.probe import Losses, Probe, TextProbe
from layerboost.runtime import Progress, rank, world_size
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.sensitivity import LayerSensitivity, Variant
from layerboost.strategies import (
    FULL,
    FULL_KV_HEADS,
    MEASURED,
    MLP_STRATEGIES,
    SLIDING,
    STRATEGIES,
    WINDOW,
    StrategyName,
)


@torch.no_grad()
def sweep(
    probes: Sequence[Probe],
    options: Sequence[list[LayerPlan]],
    done: list[LayerSensitivity],
    save: Callable[[list[LayerSensitivity]], None],
    plan: Sequence[LayerPlan] | None = None,
    head_group: int | None = None,
) -> None:
    """Score each layer of a stock model that is not in `done` with its `options`, the replacements of the layer; call
    `save` with all layers so far after each.

    With `plan`, the other layers are as in the plan, and a score is the plan's loss with this layer replaced minus its
    loss with this layer full. `head_group`: how many KV heads get a window together; None measures layers alone.
    Memory: one hidden state per token for the base's output and for two layers, and the prefix caches of `TextProbe`.
    Under torchrun the ranks take turns with the layers; `save` is called on all of them.
    """
    streams = [probe.streams for probe in probes]
    count = len(options)
    for each in streams:
        each.follow(plan or each.plan)
    layers, own, world = list(done), rank(), world_size()
    pending: list[LayerSensitivity] = []
    # A variant of layer i runs the layers from i up, so early layers take longer.
    passes = range(count, 0, -1)
    with Progress("measuring sensitivity", sum(passes), "layer passes") as progress:
        progress.skip(sum(passes[: len(done)]))
        for index in range(count):
            for each in streams:
                each.advance(index)
            if index >= len(done):
                if (index - len(done)) % world == own:
                    pending.append(_measure(probes, index, options[index], plan is not None, head_group))
                if (index - len(done)) % world == world - 1 or index == count - 1:
                    layers += _gathered(pending, world)
                    pending = []
                    save(layers)
                progress.advance(passes[index])
            for each in streams:
                del each.inputs[index]


def candidates(
    config: PreTrainedConfig,
    windows: Sequence[int],
    strategies: Sequence[StrategyName] = MEASURED,
    mlp_widths: Sequence[int] = (),
) -> list[list[LayerPlan]]:
    """Return, for each layer, every replacement of its attention, and with `mlp_widths` of its MLP: each of the
    strategies with all of its settings.

    Attention that slides in the base can only be removed; there is none to replace in a hybrid's other layers.
    """
    mlps: list[dict[str, Any]] = [
        {"attention": FULL, "mlp": name, **fields}
        for name, strategy in MLP_STRATEGIES.items()
        if name != FULL and mlp_widths
        for fields in strategy.variants(windows, mlp_widths)
    ]
    found = []
    for layer, kind in enumerate(base_layer_types(config)):
        attention: list[dict[str, Any]] = [
            {"attention": name, **fields}
            for name, strategy in STRATEGIES.items()
            if kind in ATTENTION
            and name in strategies
            and not (kind == "sliding_attention" and WINDOW in strategy.settings)
            for fields in strategy.variants(windows)
        ]
        found.append([LayerPlan(layer=layer, **fields) for fields in (*attention, *mlps)])
    return found


def head_candidates(whole: Sequence[Variant], layer: int, kv_heads: int, group: int) -> list[LayerPlan]:
    """Return each window on each group of a layer's KV heads, with a sink if that loses less KL for the whole layer."""
    if group == kv_heads:
        return []
    best: dict[int | None, Variant] = {}
    for variant in whole:
        if variant.attention == SLIDING:
            best[variant.window] = min(best.get(variant.window, variant), variant, key=lambda v: v.scores["kl"].mean)
    starts = range(0, kv_heads, group)
    others = [tuple(head for head in range(kv_heads) if not 0 <= head - start < group) for start in starts]
    return [
        variant.plan(layer).model_copy(update={FULL_KV_HEADS: full}) for variant in best.values() for full in others
    ]


def _measure(
    probes: Sequence[Probe], index: int, options: list[LayerPlan], on_plan: bool, head_group: int | None
) -> LayerSensitivity:
    model = probes[0].streams.stream.model
    # The loss of the plan's other layers, this one being as in the base.
    [rest] = _losses(probes, [probes[0].streams.stream.unchanged[index]]) if on_plan else [None]
    turns = _turns(probes, index)
    whole = _variants(probes, index, options, rest, turns)
    heads = model.config.get_text_config().num_key_value_heads
    of_heads = head_candidates(whole, index, heads, head_group) if head_group else []
    return LayerSensitivity(
        layer=index,
        variants=whole,
        heads=_variants(probes, index, of_heads, rest, turns),
        block_influence=score(turns.layer, _counts(probes)["cosine"]),
    )


def _losses(probes: Sequence[Probe], options: Sequence[LayerPlan]) -> list[Losses]:
    """Return the losses of the current plan with one layer replaced by each option."""
    current = probes[0].streams.plan
    plans = [[*current[: option.layer], option, *current[option.layer + 1 :]] for option in options]
    found: list[Losses] = [{} for _ in plans]
    for probe in probes if plans else ():
        for losses, new in zip(found, probe.losses(plans), strict=True):
            losses.update(new)
    return found


def _variants(
    probes: Sequence[Probe], index: int, options: list[LayerPlan], rest: Losses | None, turns: Turns
) -> list[Variant]:
    """Return the scores of each option for a layer, less those of `rest`."""
    found = _losses(probes, options)
    if rest is not None:
        for losses in found:  # relative to the plan's own layer, not to the full one
            losses.pop("mse", None)
        found = [{m: v - rest[m] for m, v in losses.items()} for losses in found]
    counts, variants = _counts(probes), []
    for option, losses in zip(options, found, strict=True):
        if not option.strategy.keeps_weights:
            losses["cosine"] = turns.attention
        elif not MLP_STRATEGIES[option.mlp].keeps_weights:
            losses["cosine"] = turns.mlp
        scores = {metric: score(values, counts[metric]) for metric, values in losses.items()}
        means = {metric: one.mean for metric, one in scores.items()}
        check_finite(f"layer {index} made {option.label}", means, probes[0].streams.stream.model.dtype)
        variants.append(Variant(**option.model_dump(exclude={"layer"}), scores=scores))
    return variants


def _counts(probes: Sequence[Probe]) -> dict[str, int]:
    return {metric: n for probe in probes for metric, n in probe.counts().items()}


class Turns(NamedTuple):
    """How far a stock layer turns the stream: 1 − cosine of the states before and after each part, by sequence `[N]`.

    The parts that LLM-Drop (section 3) removes, and the whole layer, which ShortGPT removes.
    """

    attention: torch.Tensor
    mlp: torch.Tensor
    layer: torch.Tensor


def _turns(probes: Sequence[Probe], index: int) -> Turns:
    found: list[list[torch.Tensor]] = []
    for probe in probes:
        if isinstance(probe, TextProbe):
            streams = probe.streams
            for sample, stream, hidden in zip(probe.samples, streams.of_batch, streams.inputs[index], strict=True):
                if isinstance(sample, BaseText):
                    between = hidden + stream.attention_output(index, hidden)
                    rows = [sample.rows(each).float() for each in (hidden, between, stream.stock_layer(index, hidden))]
                    pairs = ((rows[0], rows[1]), (rows[1], rows[2]), (rows[0], rows[2]))
                    found.append([1 - sample.by_sequence(torch.cosine_similarity(*pair, dim=-1)) for pair in pairs])
    return Turns(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _gathered(pending: list[LayerSensitivity], world: int) -> list[LayerSensitivity]:
    """Return the layers that all ranks have measured since the last call, in order."""
    if world == 1:
        return pending
    parts: list[list[LayerSensitivity]] = [[] for _ in range(world)]
    torch.distributed.all_gather_object(parts, pending)
    return sorted((entry for part in parts for entry in part), key=lambda entry: entry.layer)
