"""Sink logits from one forward pass of the base: those that bring a windowed attention nearest to the full one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from layerboost.errors import ConfigError
from layerboost.model.surgery import attention_of, captured_attention
from layerboost.traffic import Traffic

Sinks = dict[tuple[int, int], torch.Tensor]
Terms = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# Candidates around the mean log-sum-exp of the dropped scores: a sink there takes the share the dropped keys had.
OFFSETS = torch.arange(-15, 15.25, 0.25)
QUERIES, ROUNDS = 1024, 10


@torch.no_grad()
def calibrate_sinks(
    model: PreTrainedModel, batches: Sequence[torch.Tensor | Traffic], layers: Iterable[int], windows: Iterable[int]
) -> Sinks:
    """Sink logits `[H]` for each (layer, window), from one pass of the stock model over `batches` of ids `[B, T]`.

    Raises ConfigError where no sequence is longer than a window.

    With g = sigmoid(lse − s), the share a sink s leaves to the window's keys of log-sum-exp lse, a head's output is g
    times its output without a sink. The sinks are the least squares fit of that to full attention, on what all heads
    together add to the stream, over some 1,024 queries spread evenly over the sequences longer than the window.
    """
    windows = list(windows)
    sequences = [(each, [each.shape[1]] * len(each)) if isinstance(each, torch.Tensor) else (each.ids, each.lengths)
                 for each in batches]  # fmt: skip
    every = [length for _, lengths in sequences for length in lengths]
    if max(every) <= max(windows, default=0):
        raise ConfigError(
            f"no sequence is longer than the window of {max(windows)}",
            found=f"at most {max(every)} tokens",
            do="choose shorter windows, or measure on longer text",
        )
    per_sequence = {window: max(8, QUERIES // sum(length > window for length in every)) for window in windows}
    fits: dict[tuple[int, int], list[Terms]] = {}

    def see(
        lengths: list[int],
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> None:
        projection: Any = attention_of(model, layer).o_proj
        for length in sorted(set(lengths)):
            rows = [row for row, other in enumerate(lengths) if other == length]
            q, k, v = (each[rows, :, :length] for each in (query, key, value))
            for window in windows:
                if length > window:
                    outputs = head_outputs(q, k, v, window, scaling, softcap, per_sequence[window])
                    fits.setdefault((layer, window), []).append(terms(*outputs, projection.weight.float()))

    layers = list(layers)
    for ids, lengths in sequences:
        with captured_attention(model, layers, partial(see, lengths)):
            model.get_decoder()(input_ids=ids, use_cache=False)
    return {key: fit([torch.cat(parts) for parts in zip(*found, strict=True)]) for key, found in fits.items()}


def head_outputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    scaling: float,
    softcap: float | None = None,
    queries: int = QUERIES,
) -> Terms:
    """Attention with and without the window: query `[B, H, T, D]`, key and value `[B, Hkv, T, D]`.

    Returns, for some `queries` of the T queries of each sequence, N in all, full and windowed output `[N, H, D]`, the
    window's log-sum-exp `[N, H]`, and the mean log-sum-exp of the dropped scores `[B, H]`.
    """
    heads, length = query.shape[1:3]
    groups = heads // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    position = torch.arange(length, device=query.device)
    # From the last one down, so that queries that drop something are among them.
    rows = position.flip(0)[:: max(1, length // queries)].flip(0)
    scores = (query[:, :, rows] @ key.transpose(-1, -2) * scaling).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    causal = position <= rows[:, None]
    dropped = position <= rows[:, None] - window
    full = scores.masked_fill(~causal, -torch.inf).softmax(-1) @ value.float()
    inside = scores.masked_fill(~causal | dropped, -torch.inf)
    windowed = inside.softmax(-1) @ value.float()
    outside = scores.masked_fill(~dropped, -torch.inf).logsumexp(-1)[..., rows >= window].mean(-1)
    full, windowed, lse = (each.transpose(1, 2).flatten(0, 1) for each in (full, windowed, inside.logsumexp(-1)))
    return full, windowed, lse, outside


def terms(
    full: torch.Tensor, windowed: torch.Tensor, lse: torch.Tensor, center: torch.Tensor, project: torch.Tensor
) -> Terms:
    """The squared error of the projected output as a quadratic form in the shares g `[N, H]`: g·A·g − 2 b·g + constant.

    `project`: the output projection `[E, H·D]`. Returns A `[N, H, H]`, b `[N, H]`, `lse`, `center`.
    """
    heads = project.view(len(project), *full.shape[1:])
    added = torch.einsum("nhd,ehd->nhe", windowed, heads)
    target = torch.einsum("nhd,ehd->ne", full, heads)
    return added @ added.transpose(1, 2), torch.einsum("nhe,ne->nh", added, target), lse, center


def fit(parts: list[torch.Tensor]) -> torch.Tensor:
    """Sinks `[H]` of least squared error, by coordinate descent over the heads; `parts`: as from `terms`."""
    square, dot, lse, center = parts
    candidates = center.mean(0)[:, None] + OFFSETS.to(center.device)
    shares = torch.sigmoid(lse[:, :, None] - candidates)
    chosen = torch.full((len(candidates),), len(OFFSETS) // 2, device=center.device)
    for _ in range(ROUNDS):
        before = chosen.clone()
        for head in range(len(candidates)):
            current = shares.gather(-1, chosen.expand(len(lse), -1)[..., None])[..., 0]
            others = (square[:, head] * current).sum(-1) - square[:, head, head] * current[:, head] - dot[:, head]
            own = shares[:, head]
            chosen[head] = (square[:, head, head] @ own.square() + 2 * others @ own).argmin()
        if torch.equal(chosen, before):
            break
    return candidates.gather(-1, chosen[:, None])[:, 0]
