from __future__ import annotations

import math

import pytest

from layerboost.serving.results import FROM_VLLM, Measurement, compare, metrics_of


def measurement(model: str, repeat: int, speed: float, concurrency: int = 4) -> Measurement:
    metrics = {"output_tokens_per_s": speed, "kv_cache_tokens": 100.0}
    return Measurement(
        model=model, concurrency=concurrency, repeat=repeat, file=f"{model}-{repeat}.json", seed=0, metrics=metrics
    )


def test_ratios_are_taken_round_by_round() -> None:
    rounds = [("base", 0, 10.0), ("healed", 0, 20.0), ("base", 1, 100.0), ("healed", 1, 150.0), ("base", 2, 1.0)]
    (result,) = compare([measurement(*entry) for entry in rounds], "base")
    speed = result.ratios["healed"]["output_tokens_per_s"]
    assert (speed.mean, speed.min, speed.max) == pytest.approx((1.75, 1.5, 2.0))
    assert result.models["base"]["output_tokens_per_s"].mean == pytest.approx(37)
    assert "base" not in result.ratios


def test_concurrencies_are_apart_and_in_order() -> None:
    entries = [measurement("base", 0, 8.0, 8), measurement("base", 0, 2.0, 2), measurement("healed", 0, 4.0, 2)]
    two, eight = compare(entries, "base")
    assert (two.concurrency, eight.concurrency) == (2, 8)
    assert eight.ratios == {}
    assert two.ratios["healed"]["kv_cache_tokens"].mean == 1


def test_a_number_that_is_not_finite_is_not_compared() -> None:
    raw = dict.fromkeys(FROM_VLLM.values(), 1.0) | {"median_tpot_ms": math.nan, "p99_itl_ms": math.inf}
    assert metrics_of(raw) == {ours: 1.0 for ours in FROM_VLLM if ours not in ("tpot_ms_median", "itl_ms_p99")}
