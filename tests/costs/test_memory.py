"""The arithmetic of vLLM's KV cache; tests/vllm_plugin/test_vllm.py and `layerboost costs` hold it to vLLM itself."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tiny import info, layer_plans

from layerboost.costs.memory import (
    CPU_DEFAULTS,
    GPU_DEFAULTS,
    CacheSettings,
    Groups,
    Serving,
    admission_bytes,
    cached,
    groups,
    module_heads,
    padded_full,
    plan_serving,
    resident_bytes,
)
from layerboost.schemas.plan import LayerPlan, PlanFile


@pytest.mark.parametrize(
    ("full", "sliding", "expected"),
    [
        (8, 22, Groups(8, 1, 3)),  # two slots of padding
        (10, 10, Groups(10, 1, 1)),
        (14, 16, Groups(16, 1, 1)),  # nearly equal: the larger count, and two full layers of padding
        (18, 12, Groups(12, 2, 1)),  # six full layers of padding
        (0, 12, Groups(12, 0, 1)),
        (30, 0, Groups(30, 1, 0)),
    ],
)
def test_layers_of_a_kind_are_grouped_by_the_smaller_count(full: int, sliding: int, expected: Groups) -> None:
    assert groups(full, sliding) == expected
    assert padded_full(full, sliding) == expected.size * expected.full


def test_a_window_reserves_the_tokens_in_flight_and_holds_only_itself() -> None:
    model, layers = info(8), layer_plans("ffssssss", 64)
    token = model.kv_bytes_per_token
    wide, narrow = CacheSettings(2048, 128, 1), CacheSettings(128, 32, 1)
    # Everything in flight: all of the context and a block more, in each of three groups.
    assert admission_bytes(model, layers, 2048, wide) == 2 * 128 * token * (16 + 3 * 17)
    assert admission_bytes(model, layers, 2048, narrow) == 2 * 32 * token * (64 + 3 * (6 + 1))
    assert admission_bytes(model, layers, 2048, CacheSettings(128, 32, 2)) == 2 * 32 * token * (64 + 3 * (10 + 1))
    # 63 tokens behind the one that is read span, on average, 63 / 32 block borders.
    assert resident_bytes(model, layers, 2048, narrow) == 2 * 32 * token * (64 + 3 * (63 / 32 + 1))


def test_kv_heads_are_grouped_as_layers_are_in_modules_of_equal_size() -> None:
    """3 of 8 KV heads stay full in 4 layers: modules of one head, as if they were 8 layers of half the size."""
    model, layers, engine = info(4), layer_plans("fhss", 64), CacheSettings(128, 32, 1)
    assert module_heads(2, layers) == 1
    assert cached(layers, 2, 1) == (3, 5)
    half = info(8).model_copy(update={"kv_heads": 1})
    assert half.kv_bytes_per_token * 2 == model.kv_bytes_per_token
    for count in (admission_bytes, resident_bytes):
        assert count(model, layers, 2048, engine) == count(half, layer_plans("fffsssss", 64), 2048, engine)
    # Whole layers are not split.
    assert module_heads(2, layer_plans("ffsS")) == 2


def advised(
    layers: list[LayerPlan], context_tokens: int, concurrency: int, engine: CacheSettings, **timed: Any
) -> Serving:
    settings = {"context_tokens": context_tokens, "concurrency": concurrency}
    found = plan_serving(PlanFile(model=info(8), method="budget", settings=settings, layers=layers), engine, **timed)
    assert found
    return found


def test_flags_are_advised_only_where_they_gain() -> None:
    short = advised(layer_plans("ffssssss", 64), 2048, 100, CPU_DEFAULTS)
    assert short.flags == ("--max-num-batched-tokens", "128", "--block-size", "32")
    gain = re.search(r"admits (\S+) times .* devices\) (\S+) times; .* in 16 steps, not 1$", short.gain)
    assert gain
    assert float(gain[2]) < 1 < float(gain[1])
    timed = advised(layer_plans("ffssssss", 64), 2048, 100, CPU_DEFAULTS, prefill_ms=float)
    assert timed.gain == f"{short.gain}, and 128 ms, not 2048"
    served = info(8), layer_plans("ffssssss", 64), 2048, CacheSettings(128, 32, 1)
    assert resident_bytes(*served) < admission_bytes(*served) <= 1.25 * resident_bytes(*served)
    assert advised(layer_plans("ffssssss", 64), 131_072, 100, GPU_DEFAULTS).flags == (
        "--max-num-batched-tokens",
        "2048",
    )
    assert advised(layer_plans("ffffffnn"), 2048, 100, GPU_DEFAULTS).flags == ()
    assert advised(layer_plans("ffffffnn"), 2048, 100, CPU_DEFAULTS).flags == ()
    # A step must hold a token of each request that decodes.
    assert advised(layer_plans("ssssssss", 64), 512, 200, CPU_DEFAULTS).flags[1] == "256"
