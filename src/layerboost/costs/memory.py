"""vLLM's KV cache of a plan: groups, blocks, the bytes that a request reserves and those that it holds.

Follows vLLM 0.32, `v1/core/kv_cache_utils.py` and `v1/kv_cache_interface.py`, for one window. A layer is one attention
module, or several if KV heads of a layer differ: all modules then have the same number of KV heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from layerboost.schemas.model import ModelInfo
from layerboost.schemas.plan import LayerPlan, PlanFile, all_full, window_of

# A request may reserve this many times what it holds while decoding; above it smaller batches are advised.
SPARE = 1.25


@dataclass(frozen=True)
class CacheSettings:
    """The settings of vLLM that its KV cache depends on; `concurrent_batches` is 2 with asynchronous scheduling."""

    max_batched_tokens: int
    block_size: int
    concurrent_batches: int


# Defaults of `vllm serve`. GPUs of 70 GiB, except the A100, read 8,192 tokens at once; of 160 GiB 16,384.
CPU_DEFAULTS = CacheSettings(max_batched_tokens=2048, block_size=128, concurrent_batches=1)
GPU_DEFAULTS = CacheSettings(max_batched_tokens=2048, block_size=16, concurrent_batches=2)


@dataclass(frozen=True)
class Groups:
    """Modules of one kind share a block table, `size` modules per group; the last group of a kind is padded."""

    size: int
    full: int
    sliding: int


@dataclass(frozen=True)
class Serving:
    """The flags with which vLLM saves the memory that a plan promises, each with its value, and their effects: a
    sentence without its full stop."""

    flags: tuple[str, ...]
    gain: str


def groups(full: int, sliding: int) -> Groups:
    """Return how vLLM groups this many full and sliding modules.

    The smaller count is the group's size, or the larger where it is less than half again as large.
    """
    if not full or not sliding:
        return Groups(full + sliding, int(full > 0), int(sliding > 0))
    low, high = sorted((full, sliding))
    size = high if high < 1.5 * low else low
    return Groups(size, math.ceil(full / size), math.ceil(sliding / size))


def padded_full(full: int, sliding: int) -> int:
    """Return the number of full modules that vLLM reserves memory for, padding of their last group included."""
    found = groups(full, sliding)
    return found.full * found.size


def module_heads(kv_heads: int, layers: Sequence[LayerPlan]) -> int:
    """Return the KV heads of each attention module in vLLM: as many as divide the full and the windowed KV heads of
    every layer. vLLM would pad modules of different sizes, and waste what the windows save."""
    kinds = [count for entry in layers for count in (entry.full_heads(kv_heads), len(entry.windowed(kv_heads)))]
    return math.gcd(kv_heads, *kinds)


def cached(layers: Sequence[LayerPlan], kv_heads: int, module: int) -> tuple[int, int]:
    """Return how many modules of `module` KV heads hold the whole context, and how many hold a window."""
    full = sum(entry.full_heads(kv_heads) for entry in layers)
    return full // module, sum(len(entry.windowed(kv_heads)) for entry in layers) // module


def as_served(model: ModelInfo, layers: Sequence[LayerPlan]) -> list[LayerPlan]:
    """Return the layers as they run: unchanged layers, which a plan calls full, slide if they do in the base."""
    window = model.sliding_window
    return [
        LayerPlan(layer=entry.layer, attention="sliding", window=window)
        if not entry.attention_changed and entry.layer in model.sliding_layers
        else entry
        for entry in layers
    ]


def admission_bytes(model: ModelInfo, layers: Sequence[LayerPlan], context_tokens: int, settings: CacheSettings) -> int:
    """Return the KV bytes vLLM counts for one request of `context_tokens`, its `--max-model-len`, before it admits it.

    A windowed module counts its window, the tokens of concurrent batches and a block, because blocks are freed only
    after a step. The KV memory over this is the "Maximum concurrency" that vLLM reports.
    """
    found, window, _ = _grouped(model, layers)
    batched = settings.max_batched_tokens * settings.concurrent_batches
    reserved = min(window - 1 + batched, context_tokens)
    blocks = found.full * math.ceil(context_tokens / settings.block_size)
    blocks += found.sliding * (math.ceil(reserved / settings.block_size) + 1)
    return blocks * block_bytes(model, layers, settings)


def resident_bytes(model: ModelInfo, layers: Sequence[LayerPlan], context_tokens: int, settings: CacheSettings) -> int:
    """Return the KV bytes that one request holds as it decodes its `context_tokens`-th token, averaged over the borders
    of blocks, padding included."""
    found, window, _ = _grouped(model, layers)
    every = math.ceil(context_tokens / settings.block_size)
    blocks = found.full * every + found.sliding * min(every, (window - 1) / settings.block_size + 1)
    return round(blocks * block_bytes(model, layers, settings))


def block_bytes(model: ModelInfo, layers: Sequence[LayerPlan], settings: CacheSettings) -> int:
    """Return the bytes of one block of the pool: `block_size` tokens of every module of a group."""
    found, _, module = _grouped(model, layers)
    return found.size * settings.block_size * model.kv_bytes_per_token * module // model.kv_heads


def _grouped(model: ModelInfo, layers: Sequence[LayerPlan]) -> tuple[Groups, int, int]:
    """Return the groups of the modules as they are served, their window, and the KV heads of a module."""
    served = as_served(model, layers)
    module = module_heads(model.kv_heads, served)
    return groups(*cached(served, model.kv_heads, module)), window_of(served) or 1, module


def plan_serving(
    plan: PlanFile, default: CacheSettings, prefill_ms: Callable[[int], float] | None = None
) -> Serving | None:
    """Return the flags that save a plan's memory where vLLM starts with `default`; none if these defaults do.

    `--max-num-batched-tokens` is the largest power of two with which a request of the plan's context reserves at most a
    quarter more than it holds, or else the smallest that can hold a step of its `concurrency` requests. `prefill_ms`:
    the time to read a prompt of that context by a number of tokens at once, if known. None for a plan that names no
    context length, and for a hybrid, whose states vLLM keeps among the blocks of its KV cache.
    """
    context_tokens, concurrency = plan.settings.get("context_tokens"), plan.settings.get("concurrency")
    if not isinstance(context_tokens, int) or not isinstance(concurrency, int) or plan.model.other_layers:
        return None
    model, layers, base = plan.model, plan.layers, all_full(plan.model)

    def admitted(settings: CacheSettings) -> str:
        own = admission_bytes(model, layers, context_tokens, settings) or 1  # no layer holds a cache
        return f"{admission_bytes(model, base, context_tokens, settings) / own:.2f} times"

    advised = _advised(model, layers, context_tokens, concurrency, default)
    flags: tuple[str, ...] = ()
    # vLLM's default batch depends on the GPU, which may not be this one: if a layer slides, always name it.
    unknown = default == GPU_DEFAULTS and window_of(layers) is not None
    if unknown or advised.max_batched_tokens != default.max_batched_tokens:
        flags += ("--max-num-batched-tokens", str(advised.max_batched_tokens))
    if advised.block_size != default.block_size:
        flags += ("--block-size", str(advised.block_size))
    gain = f"vLLM admits {admitted(advised)} the base's requests of {context_tokens} tokens"
    batches = advised.max_batched_tokens, default.max_batched_tokens
    steps, usual = (math.ceil(context_tokens / batch) for batch in batches)
    if steps != usual:
        gain += f", with 2,048 batched tokens (vLLM's own on most devices) {admitted(default)}; "
        gain += f"a prompt of that length is then read in {steps} steps, not {usual}"
        ms = [prefill_ms(batch) for batch in batches] if prefill_ms else [0.0]
        gain += f", and {ms[0]:.0f} ms, not {ms[1]:.0f}" if all(ms) else ""
    return Serving(flags, gain)


def _advised(
    model: ModelInfo, layers: Sequence[LayerPlan], context_tokens: int, concurrency: int, default: CacheSettings
) -> CacheSettings:
    if window_of(layers) is None:
        return default
    # Blocks of 32 suit every backend; longer ones round a short window up.
    settings = replace(default, block_size=min(default.block_size, 32))
    least = 1 << (min(concurrency, default.max_batched_tokens) - 1).bit_length()
    while settings.max_batched_tokens > least:
        held = resident_bytes(model, layers, context_tokens, settings)
        if admission_bytes(model, layers, context_tokens, settings) <= SPARE * held:
            break
        settings = replace(settings, max_batched_tokens=settings.max_batched_tokens // 2)
    return settings
