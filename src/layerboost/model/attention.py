"""The strategies as tensor functions, each next to its naive reference.

Travels inside every boosted checkpoint, so it imports nothing of layerboost. Full attention stays the stock backend's;
`none` is the absence of a function.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch.nn import functional as F

# Queries in a block of the CPU kernel: enough rows for its matrix products, few keys beyond the window.
FLASH_BLOCK = 64
FLASH_CHUNK = 2048
FLEX_BLOCK = 128  # queries and keys in a block of FlexAttention's masks
FLASH_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


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
    """Return softmax attention over the last `window` keys, itself included, in O(T²) time and memory.

    query `[B, H, Tq, D]`, key and value `[B, Hkv, Tk, D]` with Tk ≥ Tq, the queries being the last Tq positions;
    `sinks` `[H]`: one logit per head added to the softmax's denominator (gpt-oss); `mask` bool `[B, 1, Tq, Tk]`, True
    where a key may be seen; `softcap` c: scores become c·tanh(score / c) (Gemma 2). The result is
    `[B, H, Tq, D]`; the row of a query that sees nothing has no meaning.
    """
    visible = window_mask(query.shape[2], key.shape[2], window, query.device)
    visible = visible if mask is None else visible & mask
    return masked_attention(query, key, value, visible, sinks, scaling, softcap)


def masked_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    sinks: torch.Tensor | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Return softmax attention over the keys that each query may see, `visible` bool `[B, 1, Tq, Tk]` or `[Tq, Tk]`.

    Takes O(T²) time and memory. The other arguments are those of `sliding_attention_reference`.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = _capped(query @ key.transpose(-1, -2) * scaling, softcap)
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
    """Return the same as `sliding_attention_reference`, where a kernel fits in O(T·window) time and memory.

    CPU: PyTorch's flash kernel over blocks, which cannot soft-cap. CUDA: FlexAttention, but for single queries.
    Elsewhere: the reference, in O(T²). Sinks are exact in each.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys = min(key.shape[2], query.shape[2] + window - 1)
    key, value = key[:, :, -keys:], value[:, :, -keys:]
    mask = None if mask is None else mask[..., -keys:]
    if query.is_cpu and softcap is None:
        return sliding_attention_flash(query, key, value, window, sinks, mask, scaling)
    if query.is_cuda and query.shape[2] > 1:
        return sliding_attention_flex(query, key, value, window, sinks, mask, scaling, softcap)
    return sliding_attention_reference(query, key, value, window, sinks, mask, scaling, softcap)


def sliding_attention_flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    sinks: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Return `sliding_attention` by PyTorch's CPU flash kernel, which never holds scores; Tk ≤ Tq + window - 1.

    Long texts go in chunks, so that what is copied for the kernel stays in cache and is allocated once.
    """
    queries, offset = query.shape[2], key.shape[2] - query.shape[2]
    chunk = max(FLASH_CHUNK, window)
    sizes = [min(chunk, queries - start) for start in range(0, queries, chunk)]
    key_sizes = [offset + sizes[0], *sizes[1:]]
    keys, values = key.split(key_sizes, dim=2), value.split(key_sizes, dim=2)
    parts = []
    for index, rows in enumerate(query.split(sizes, dim=2)):
        start, seen = index * chunk, [keys[index], values[index]]
        if index:  # the window reaches into the chunk before
            seen = [
                torch.cat([before[index - 1][:, :, before[index - 1].shape[2] - window + 1 :], here], dim=2)
                for before, here in zip((keys, values), seen, strict=True)
            ]
        masked = mask
        if masked is not None:
            masked = masked[:, :, start : start + rows.shape[2]] if masked.shape[2] > 1 else masked
            end = offset + start + rows.shape[2]
            masked = masked[..., end - seen[0].shape[2] : end]
        parts += _flash_chunk(rows, seen[0], seen[1], window, sinks, masked, scaling)
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _flash_chunk(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    sinks: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
) -> list[torch.Tensor]:
    """Return sliding attention in one or two parts along the queries.

    A block of queries reads the `block + window - 1` keys it sees as a view that overlaps the next block's. The first
    queries, for which there are fewer keys than a window, are a block of their own.
    """
    queries, keys = query.shape[2], key.shape[2]
    groups = query.shape[1] // key.shape[1]
    head = max(min(queries, window - 1 - (keys - queries)), 0)
    parts = []
    if head:
        seen = keys - queries + head
        visible = window_mask(head, seen, window, query.device)[None, None]
        if mask is not None:
            visible = visible & mask[:, :, :head, :seen]
        first_key, first_value = (x[:, None, :, :seen].repeat_interleave(groups, dim=2) for x in (key, value))
        parts.append(_flash_blocks(query[:, :, :head], first_key, first_value, visible, sinks, scaling))
    if rest := queries - head:
        block = min(FLASH_BLOCK, rest)
        blocks, span = -(-rest // block), block + window - 1
        end = blocks * block - rest
        row, column = torch.arange(block, device=query.device)[:, None], torch.arange(span, device=query.device)
        visible = ((column >= row) & (column < row + window))[None, None]
        if mask is not None:
            start = torch.arange(blocks, device=query.device)[:, None, None] * block
            rows, columns = (head + start + row).clamp(max=queries - 1), (start + column).clamp(max=keys - 1)
            visible = visible & mask.expand(-1, -1, queries, -1)[:, 0, rows, columns]
        query = query[:, :, head:]
        if end:
            query, key, value = (F.pad(x, (0, 0, 0, end)) for x in (query, key, value))
        key, value = (x.unfold(2, span, block).permute(0, 2, 1, 4, 3) for x in (key, value))
        parts.append(_flash_blocks(query, key, value, visible, sinks, scaling)[:, :, :rest])
    return parts


def _flash_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    sinks: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Return attention inside N blocks of n queries: query `[B, H, N·n, D]`, key and value `[B, N, Hkv, S, D]`, visible
    `[B or 1, N or 1, n, S]`. Returns `[B, H, N·n, D]`.

    Blocks become the kernel's batch; the heads that share keys become rows of one block, so that no key is repeated.
    """
    batch, blocks, heads, _, size = key.shape
    groups, rows = query.shape[1] // heads, query.shape[2] // blocks
    query = query.unflatten(2, (blocks, rows)).unflatten(1, (heads, groups)).permute(0, 3, 1, 2, 4, 5)
    bias = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, torch.finfo(query.dtype).min)
    bias = bias[:, :, None].expand(-1, -1, groups, -1, -1).flatten(2, 3)[:, :, None]
    bias = bias.expand(batch, blocks, -1, -1, -1).flatten(0, 1)
    if sinks is not None:
        sinks = sinks.float().view(heads, groups, 1).expand(-1, -1, rows).flatten(1)
    out: torch.Tensor = _FlashWithSinks.apply(
        query.reshape(batch * blocks, heads, groups * rows, size), key.flatten(0, 1), value.flatten(0, 1),
        bias, sinks, scaling,
    )  # fmt: skip
    out = out.view(batch, blocks, heads, groups, rows, size).permute(0, 2, 3, 1, 4, 5)
    return out.reshape(batch, heads * groups, blocks * rows, size)


class _FlashWithSinks(torch.autograd.Function):
    """PyTorch's CPU flash attention with a logit per head, or none, in the softmax's denominator.

    With the sink added to the log-sum-exp, the kernel's own backward pass gives the exact gradients: it makes the
    probabilities from the scores and the log-sum-exp, and takes grad · out for their weighted mean.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        sinks: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        """Return `[B, H, n, D]` of query, key and value `[B, H, S, D]`, bias `[B, 1, n, S]`, sinks `[H, n]`."""
        out, lse = FLASH_CPU(query, key, value, attn_mask=bias, scale=scaling)
        if sinks is not None:
            total = torch.logaddexp(lse, sinks)
            out, lse = out * (lse - total).exp()[..., None].to(out.dtype), total
        ctx.save_for_backward(query, key, value, bias, sinks, out, lse)
        ctx.scaling = scaling
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Return the gradients of query, key, value and sinks."""
        query, key, value, bias, sinks, out, lse = ctx.saved_tensors
        grads = FLASH_CPU_BACKWARD(grad, query, key, value, out, lse, 0.0, False, attn_mask=bias, scale=ctx.scaling)
        by_sinks = None
        if sinks is not None:
            by_sinks = -((sinks - lse).exp() * (grad * out).sum(-1)).sum(0)
        return *grads, None, by_sinks, None


def sliding_attention_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    window: int,
    sinks: torch.Tensor | None,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Return `sliding_attention` by FlexAttention with a block mask: compiled on CUDA, unfused elsewhere."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    queries, keys = query.shape[2], key.shape[2]
    offset = keys - queries

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        seen = (k <= q + offset) & (k > q + offset - window)
        return seen if mask is None else seen & mask[b, 0, q if mask.shape[2] > 1 else 0, k]

    def capped(score: Any, *_: Any) -> Any:
        return _capped(score, softcap)

    blocks = copy.copy(window_blocks(queries, keys, window, mask is None, query.device))
    blocks.mask_mod = visible
    attend: Any = _compiled(flex_attention) if query.is_cuda else flex_attention
    out, extra = attend(
        query, key, value, score_mod=None if softcap is None else capped, block_mask=blocks, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1], return_aux=AuxRequest(lse=True),
        # Below 128 queries PyTorch would take another kernel, which fails for 33 to 127 queries and 4 query heads per
        # KV head, as in Qwen3-4B: it has no configuration for them (pytorch/pytorch#185349).
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )  # fmt: skip
    if sinks is not None:
        # Softmax with a sink is softmax times sigmoid(lse - sink).
        out = out * torch.sigmoid(extra.lse - sinks[:, None])[..., None].to(out.dtype)
    return out


@functools.lru_cache(maxsize=32)
def window_blocks(queries: int, keys: int, window: int, split: bool, device: torch.device) -> Any:
    """Return FlexAttention's BlockMask of a window, the queries being the last of the positions, without a `mask_mod`.

    It is `create_block_mask`'s in closed form, which looks at no pair of tokens and needs no compilation. With `split`,
    blocks that are visible as a whole are listed apart: the kernel does not call `mask_mod` in them.
    """
    from torch.nn.attention.flex_attention import BlockMask

    def listed(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = blocks.int().argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[None, None], order.int()[None, None]

    with torch.inference_mode(False):  # a mask that inference made may serve in training
        first = torch.arange(0, queries, FLEX_BLOCK, device=device)[:, None] + keys - queries
        start = torch.arange(0, keys, FLEX_BLOCK, device=device)
        last, end = first + FLEX_BLOCK - 1, start + FLEX_BLOCK - 1
        some = (start <= last) & (end.clamp(max=keys - 1) > first - window)
        whole = (end <= first) & (start > last - window) & (last < keys)
        counts, indices = listed(some & ~whole if split else some)
        whole_counts, whole_indices = listed(whole) if split else (None, None)
        return BlockMask.from_kv_blocks(
            counts, indices, whole_counts, whole_indices, FLEX_BLOCK, seq_lengths=(queries, keys)
        )


@functools.cache
def _compiled(function: Any) -> Any:
    # Each form of a call is compiled apart (with gradients or not, masked or not, one sequence or several), and beyond
    # Dynamo's limit of 8 it would run unfused, without a word.
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 64)
    return torch.compile(function)


def window_mask(queries: int, keys: int, window: int, device: torch.device) -> torch.Tensor:
    """Return bool `[Tq, Tk]`: True where the key is causal and within the window; queries are the last positions."""
    row = torch.arange(keys - queries, keys, device=device)[:, None]
    column = torch.arange(keys, device=device)[None, :]
    return (column <= row) & (column > row - window)


def boolean_mask(mask: torch.Tensor | None, keys: int) -> torch.Tensor | None:
    """Return a mask of any backend as bool `[B, 1, Tq or 1, Tk]`, for the last `keys` keys."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"sliding layers cannot read a {type(mask).__name__}: load with attn_implementation='sdpa'")
    if mask.dim() == 2:  # FlashAttention's padding mask [B, Tk]
        mask = mask[:, None, None, :]
    if mask.is_floating_point():
        mask = mask > torch.finfo(mask.dtype).min / 2
    return mask.bool()[..., -keys:]


def _capped(scores: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)
