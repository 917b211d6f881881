"""What vLLM makes of a plan's KV cache: groups, blocks, what a request reserves and what it holds.

Follows vLLM 0.32, `v1/core/kv_cache_utils.py` and `v1/kv_cache_interface.py`, for layers of one KV size and one window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from layerboost.artifacts import LayerPlan, ModelInfo, PlanFile, all_full, counts, window_of

# A request may reserve this much more than it holds while decoding, before smaller batches are advised.
SPARE = 1.25


@dataclass(frozen=True)
class Engine:
    """The settings of vLLM that its KV cache depends on; `batches_in_flight` is 2 with asynchronous scheduling."""

    max_batched_tokens: int
    block_size: int
    batches_in_flight: int


# What `vllm serve` starts with. GPUs of 70 GiB, but for the A100, read 8,192 tokens at once; of 160 GiB 16,384.
CPU_ENGINE = Engine(max_batched_tokens=2048, block_size=128, batches_in_flight=1)
GPU_ENGINE = Engine(max_batched_tokens=2048, block_size=16, batches_in_flight=2)


@dataclass(frozen=True)
class Groups:
    """Layers of one kind share a block table, `size` layers a group; the last group of a kind is padded."""

    size: int
    full: int
    sliding: int


@dataclass(frozen=True)
class Serving:
    """How vLLM is to be started so that a plan's memory is real, and what that gives and costs.

    `flags`: further arguments of `vllm serve`, each with its value. `admission_bytes`: what vLLM reserves for one
    request of `context_tokens`; `resident_bytes`: what that request holds while it decodes, blocks and padding
    included. `requests_ratio`: requests admitted to the same memory, against the base. `default_*`: the same with
    2,048 batched tokens, vLLM's least default. `prefill_steps`: steps to read a prompt of `context_tokens`;
    `prefill_ms`: their time, where the machine's rates are known.
    """

    flags: tuple[str, ...]
    context_tokens: int
    admission_bytes: int
    resident_bytes: int
    requests_ratio: float
    default_requests_ratio: float
    prefill_steps: int
    default_prefill_steps: int
    prefill_ms: float | None = None
    default_prefill_ms: float | None = None

    @property
    def gain(self) -> str:
        """What the flags gain and cost, as a sentence without its full stop."""
        text = f"vLLM admits {self.requests_ratio:.2f} times the base's requests of {self.context_tokens} tokens"
        if self.prefill_steps == self.default_prefill_steps:
            return text
        text += (
            f", with 2,048 batched tokens (vLLM's own on most devices) {self.default_requests_ratio:.2f} times; a "
            f"prompt of that length is then read in {self.prefill_steps} steps, not {self.default_prefill_steps}"
        )
        if self.prefill_ms and self.default_prefill_ms:
            text += f", and {self.prefill_ms:.0f} ms, not {self.default_prefill_ms:.0f}"
        return text


def groups(full: int, sliding: int) -> Groups:
    """How vLLM groups so many full and sliding layers.

    The smaller count is the group's size, or the larger where it is less than half again as large.
    """
    if not full or not sliding:
        return Groups(full + sliding, int(full > 0), int(sliding > 0))
    low, high = sorted((full, sliding))
    size = high if high < 1.5 * low else low
    return Groups(size, math.ceil(full / size), math.ceil(sliding / size))


def padded_full(full: int, sliding: int) -> int:
    """Full layers that vLLM reserves memory for: as many, or more where their last group is padded."""
    found = groups(full, sliding)
    return found.full * found.size


def as_served(model: ModelInfo, layers: Sequence[LayerPlan]) -> list[LayerPlan]:
    """The layers as they run: those that a plan leaves full slide where they do in the base."""
    window = model.sliding_window
    return [
        LayerPlan(layer=entry.layer, attention="sliding", window=window)
        if not entry.changed and entry.layer in model.sliding_layers
        else entry
        for entry in layers
    ]


def admission_bytes(model: ModelInfo, layers: Sequence[LayerPlan], context_tokens: int, engine: Engine) -> int:
    """KV bytes vLLM counts for one request of `context_tokens`, its `--max-model-len`, before it admits it.

    A sliding layer counts its window, the tokens in flight and a block, because blocks are freed only after a step. The
    KV memory over this is the "Maximum concurrency" that vLLM reports.
    """
    layers = as_served(model, layers)
    found = _groups(layers)
    in_flight = engine.max_batched_tokens * engine.batches_in_flight
    reserved = min((window_of(layers) or 1) - 1 + in_flight, context_tokens)
    blocks = found.full * math.ceil(context_tokens / engine.block_size)
    blocks += found.sliding * (math.ceil(reserved / engine.block_size) + 1)
    return blocks * block_bytes(model, layers, engine)


def resident_bytes(model: ModelInfo, layers: Sequence[LayerPlan], context_tokens: int, engine: Engine) -> int:
    """KV bytes one request holds while it decodes its `context_tokens`-th token, on average over block boundaries."""
    layers = as_served(model, layers)
    found = _groups(layers)
    whole = math.ceil(context_tokens / engine.block_size)
    blocks = found.full * whole + found.sliding * min(whole, ((window_of(layers) or 1) - 1) / engine.block_size + 1)
    return round(blocks * block_bytes(model, layers, engine))


def block_bytes(model: ModelInfo, layers: Sequence[LayerPlan], engine: Engine) -> int:
    """Bytes of one block of the pool: `block_size` tokens of every layer of a group."""
    layers = as_served(model, layers)
    return _groups(layers).size * engine.block_size * model.kv_bytes_per_token


def plan_serving(plan: PlanFile, engine: Engine, prefill_ms: Callable[[int], float] | None = None) -> Serving | None:
    """`serving` of a plan on an engine that starts as `engine`; None for a plan that names no context length."""
    context, concurrency = plan.settings.get("context_tokens"), plan.settings.get("concurrency")
    if not isinstance(context, int) or not isinstance(concurrency, int):
        return None
    return serving(plan.model, plan.layers, context, concurrency, engine, prefill_ms)


def serving(
    model: ModelInfo,
    layers: Sequence[LayerPlan],
    context_tokens: int,
    concurrency: int,
    default: Engine,
    prefill_ms: Callable[[int], float] | None = None,
) -> Serving:
    """The flags that make a plan's memory real at `context_tokens`; none where vLLM's own settings do.

    `--max-num-batched-tokens` is the largest power of two with which a request reserves at most a quarter more than it
    holds, or else the smallest that can hold a step of `concurrency` requests. `prefill_ms`: the time to read a prompt
    of `context_tokens` by so many tokens at once, where it is known.
    """
    engine = _advised(model, layers, context_tokens, concurrency, default)
    base = all_full(model)

    def ratio(settings: Engine) -> float:
        own = admission_bytes(model, layers, context_tokens, settings) or 1  # no layer holds a cache
        return admission_bytes(model, base, context_tokens, settings) / own

    flags: tuple[str, ...] = ()
    # vLLM's own batch depends on the GPU, which may be another one than here: where a layer slides it is always named.
    unknown = default == GPU_ENGINE and window_of(layers) is not None
    if unknown or engine.max_batched_tokens != default.max_batched_tokens:
        flags += ("--max-num-batched-tokens", str(engine.max_batched_tokens))
    if engine.block_size != default.block_size:
        flags += ("--block-size", str(engine.block_size))
    return Serving(
        flags=flags,
        context_tokens=context_tokens,
        admission_bytes=admission_bytes(model, layers, context_tokens, engine),
        resident_bytes=resident_bytes(model, layers, context_tokens, engine),
        requests_ratio=ratio(engine),
        default_requests_ratio=ratio(default),
        prefill_steps=math.ceil(context_tokens / engine.max_batched_tokens),
        default_prefill_steps=math.ceil(context_tokens / default.max_batched_tokens),
        prefill_ms=prefill_ms(engine.max_batched_tokens) if prefill_ms else None,
        default_prefill_ms=prefill_ms(default.max_batched_tokens) if prefill_ms else None,
    )


def _advised(
    model: ModelInfo, layers: Sequence[LayerPlan], context_tokens: int, concurrency: int, default: Engine
) -> Engine:
    if window_of(layers) is None:
        return default
    # Blocks of 32 suit every backend; longer ones round a short window up.
    engine = replace(default, block_size=min(default.block_size, 32))
    least = 1 << (min(concurrency, default.max_batched_tokens) - 1).bit_length()
    while engine.max_batched_tokens > least:
        held = resident_bytes(model, layers, context_tokens, engine)
        if admission_bytes(model, layers, context_tokens, engine) <= SPARE * held:
            break
        engine = replace(engine, max_batched_tokens=engine.max_batched_tokens // 2)
    return engine


def _groups(layers: Sequence[LayerPlan]) -> Groups:
    found = counts(layers)
    return groups(found["full"], found["sliding"])
