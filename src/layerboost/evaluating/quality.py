"""Models against their base on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from transformers import PreTrainedModel

from layerboost.evaluating.statistics import difference, differences
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
def text_losses(
    base: PreTrainedModel,
    base_hidden: list[torch.Tensor],
    changed: PreTrainedModel | None,
    batches: list[torch.Tensor],
    advance: Callable[[float], None],
) -> SequenceLosses:
    """Return KL(base ‖ changed) and NLL of the changed model over all sequences, `[N]` in nats per token.

    If `changed` is None, they are those of the base itself: its NLL, and a KL of 0.
    """
    kl, nll = [], []
    for batch, states in zip(batches, base_hidden, strict=True):
        others = [] if changed is None else [_decode(changed, batch)]
        own, losses = token_losses(base, states.to(base.device), batch.to(base.device), others, changed)
        kl.append(losses[0].kl if losses else torch.zeros_like(own))
        nll.append(losses[0].nll if losses else own)
        advance(batch.numel())
    return SequenceLosses(torch.cat(kl).cpu(), torch.cat(nll).cpu())


def compare_text(losses: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Perplexity]:
    """Return perplexity, NLL and KL of each model, and its NLL minus the base's, paired by sequence.

    `losses`: `nll` and `kl` of every sequence, in nats per token, by model.
    """
    nll = {model: Score.of(result["nll"]) for model, result in losses.items()}
    changes = differences({model: dict(enumerate(result["nll"])) for model, result in losses.items()})
    return {
        model: Perplexity(
            perplexity=perplexity(nll[model].mean),
            nll=nll[model],
            kl=difference(result["kl"]),
            nll_difference=changes.get(model),
        )
        for model, result in losses.items()
    }


def perplexity(nll: float) -> float:
    """Return the perplexity of a mean NLL in nats per token, at most e^700, beyond which a float overflows."""
    return math.exp(min(nll, 700.0))


def _decode(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    hidden: torch.Tensor = model.get_decoder()(input_ids=batch.to(model.device), use_cache=False).last_hidden_state
    return hidden
