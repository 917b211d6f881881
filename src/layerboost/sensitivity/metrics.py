"""KL and NLL per sequence from hidden states, chunked over tokens: no `[B, T, V]` tensor is ever held."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from layerboost.artifacts import Score
from layerboost.model.stream import head_logits

CHUNK_TOKENS = 256


@dataclass(frozen=True)
class SequenceLosses:
    """Means over the T-1 predicted tokens of each sequence, `[B]`, in nats."""

    kl: torch.Tensor
    nll: torch.Tensor


def token_losses(
    base_model: PreTrainedModel,
    base_hidden: torch.Tensor,
    ids: torch.Tensor,
    changed: list[torch.Tensor],
    changed_model: PreTrainedModel | None = None,
) -> tuple[torch.Tensor, list[SequenceLosses]]:
    """NLL of the base `[B]`, and KL(base ‖ changed) and NLL of each changed stream.

    `base_hidden` and every entry of `changed`: normed final hidden states `[B, T, D]` over `ids` `[B, T]`. The head is
    the base's unless `changed_model` brings its own. Base logits are computed once for all entries.
    """
    batch, length = ids.shape
    labels = ids[:, 1:].reshape(-1)
    base_rows, *rows = [hidden[:, :-1].reshape(-1, hidden.shape[-1]) for hidden in (base_hidden, *changed)]
    base_nll: list[torch.Tensor] = []
    kl: list[list[torch.Tensor]] = [[] for _ in rows]
    nll: list[list[torch.Tensor]] = [[] for _ in rows]
    for start in range(0, len(labels), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        target = labels[chunk, None]
        base = head_logits(base_model, base_rows[chunk]).float().log_softmax(-1)
        base_nll.append(-base.gather(-1, target)[:, 0])
        probabilities = base.exp()
        for index, row in enumerate(rows):
            other = head_logits(changed_model or base_model, row[chunk]).float().log_softmax(-1)
            nll[index].append(-other.gather(-1, target)[:, 0])
            # One [chunk, V] temporary: sum p·(log p - log q)
            kl[index].append(torch.einsum("nv,nv->n", probabilities, base - other))

    def per_sequence(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(parts).view(batch, length - 1).mean(-1)

    losses = [SequenceLosses(per_sequence(k), per_sequence(n)) for k, n in zip(kl, nll, strict=True)]
    return per_sequence(base_nll), losses


def score(per_sequence: torch.Tensor) -> Score:
    """Mean and standard error over sequences `[N]`, N ≥ 2."""
    values = per_sequence.double()
    error = values.std() / len(values) ** 0.5
    return Score(mean=float(values.mean()), standard_error=float(error))
