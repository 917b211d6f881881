"""Sink logits from one forward pass of the base: those that bring windowed heads nearest to full attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from layerboost.errors import ConfigError
from layerboost.model.stream import decoded
from layerboost.model.surgery import captured_attention, output_projection
from layerboost.schemas.plan import LayerPlan
from layerboost.traffic import Traffic, unpacked

Terms = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# Candidates around the mean log-sum-exp of the dropped scores: a sink there takes the fraction the dropped keys had.
OFFSETS = torch.arange(-15, 15.25, 0.25)
QUERIES, ROUNDS = 1024, 10


class Sinks:
    """The sink logits of every layer, window and choice of full KV heads; fitted when first asked for.

    With g = sigmoid(lse − s), the fraction a sink s leaves to the window's keys of log-sum-exp lse, a head's output is
    g times its output without a sink. The sinks are the least squares fit of that to full attention, on what the heads
    with a window together add to the stream.
    """

    def __init__(self, terms: Mapping[tuple[int, int], Terms], kv_heads: int, device: torch.device) -> None:
        self.terms, self.kv_heads, self.device = terms, kv_heads, device
        self._fitted: dict[LayerPlan, torch.Tensor] = {}

    def __call__(self, plan: LayerPlan) -> torch.Tensor:
        """Return the sink logits of a layer's query heads with a window, in their order."""
        assert plan.window is not None
        if plan not in self._fitted:
            terms = self.terms[plan.layer, plan.window]
            heads = torch.arange(terms[2].shape[1]).view(self.kv_heads, -1)
            self._fitted[plan] = fit(terms, heads[plan.windowed(self.kv_heads)].flatten()).to(self.device)
        return self._fitted[plan]


@torch.no_grad()
def calibrate_sinks(
    model: PreTrainedModel, batches: Sequence[torch.Tensor | Traffic], layers: Iterable[int], windows: Iterable[int]
) -> Sinks:
    """Return the sinks of these layers and windows, from one pass of the stock model over `batches` of ids `[B, T]`.

    They are fitted on some 1,024 queries spread evenly over the sequences longer than the window. Raise ConfigError if
    no sequence is longer than a window.
    """
    windows = list(windows)
    sequences = [unpacked(each) for each in batches]
    every = [length for _, lengths, _ in sequences for length in lengths]
    if max(every) <= max(windows, default=0):
        raise ConfigError(
            f"no sequence is longer than the window of {max(windows)}",
            found=f"at most {max(every)} tokens",
            do="choose shorter windows, or measure on longer text",
        )
    per_sequence = {window: max(8, QUERIES // sum(length > window for length in every)) for window in windows}
    fits: dict[tuple[int, int], list[Terms]] = {}

    def see(lengths: list[int], layer: int, query: Any, key: Any, value: Any, scaling: float, softcap: Any) -> None:
        projection: Any = output_projection(model, layer)
        for length in sorted(set(lengths)):
            rows = [row for row, other in enumerate(lengths) if other == length]
            q, k, v = (each[rows, :, :length] for each in (query, key, value))
            for window in windows:
                if length > window:
                    outputs = head_outputs(q, k, v, window, scaling, softcap, per_sequence[window])
                    # Kept for as long as plans are measured, so not in a GPU's memory.
                    square, cross, lse, center = terms(*outputs, projection.weight.float())
                    fits.setdefault((layer, window), []).append((square.cpu(), cross.cpu(), lse.cpu(), center.cpu()))

    layers = list(layers)
    for ids, lengths, given in sequences:
        with captured_attention(model, layers, partial(see, lengths)):
            decoded(model, ids, given, use_cache=False)
    joined = {key: tuple(torch.cat(parts) for parts in zip(*found, strict=True)) for key, found in fits.items()}
    return Sinks(joined, model.config.get_text_config().num_key_value_heads, model.device)  # type: ignore[arg-type]


def head_outputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    scaling: float,
    softcap: float | None = None,
    queries: int = QUERIES,
) -> Terms:
    """Return attention with and without the window, of query `[B, H, T, D]`, key and value `[B, Hkv, T, D]`.

    For some `queries` of the T queries of each sequence, N in all: full and windowed output `[N, H, D]`, the
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
    """Return A and C `[N, H, H]`, `lse` and `center`, which make up the squared error of the heads' projected output.

    It is a quadratic form in their fractions g `[N, H]`: g·A·g − 2 b·g + constant, where b is the sum of C's columns
    of these heads. `project`: the output projection `[E, H·D]`.
    """
    heads = project.view(len(project), *full.shape[1:])
    added = torch.einsum("nhd,ehd->nhe", windowed, heads)
    target = torch.einsum("nhd,ehd->nhe", full, heads)
    return added @ added.transpose(1, 2), added @ target.transpose(1, 2), lse, center


def fit(parts: Terms, heads: torch.Tensor) -> torch.Tensor:
    """Return the sinks of query heads `[H']` of least squared error, the other heads being exact.

    By coordinate descent; `parts`: as from `terms`.
    """
    square, cross = (part[:, heads][:, :, heads] for part in parts[:2])
    dot, lse, center = cross.sum(-1), parts[2][:, heads], parts[3][:, heads]
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
