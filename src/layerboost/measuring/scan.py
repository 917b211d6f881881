"""The scan: an estimate of what every KV head's window loses, from a few backward passes.

To second order, the KL of a small change Δ of a head's output is half of its Fisher information, E[(g·Δ)²] / 2, where g
is the gradient of the log-likelihood of labels that are drawn from the model itself. To first order, a retrieved answer
loses −g·Δ of its log-probability, g being that one's gradient. One backward pass gives g for all heads at once, where
an exact sweep runs the model once per head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from layerboost.measuring.sweep import head_candidates
from layerboost.model.attention import sliding_attention
from layerboost.model.modeling import decoder_layers, query_heads
from layerboost.model.sinks import Sinks
from layerboost.model.stream import decoded, head_logits, input_of, recorded, with_gradient
from layerboost.model.surgery import captured_attention, output_projection
from layerboost.probes.metrics import answer_scores
from layerboost.retrieval import Prompts
from layerboost.runtime import Progress
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.sensitivity import LayerSensitivity, Score, Variant

# A site's number, its columns of the attention output, and what they change by: `[B, T, columns]`.
Change = tuple[int, torch.Tensor, torch.Tensor]
# The normed final states `[B, T, D]` -> what is differentiated, a sum over sequences.
Target = Callable[[torch.Tensor], torch.Tensor]


def scanned(
    model: PreTrainedModel,
    batches: Sequence[torch.Tensor],
    prompts: Sequence[Prompts],
    layers: Sequence[LayerSensitivity],
    sinks: Sinks,
    group: int,
    draws: int,
    seed: int,
) -> list[LayerSensitivity]:
    """Return the layers with a scan's scores of their KV heads, `group` at a time, under every window they have."""
    heads = model.config.get_text_config().num_key_value_heads
    sites = {entry.layer: head_candidates(entry.variants, entry.layer, heads, group) for entry in layers}
    every = [site for group_sites in sites.values() for site in group_sites]
    if not every:  # all layers slide in the base
        return list(layers)
    # Estimated KL of each site in each sequence, nats per token.
    lost = {"kl": scan(model, batches, every, sinks, draws, seed).square().mean(1) / 2}
    counts = {"kl": sum(len(ids) * (ids.shape[1] - 1) for ids in batches), "retrieval": 0}
    if prompts:
        lost["retrieval"] = scan_answers(model, prompts, every, sinks)
        counts["retrieval"] = len(lost["retrieval"])
    scores = [
        {metric: Score.of(values[:, index].tolist(), counts[metric]) for metric, values in lost.items()}
        for index in range(len(every))
    ]
    found = iter(
        [Variant(**site.model_dump(exclude={"layer"}), scores=each) for site, each in zip(every, scores, strict=True)]
    )
    return [entry.model_copy(update={"heads": [next(found) for _ in sites[entry.layer]]}) for entry in layers]


def scan(
    model: PreTrainedModel,
    batches: Sequence[torch.Tensor],
    sites: Sequence[LayerPlan],
    sinks: Sinks,
    draws: int,
    seed: int = 0,
) -> torch.Tensor:
    """Return g·Δ of each sequence, draw and site, over the square root of the sequence's tokens: `[N, draws, sites]`.

    `batches`: of ids `[B, T]`, of a stock model.
    `sites`: what is changed alone each time, windows on some KV heads of a layer; `sinks`: as from `calibrate_sinks`.
    Takes a forward pass per batch and a backward pass per batch and draw, with the activations of one batch.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    targets = [lambda hidden: _likelihood(model, hidden, generator)] * draws
    found = []
    with Progress("scanning KV heads", sum(ids.numel() for ids in batches) * draws, "tokens") as progress:
        for ids in batches:
            products = _products(model, ids, sites, sinks, targets, progress)
            found.append((products / ids.shape[1] ** 0.5).cpu())
    return torch.cat(found)


def scan_answers(
    model: PreTrainedModel, prompts: Sequence[Prompts], sites: Sequence[LayerPlan], sinks: Sinks
) -> torch.Tensor:
    """Return the estimated loss of each answer's log-probability by each site, in nats: `[prompts, sites]`.

    A window that loses an answer whole changes more than the first order sees, so values are too small; their order is
    what they are for.
    """
    found = []
    with Progress("scanning answers", sum(each.ids.numel() for each in prompts), "tokens") as progress:
        for batch in prompts:
            target = partial(_answers, model, batch)
            found.append(-_products(model, batch.ids.to(model.device), sites, sinks, [target], progress)[:, 0].cpu())
    return torch.cat(found)


def _products(
    model: PreTrainedModel,
    ids: torch.Tensor,
    sites: Sequence[LayerPlan],
    sinks: Sinks,
    targets: Sequence[Target],
    progress: Progress,
) -> torch.Tensor:
    """Return g·Δ of each sequence, target and site: `[B, targets, sites]`."""
    layers = sorted({site.layer for site in sites})
    changes: dict[int, list[Change]] = {layer: [] for layer in layers}

    @torch.no_grad()
    def see(layer: int, query: Any, key: Any, value: Any, scaling: float, softcap: float | None) -> None:
        heads, groups, size = key.shape[1], query.shape[1] // key.shape[1], query.shape[3]
        for index, site in enumerate(sites):
            if site.layer == layer:
                assert site.window is not None
                windowed = site.windowed(heads)
                queries = query_heads(windowed, groups)
                logits = sinks(site) if site.sink else None
                out = sliding_attention(
                    query[:, queries], key[:, windowed], value[:, windowed], site.window, logits, None, scaling, softcap
                )
                columns = torch.arange(heads * groups * size, device=out.device).view(-1, size)[queries].flatten()
                changes[layer].append((index, columns, out.transpose(1, 2).flatten(2)))

    projections = {layer: output_projection(model, layer) for layer in layers}
    # The weights are frozen: the graph starts at the input of the lowest layer.
    lowest = decoder_layers(model)[0]
    start = lowest.register_forward_pre_hook(lambda _, *given: with_gradient(*given), with_kwargs=True)
    try:
        with torch.enable_grad(), captured_attention(model, layers, see), recorded(projections, input_of) as outputs:
            hidden = decoded(model, ids, use_cache=False)
    finally:
        start.remove()
    for layer, output in outputs.items():  # what the projections get: `[B, T, H·D]`, with gradients
        full = output.detach()
        changes[layer] = [(site, columns, out - full[..., columns]) for site, columns, out in changes[layer]]
    products = torch.zeros(len(ids), len(targets), len(sites), device=model.device)
    for index, target in enumerate(targets):
        gradients = torch.autograd.grad(target(hidden), list(outputs.values()), retain_graph=index < len(targets) - 1)
        for layer, gradient in zip(outputs, gradients, strict=True):
            for site, columns, change in changes[layer]:
                products[:, index, site] = (gradient[..., columns] * change).flatten(1).sum(1)
        progress.advance(ids.numel())
    return products


def _answers(model: PreTrainedModel, prompts: Prompts, hidden: torch.Tensor) -> torch.Tensor:
    """Return the summed log-probability of the prompts' answers."""
    return answer_scores(model, prompts, hidden)[0].sum()


def _likelihood(model: PreTrainedModel, hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the summed log-likelihood of labels drawn from the model, for every position."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows in hidden.flatten(0, 1).split(256):
        scores = head_logits(model, rows).float().log_softmax(-1)
        labels = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        total = total + scores.gather(1, labels).sum()
    return total
