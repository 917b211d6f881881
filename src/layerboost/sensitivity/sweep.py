"""The sweep: every layer under every replacement, each variant started from the base's own input to that layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedModel

from layerboost.artifacts import LayerPlan, LayerSensitivity, Score, Variant
from layerboost.model.modeling import base_layer_types
from layerboost.model.stream import LayerStream
from layerboost.model.surgery import captured_scores, family_of, replaced
from layerboost.runtime import Progress
from layerboost.sensitivity.metrics import SequenceLosses, score, token_losses

Sinks = dict[tuple[int, int], torch.Tensor]


@torch.no_grad()
def calibrate_sinks(
    model: PreTrainedModel, batches: list[torch.Tensor], layers: Iterable[int], windows: Iterable[int]
) -> Sinks:
    """Sink logits `[H]` for each (layer, window): the mean log-sum-exp of the scores that the window drops.

    One forward pass of the stock model over `batches` of `[B, T]` ids.
    """
    with captured_scores(model, list(layers), list(windows)) as found:
        for batch in batches:
            model.get_decoder()(input_ids=batch, use_cache=False)
    return {key: torch.stack(parts).mean(0) for key, parts in found.items()}


@torch.no_grad()
def sweep(
    model: PreTrainedModel,
    batches: list[torch.Tensor],
    windows: tuple[int, ...],
    done: list[LayerSensitivity],
    save: Callable[[Score, list[LayerSensitivity]], None],
) -> None:
    """Score every layer of a stock model that is not in `done`; `save` gets the base's NLL and all layers so far.

    `batches`: ids `[B, T]`, T longer than every window. Memory: one hidden state a token for the base's stream and one
    for its output, besides the model.
    """
    stream = LayerStream(model)
    count = len(stream.layers)
    inputs, outputs = map(list, zip(*(stream.forward(batch) for batch in batches), strict=True))
    base_nll = torch.cat(
        [token_losses(model, output, batch, [])[0] for output, batch in zip(outputs, batches, strict=True)]
    )
    sinks = calibrate_sinks(model, batches, range(len(done), count), windows)
    layers = list(done)
    # A variant of layer i runs the layers from i up, so early layers take longer.
    passes = [count - index for index in range(count)]
    with Progress("measuring sensitivity", sum(passes), "layer passes") as progress:
        progress.skip(sum(passes[: len(done)]))
        for index in range(count):
            if index >= len(done):
                plans = candidates(model, index, windows)
                losses = _layer_losses(stream, index, plans, sinks, inputs, outputs, batches)
                variants = [_variant(plan, parts, base_nll) for plan, parts in zip(plans, losses, strict=True)]
                layers.append(LayerSensitivity(layer=index, variants=variants))
                save(score(base_nll), layers)
                progress.advance(passes[index])
            inputs = [stream.layer(index, hidden) for hidden in inputs]


def candidates(model: PreTrainedModel, layer: int, windows: tuple[int, ...]) -> list[LayerPlan]:
    """Every replacement of one layer that its family takes: none; each window, with and without a sink.

    A layer that slides in the base already can only be removed.
    """
    supports = family_of(model.config).supports
    plans = [LayerPlan(layer=layer, attention="none")] if "none" in supports else []
    if base_layer_types(model.config)[layer] == "sliding_attention":
        return plans
    sinks = (False, True) if "sink" in supports else (False,)
    plans += [LayerPlan(layer=layer, attention="sliding", window=w, sink=sink) for w in windows for sink in sinks]
    return plans


def _layer_losses(
    stream: LayerStream,
    index: int,
    plans: list[LayerPlan],
    sinks: Sinks,
    inputs: list[torch.Tensor],
    outputs: list[torch.Tensor],
    batches: list[torch.Tensor],
) -> list[list[SequenceLosses]]:
    losses: list[list[SequenceLosses]] = [[] for _ in plans]
    for hidden, output, batch in zip(inputs, outputs, batches, strict=True):
        changed = []
        for plan in plans:
            values = sinks[index, plan.window] if plan.sink and plan.window else None
            with replaced(stream.model, index, plan, values):
                start = stream.layer(index, hidden)
            changed.append(stream.finish(index + 1, start))
        for parts, found in zip(losses, token_losses(stream.model, output, batch, changed)[1], strict=True):
            parts.append(found)
    return losses


def _variant(plan: LayerPlan, parts: list[SequenceLosses], base_nll: torch.Tensor) -> Variant:
    assert plan.attention != "full"
    kl, nll = torch.cat([part.kl for part in parts]), torch.cat([part.nll for part in parts])
    return Variant(
        attention=plan.attention,
        window=plan.window,
        sink=plan.sink,
        scores={"kl": score(kl), "nll": score(nll - base_nll)},
    )
