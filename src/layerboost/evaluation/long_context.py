"""What a window breaks and short tasks cannot see: loss by position in a long text, and retrieval from far back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedModel

from layerboost.evaluation.statistics import difference, mean_and_error, paired
from layerboost.model.stream import head_logits
from layerboost.retrieval import Prompts
from layerboost.sensitivity.metrics import CHUNK_TOKENS, answer_scores

FIRST_EDGE = 128
BATCH_TOKENS = 4096
# A base that finds fewer answers than this share cannot do the task.
ABLE = 0.5
DEPTHS = 4


def position_edges(length: int) -> list[int]:
    """Edges of the buckets of positions: 0, 128 and its doublings, `length`."""
    edges = [0]
    while (edge := edges[-1] * 2 or FIRST_EDGE) < length:
        edges.append(edge)
    return [*edges, length]


@torch.inference_mode()
def position_losses(model: PreTrainedModel, ids: torch.Tensor, advance: Callable[[float], None]) -> list[list[float]]:
    """NLL of each sequence of `ids` `[N, T]` in each bucket of `position_edges(T)`, in nats per token."""
    edges, found = position_edges(ids.shape[1]), []
    for sequence in ids:
        row = sequence.to(model.device)
        hidden = model.get_decoder()(input_ids=row[None], use_cache=False).last_hidden_state[0, :-1]
        nll = torch.cat(
            [
                -head_logits(model, states).float().log_softmax(-1).gather(-1, target[:, None])[:, 0]
                for states, target in zip(hidden.split(CHUNK_TOKENS), row[1:].split(CHUNK_TOKENS), strict=True)
            ]
        )
        # The loss at index i is that of token i + 1, read with i + 1 tokens before it.
        found.append([float(nll[max(low - 1, 0) : high - 1].mean()) for low, high in pairwise(edges)])
        advance(len(sequence))
    return found


@torch.inference_mode()
def retrieval_answers(
    model: PreTrainedModel, prompts: list[Prompts], advance: Callable[[float], None]
) -> list[dict[str, Any]]:
    """One entry a prompt: kind, length, depth, log-probability of its answer in nats, and whether greedy finds it."""
    found = []
    for part in prompts:
        length = part.ids.shape[1]
        for batch in part.batches(max(1, BATCH_TOKENS // length)):
            ids = batch.ids.to(model.device)
            hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            scores, exact = answer_scores(model, batch, hidden)
            found += [
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
    return found


def compare_positions(losses: Mapping[str, Mapping[str, Any]], base: str) -> dict[str, Any]:
    """NLL by bucket of each model, and each one's difference from the base, paired by sequence."""
    edges = losses[base]["edges"]
    columns = {model: list(zip(*found["nll"], strict=True)) for model, found in losses.items()}
    return {
        "edges": edges,
        "sequences": len(losses[base]["nll"]),
        "models": {model: [mean_and_error(bucket) for bucket in found] for model, found in columns.items()},
        "difference": {
            model: [
                difference([own - other for own, other in zip(bucket, origin, strict=True)])
                for bucket, origin in zip(found, columns[base], strict=True)
            ]
            for model, found in columns.items()
            if model != base
        },
    }


def compare_retrieval(answers: Mapping[str, list[dict[str, Any]]], base: str) -> dict[str, Any]:
    """Exact match and log-probability by kind, length and depth, and over all that the base is able to do."""
    cells = sorted({(answer["kind"], answer["length_tokens"]) for answer in answers[base]})
    groups = []
    able: list[int] = []
    for kind, length in cells:
        rows = [
            index
            for index, answer in enumerate(answers[base])
            if (answer["kind"], answer["length_tokens"]) == (kind, length)
        ]
        group = {"kind": kind, "length_tokens": length, **_group(answers, base, rows)}
        group["depths"] = _depths(answers, rows)
        groups.append(group)
        if group["able"]:
            able += rows
    overall = _group(answers, base, able) if able else None
    return {"groups": groups, "able": overall}


def _group(answers: Mapping[str, list[dict[str, Any]]], base: str, rows: list[int]) -> dict[str, Any]:
    def column(model: str, key: str) -> dict[int, float]:
        return {index: float(answers[model][index][key]) for index in rows}

    changed = [model for model in answers if model != base]
    exact = {model: mean_and_error(list(column(model, "exact").values())) for model in answers}
    return {
        "prompts": len(rows),
        "able": exact[base]["mean"] >= ABLE,
        "models": {
            model: {"value": found["mean"], "standard_error": found["standard_error"]} for model, found in exact.items()
        },
        "difference": {
            model: difference(paired(column(base, "exact"), column(model, "exact")), right_or_wrong=True)
            for model in changed
        },
        "log_probability": {
            model: mean_and_error(list(column(model, "log_probability").values())) for model in answers
        },
        "log_probability_difference": {
            model: difference(paired(column(base, "log_probability"), column(model, "log_probability")))
            for model in changed
        },
    }


def _depths(answers: Mapping[str, list[dict[str, Any]]], rows: list[int]) -> list[dict[str, Any]]:
    """Exact match and log-probability of each model in each quarter of the prompt, the first one first."""
    found = []
    for quarter in range(DEPTHS):
        part = [index for index in rows if int(next(iter(answers.values()))[index]["depth"] * DEPTHS) == quarter]
        if not part:
            continue
        means = {
            key: {
                model: mean_and_error([float(given[index][key]) for index in part])["mean"]
                for model, given in answers.items()
            }
            for key in ("exact", "log_probability")
        }
        found.append({"from": quarter / DEPTHS, "to": (quarter + 1) / DEPTHS, "prompts": len(part), **means})
    return found
