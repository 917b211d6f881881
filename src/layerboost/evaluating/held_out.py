"""Models against their base on held-out text: losses, NLL by position in a long text, and retrieval from far back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from layerboost.evaluating.statistics import difference, differences
from layerboost.model.stream import decoded, head_logits
from layerboost.probes.metrics import CHUNK_TOKENS, SequenceLosses, answer_scores, token_losses
from layerboost.retrieval import Prompts
from layerboost.schemas.evaluation import (
    Depth,
    Perplexity,
    Positions,
    Retrieval,
    RetrievalGroup,
    RetrievalScores,
    TaskValue,
    perplexity,
)
from layerboost.schemas.run import BASE
from layerboost.schemas.sensitivity import Score

Answer = dict[str, Any]
FIRST_EDGE = 128
BATCH_TOKENS = 4096
# A base with a smaller fraction of right answers cannot do the task.
ABLE = 0.5
DEPTHS = 4


def position_edges(length: int) -> list[int]:
    """Return the edges of the buckets of positions: 0, 128 and its doublings, `length`."""
    edges = [0]
    while (edge := edges[-1] * 2 or FIRST_EDGE) < length:
        edges.append(edge)
    return [*edges, length]


@torch.inference_mode()
def position_losses(model: PreTrainedModel, ids: torch.Tensor, advance: Callable[[float], None]) -> list[list[float]]:
    """Return the NLL of each sequence of `ids` `[N, T]` in each bucket of `position_edges(T)`, in nats per token."""
    edges, losses = position_edges(ids.shape[1]), []
    for sequence in ids:
        row = sequence.to(model.device)
        hidden = decoded(model, row[None], use_cache=False)[0, :-1]
        nll = torch.cat(
            [
                -head_logits(model, states).float().log_softmax(-1).gather(-1, target[:, None])[:, 0]
                for states, target in zip(hidden.split(CHUNK_TOKENS), row[1:].split(CHUNK_TOKENS), strict=True)
            ]
        )
        # The loss at index i is that of token i + 1, which has i + 1 tokens before it.
        losses.append([float(nll[max(low - 1, 0) : high - 1].mean()) for low, high in pairwise(edges)])
        advance(len(sequence))
    return losses


@torch.inference_mode()
def retrieval_answers(model: PreTrainedModel, prompts: list[Prompts], advance: Callable[[float], None]) -> list[Answer]:
    """Return per prompt: kind, length, depth, log-probability of its answer in nats, and whether greedy is exact."""
    answers = []
    for part in prompts:
        length = part.ids.shape[1]
        for batch in part.batches(max(1, BATCH_TOKENS // length)):
            ids = batch.ids.to(model.device)
            hidden = decoded(model, ids, use_cache=False)
            scores, exact = answer_scores(model, batch, hidden)
            answers += [
                {
                    "kind": batch.kind,
                    "length_tokens": length,
                    "depth": depth,
                    "log_probability": float(score),
                    "exact": bool(hit),
                }
                for depth, score, hit in zip(batch.depths, scores, exact, strict=True)
            ]
            advance(batch.ids.numel())
    return answers


def compare_positions(losses: Mapping[str, Mapping[str, Any]]) -> Positions:
    """Return NLL by bucket of each model, and each one's difference from the base, paired by sequence."""
    buckets = {model: list(zip(*result["nll"], strict=True)) for model, result in losses.items()}
    changes = [
        differences({model: dict(enumerate(columns[bucket])) for model, columns in buckets.items()})
        for bucket in range(len(buckets[BASE]))
    ]
    return Positions(
        edges=losses[BASE]["edges"],
        sequences=len(losses[BASE]["nll"]),
        models={model: [Score.of(column) for column in columns] for model, columns in buckets.items()},
        difference={model: [change[model] for change in changes] for model in buckets if model != BASE},
    )


def compare_retrieval(answers: Mapping[str, list[Answer]]) -> Retrieval:
    """Return exact match and log-probability by kind, length and depth, and over all that the base can do."""
    rows: dict[tuple[str, int], list[int]] = {}
    for index, answer in enumerate(answers[BASE]):
        rows.setdefault((answer["kind"], answer["length_tokens"]), []).append(index)
    groups, able = [], list[int]()
    for kind, length in sorted(rows):
        indices = rows[kind, length]
        depths = _depths(answers, indices)
        groups.append(RetrievalGroup(kind=kind, length_tokens=length, depths=depths, **_scores(answers, indices)))
        if groups[-1].able:
            able += indices
    return Retrieval(groups=groups, able=RetrievalScores(**_scores(answers, able)) if able else None)


def _scores(answers: Mapping[str, list[Answer]], rows: list[int]) -> dict[str, Any]:
    """Return the fields of `RetrievalScores` over some of the prompts."""
    exact, nats = (
        {model: {row: float(given[row][key]) for row in rows} for model, given in answers.items()}
        for key in ("exact", "log_probability")
    )
    matches = {model: Score.of(list(by_prompt.values())) for model, by_prompt in exact.items()}
    return {
        "prompts": len(rows),
        "able": matches[BASE].mean >= ABLE,
        "models": {
            model: TaskValue(value=match.mean, standard_error=match.standard_error) for model, match in matches.items()
        },
        "difference": differences(exact, right_or_wrong=True),
        "log_probability": {model: Score.of(list(by_prompt.values())) for model, by_prompt in nats.items()},
        "log_probability_difference": differences(nats),
    }


def _depths(answers: Mapping[str, list[Answer]], rows: list[int]) -> list[Depth]:
    """Return the means of each model in each quarter of the prompt, in order."""
    depths = []
    for quarter in range(DEPTHS):
        part = [row for row in rows if int(next(iter(answers.values()))[row]["depth"] * DEPTHS) == quarter]
        if part:
            means = {
                key: {model: fmean(float(given[row][key]) for row in part) for model, given in answers.items()}
                for key in ("exact", "log_probability")
            }
            edges = {"from": quarter / DEPTHS, "to": (quarter + 1) / DEPTHS}
            depths.append(Depth.model_validate({**edges, "prompts": len(part), **means}))
    return depths


@torch.inference_mode()
def hidden_states(
    model: PreTrainedModel, batches: list[torch.Tensor], advance: Callable[[float], None]
) -> list[torch.Tensor]:
    """Return the normed final hidden states of every batch of ids `[B, T]`: `[B, T, D]` in main memory.

    `advance` is called with the tokens done since the last call.
    """
    states = []
    for batch in batches:
        states.append(decoded(model, batch.to(model.device), use_cache=False).cpu())
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
    found = []
    for batch, hidden in zip(batches, base_hidden, strict=True):
        states = hidden.to(base.device)
        own = states if changed is None else decoded(changed, batch.to(changed.device), use_cache=False)
        found.append(token_losses(base, states, batch.to(base.device), own, changed))
        advance(batch.numel())
    return SequenceLosses(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))


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
