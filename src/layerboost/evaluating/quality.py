"""Models against their base on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from layerboost.evaluating.statistics import difference
from layerboost.probes.metrics import SequenceLosses, token_losses
from layerboost.schemas.evaluation import Perplexity
from layerboost.schemas.sensitivity import Score


@torch.inference_mode()
def hidden_states(
    model: PreTrainedModel, batches: list[torch.Tensor], advance: Callable[[float], None]
) -> list[torch.Tensor]:
    """Return the normed final hidden states of every batch of ids `[B, T]`: `[B, T, D]` in main memory.

    `advance` is called with the tokens done since the last call.
    """
    states = []
    for batch in batches:
        states.append(_decode(model, batch).cpu())
        advance(batch.numel())
    return states


@torch.inference_mode()
def base_losses(model: PreTrainedModel, batches: list[torch.Tensor], hidden: list[torch.Tensor]) -> SequenceLosses:
    """Return the NLL of the base over all sequences, `[N]` in nats per token; its KL to itself is 0."""
    nll = torch.cat(
        [
            token_losses(model, states.to(model.device), batch.to(model.device), [])[0].cpu()
            for batch, states in zip(batches, hidden, strict=True)
        ]
    )
    return SequenceLosses(kl=torch.zeros_like(nll), nll=nll)


@torch.inference_mode()
def changed_losses(
    base: PreTrainedModel,
    base_hidden: list[torch.Tensor],
    changed: PreTrainedModel,
    batches: list[torch.Tensor],
    advance: Callable[[float], None],
) -> SequenceLosses:
    """Return KL(base ‖ changed) and NLL of the changed model over all sequences, `[N]` in nats per token."""
    parts = []
    for batch, states in zip(batches, base_hidden, strict=True):
        other = _decode(changed, batch)
        _, [losses] = token_losses(base, states.to(base.device), batch.to(base.device), [other], changed)
        parts.append(losses)
        advance(batch.numel())
    return SequenceLosses(torch.cat([part.kl for part in parts]).cpu(), torch.cat([part.nll for part in parts]).cpu())


def compare_text(losses: Mapping[str, Mapping[str, list[float]]], base: str) -> dict[str, Perplexity]:
    """Return perplexity, NLL and KL of each model, and its NLL minus the base's, paired by sequence.

    `losses`: `nll` and `kl` of every sequence, in nats per token, by model.
    """
    compared = {}
    for model, result in losses.items():
        nll, change = Score.of(result["nll"]), None
        if model != base:
            change = difference([own - other for own, other in zip(result["nll"], losses[base]["nll"], strict=True)])
        compared[model] = Perplexity(
            perplexity=perplexity(nll.mean), nll=nll, kl=difference(result["kl"]), nll_difference=change
        )
    return compared


def perplexity(nll: float) -> float:
    """Return the perplexity of a mean NLL in nats per token, at most e^700, beyond which a float overflows."""
    return math.exp(min(nll, 700.0))


def _decode(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = model.get_decoder()(input_ids=batch.to(model.device), use_cache=False).last_hidden_state
    return hidden
