"""The scan: an estimate of every KV head's KL under a window from a few backward passes.

To second order, the KL of a small change Δ of a head's output is half of its Fisher information, E[(g·Δ)²] / 2, where g
is the gradient of the log-likelihood of labels that are drawn from the model itself. One backward pass gives g for all
heads at once, where an exact sweep runs the model once per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from layerboost.measuring.sweep import head_candidates
from layerboost.model.attention import sliding_attention
from layerboost.model.modeling import decoder_layers
from layerboost.model.sinks import Sinks
from layerboost.model.stream import head_logits
from layerboost.model.surgery import captured_attention, output_projection
from layerboost.runtime import Progress
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.sensitivity import LayerSensitivity, Score, Variant

# A site's number, its columns of the attention output, and what they change by: `[B, T, columns]`.
Change = tuple[int, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Scan:
    """`products` `[N, sites]`: g·Δ of each sequence and draw at each site, over the square root of its tokens.

    Rows of one sequence follow one another, `draws` of them.
    """

    products: torch.Tensor
    draws: int

    def kl(self) -> torch.Tensor:
        """Return the estimated KL of each site in each sequence, nats per token: `[sequences, sites]`."""
        by_sequence = self.products.view(-1, self.draws, self.products.shape[1])
        return by_sequence.square().mean(1) / 2


def scanned(
    model: PreTrainedModel,
    batches: Sequence[torch.Tensor],
    layers: Sequence[LayerSensitivity],
    sinks: Sinks,
    group: int,
    draws: int,
    seed: int,
) -> list[LayerSensitivity]:
    """Return the layers with a scan's scores of their KV heads, `group` at a time, under every window they have."""
    heads = model.config.num_key_value_heads
    sites = {entry.layer: head_candidates(entry.variants, entry.layer, heads, group) for entry in layers}
    every = [site for group_sites in sites.values() for site in group_sites]
    if not every:  # all layers slide in the base
        return list(layers)
    values = iter(scan(model, batches, every, sinks, draws, seed).kl().T.tolist())
    tokens = sum(len(ids) * (ids.shape[1] - 1) for ids in batches)
    return [
        entry.model_copy(
            update={
                "heads": [
                    Variant(**site.model_dump(exclude={"layer"}), scores={"kl": Score.of(next(values), tokens)})
                    for site in sites[entry.layer]
                ]
            }
        )
        for entry in layers
    ]


def scan(
    model: PreTrainedModel,
    batches: Sequence[torch.Tensor],
    sites: Sequence[LayerPlan],
    sinks: Sinks,
    draws: int,
    seed: int = 0,
) -> Scan:
    """Return a scan of a stock model over batches of ids `[B, T]`.

    `sites`: what is changed alone each time, windows on some KV heads of a layer; `sinks`: as from `calibrate_sinks`.
    Takes a forward pass per batch and a backward pass per batch and draw, with the activations of one batch.
    """
    layers = sorted({site.layer for site in sites})
    generator = torch.Generator(model.device).manual_seed(seed)
    found = []
    with Progress("scanning KV heads", sum(ids.numel() for ids in batches) * draws, "tokens") as progress:
        for ids in batches:
            changes: dict[int, list[Change]] = {layer: [] for layer in layers}
            outputs, hidden = _forward(model, ids, layers, sites, sinks, changes)
            products = torch.zeros(len(ids), draws, len(sites), device=model.device)
            for draw in range(draws):
                gradients = torch.autograd.grad(
                    _likelihood(model, hidden, generator), list(outputs.values()), retain_graph=draw < draws - 1
                )
                for layer, gradient in zip(outputs, gradients, strict=True):
                    for site, columns, change in changes[layer]:
                        products[:, draw, site] = (gradient[..., columns] * change).flatten(1).sum(1)
                progress.advance(ids.numel())
            found.append((products / ids.shape[1] ** 0.5).flatten(0, 1).cpu())
    return Scan(torch.cat(found), draws)


def _forward(
    model: PreTrainedModel,
    ids: torch.Tensor,
    layers: Sequence[int],
    sites: Sequence[LayerPlan],
    sinks: Sinks,
    changes: dict[int, list[Change]],
) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Run the model; return the attention outputs before their projection `[B, T, H·D]` by layer, with gradients, and
    the normed final states. Put each site's change of that output into `changes`."""
    outputs: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def see(layer: int, query: Any, key: Any, value: Any, scaling: float, softcap: float | None) -> None:
        heads, groups, size = key.shape[1], query.shape[1] // key.shape[1], query.shape[3]
        for index, site in enumerate(sites):
            if site.layer == layer:
                assert site.window is not None
                windowed = [head for head in range(heads) if head not in site.full_kv_heads]
                queries = [group for head in windowed for group in range(head * groups, (head + 1) * groups)]
                logits = sinks(site) if site.sink else None
                out = sliding_attention(
                    query[:, queries], key[:, windowed], value[:, windowed], site.window, logits, None, scaling, softcap
                )
                columns = torch.arange(heads * groups * size, device=out.device).view(-1, size)[queries].flatten()
                changes[layer].append((index, columns, out.transpose(1, 2).flatten(2)))

    def record(layer: int) -> Any:
        def hook(_: Any, args: tuple[torch.Tensor]) -> None:
            outputs[layer] = args[0]
            full = args[0].detach()
            changes[layer] = [(site, columns, out - full[..., columns]) for site, columns, out in changes[layer]]

        return hook

    projections: list[Any] = [output_projection(model, layer) for layer in layers]
    hooks = [each.register_forward_pre_hook(record(layer)) for each, layer in zip(projections, layers, strict=True)]
    # The weights are frozen: the graph starts at the input of the lowest layer.
    start = decoder_layers(model)[0].register_forward_pre_hook(_with_gradient, with_kwargs=True)
    try:
        with torch.enable_grad(), captured_attention(model, layers, see):
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    finally:
        for hook in (*hooks, start):
            hook.remove()
    return outputs, hidden


def _with_gradient(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach().requires_grad_()}


def _likelihood(model: PreTrainedModel, hidden: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return the summed log-likelihood of labels drawn from the model, for every position."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows in hidden.flatten(0, 1).split(256):
        scores = head_logits(model, rows).float().log_softmax(-1)
        labels = torch.multinomial(scores.detach().exp(), 1, generator=generator)
        total = total + scores.gather(1, labels).sum()
    return total
