"""The strategies as tensor functions, each with its naive reference beside it.

Travels inside every boosted checkpoint, so it imports nothing of layerboost. Full attention stays the stock backend's;
`none` is the absence of a function.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def sliding_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    sinks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Softmax over the last `window` keys, itself included, written the plain way: O(T²) time and memory.

    query `[B, H, Tq, D]`, key and value `[B, Hkv, Tk, D]` with Tk ≥ Tq, the queries being the last Tq positions;
    `sinks` `[H]`: one logit per head added to the softmax's denominator (gpt-oss); `mask` bool `[B, 1, Tq, Tk]`, True
    where a key may be seen; `softcap` c: scores become c·tanh(score / c) (Gemma 2). Returns `[B, H, Tq, D]`; a query
    that sees nothing gets a row without meaning.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = window_mask(query.shape[2], key.shape[2], window, query.device)
    if mask is not None:
        visible = visible & mask
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if sinks is None:
        return scores.softmax(-1) @ value
    column = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1] @ value


def sliding_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    sinks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The same as `sliding_attention_reference` in O(T·window) time and memory.

    Queries are cut into blocks of `window`; a block sees its own keys and the block before. The sink enters exactly
    through the log-sum-exp: softmax with a sink is softmax times sigmoid(lse - sink).
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries = query.shape[2]
    keys = min(key.shape[2], queries + window - 1)
    key, value = key[:, :, -keys:], value[:, :, -keys:]
    if mask is not None:
        mask = mask[..., -keys:]
    if keys <= 2 * window:
        visible = window_mask(queries, keys, window, query.device)
        visible = visible if mask is None else visible & mask
        # [B, 1, Tq, Tk] -> [B, 1, 1, Tq, Tk]: one block
        return _attend(
            _grouped(query, key), key[:, :, None, None], value[:, :, None, None], visible, sinks, scaling, softcap
        )

    blocks = -(-keys // window)
    front, end = keys - queries, blocks * window - keys
    query = F.pad(query, (0, 0, front, end))
    key, value = (F.pad(x, (0, 0, window, end)) for x in (key, value))
    batch, _, _, size = query.shape
    query = query.view(batch, key.shape[1], -1, blocks, window, size)
    # Overlapping views: block n holds padded keys n·w to (n+2)·w, that is positions (n-1)·w to (n+1)·w.
    key, value = (x.unfold(2, 2 * window, window).transpose(-1, -2)[:, :, None] for x in (key, value))

    row = torch.arange(window, device=query.device)[:, None]
    column = torch.arange(2 * window, device=query.device)[None, :] - window
    visible = (column <= row) & (column > row - window)
    start = torch.arange(blocks, device=query.device)[:, None, None] * window
    visible = visible & (start + column >= 0) & (start + column < keys)
    if mask is not None:
        mask = mask.expand(-1, -1, queries, -1)
        rows = (start + row - front).clamp(0, queries - 1)
        visible = visible & mask[:, 0, rows, (start + column).clamp(0, keys - 1)][:, None, None]
    out = _attend(query, key, value, visible, sinks, scaling, softcap)
    return out[:, :, front : front + queries]


def dropped_logsumexp(
    query: torch.Tensor, key: torch.Tensor, window: int, scaling: float | None = None, softcap: float | None = None
) -> torch.Tensor:
    """Mean per head of the log-sum-exp of the scores a window drops, over queries that drop any: `[H]`.

    A sink logit of this value stands for the probability mass that full attention gave to the dropped keys.
    query `[B, H, T, D]`, key `[B, Hkv, T, D]`; T must be longer than `window`.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    length = query.shape[2]
    grouped = _grouped(query, key)[:, :, :, 0]
    scores = grouped @ key[:, :, None].transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(length, device=query.device)
    dropped = position[None, :] <= position[:, None] - window
    lse = scores.masked_fill(~dropped, -torch.inf).logsumexp(-1)[..., window:]
    return lse.mean(dim=(0, -1)).reshape(-1)


def window_mask(queries: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """Bool `[Tq, Tk]`: True where the key is causal and within the window; queries are the last positions."""
    row = torch.arange(keys - queries, keys, device=device)[:, None]
    column = torch.arange(keys, device=device)[None, :]
    return (column <= row) & (column > row - window)


def _grouped(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    batch, _, length, size = query.shape
    return query.view(batch, key.shape[1], -1, 1, length, size)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    sinks: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Softmax attention inside blocks.

    query `[B, Hkv, G, N, Tq, D]`, key and value `[B, Hkv, 1, N, Tk, D]`, visible broadcastable to
    `[B, Hkv, G, N, Tq, Tk]`. Returns `[B, H, N·Tq, D]`.
    """
    scores = (query * scaling) @ key.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if visible.dim() == 4:
        visible = visible[:, :, None, None]
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    out = scores.softmax(-1) @ value
    if sinks is not None:
        per_head = sinks.to(scores.dtype).view(1, query.shape[1], -1, 1, 1)
        out = out * torch.sigmoid(scores.logsumexp(-1) - per_head)[..., None]
    return out.flatten(3, 4).flatten(1, 2)
