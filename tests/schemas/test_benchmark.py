from __future__ import annotations

import math

import pytest

from layerboost.schemas.benchmark import FROM_VLLM, Comparison, Measurement, compare, disturbance, metrics_of

CPU = {"device": "cpu", "cores": 2}


def measurement(model: str, repeat: int, speed: float, concurrency: int = 4) -> Measurement:
    metrics = {"output_tokens_per_s": speed, "kv_cache_tokens": 100.0}
    return Measurement(
        model=model, concurrency=concurrency, repeat=repeat, file=f"{model}-{repeat}.json", seed=0, metrics=metrics
    )


def test_ratios_are_taken_repeat_by_repeat() -> None:
    entries = [("base", 0, 10.0), ("healed", 0, 20.0), ("base", 1, 100.0), ("healed", 1, 150.0), ("base", 2, 1.0)]
    (result,) = compare([measurement(*entry) for entry in entries], "base", CPU)
    speed = result.ratios["healed"]["output_tokens_per_s"]
    assert (speed.median, speed.min, speed.max, speed.repeats) == pytest.approx((1.75, 1.5, 2.0, 2))
    assert result.models["base"]["output_tokens_per_s"].median == pytest.approx(10)
    assert "base" not in result.ratios


def test_one_disturbed_repeat_of_three_does_not_make_the_headline() -> None:
    speeds = {"base": (100.0, 35.0, 102.0), "healed": (131.0, 129.0, 130.0)}
    entries = [measurement(model, repeat, speed) for model, own in speeds.items() for repeat, speed in enumerate(own)]
    (result,) = compare(entries, "base", CPU)
    assert result.ratios["healed"]["output_tokens_per_s"].as_ratio == "1.31 (1.27 to 3.69 over 3 repeats)"
    assert result.warning("base", "healed") == "; disturbed (base: repeats 191% apart)"
    assert result.warning("healed") == ""


def test_one_repeat_has_no_range() -> None:
    (result,) = compare([measurement("base", 0, 10.0), measurement("healed", 0, 36.0)], "base", CPU)
    assert result.ratios["healed"]["output_tokens_per_s"].as_ratio == "3.60 (one repeat)"
    assert result.models["healed"]["output_tokens_per_s"].text(str) == "36.0"


def test_a_server_that_gets_fewer_cores_in_one_repeat_is_disturbed() -> None:
    repeats = [{"own_cores": 1.9}, {"own_cores": 1.2}]
    assert disturbance(repeats, {"device": "cpu", "cores": 2}) == "got 1.2 to 1.9 of 2 cores"
    assert disturbance([{"own_cores": 1.9}, {"own_cores": 1.8}], {"device": "cpu", "cores": 2}) == ""
    assert disturbance(repeats, {"device": "cuda", "cores": 2}) == ""


@pytest.mark.parametrize(
    ("device", "cores", "own", "other", "disturbed"),
    [
        ("cpu", 2, 1.8, 0.05, False),  # the system's own work
        ("cpu", 2, 1.2, 0.8, True),
        ("cpu", 2, 1.0, 0.3, True),  # cores that a server on a CPU would have used
        ("accelerator", 64, 3.0, 20.0, False),  # beside a GPU there are cores for all
        ("accelerator", 64, 3.0, 60.0, True),
        ("accelerator", 2, 1.9, 0.05, False),
    ],
)
def test_others_disturb_where_they_take_cores_that_the_server_wants(
    device: str, cores: int, own: float, other: float, disturbed: bool
) -> None:
    metrics = {"output_tokens_per_s": 1.0, "own_cores": own, "other_cores": other}
    found = disturbance([metrics, metrics], {"device": device, "cores": cores})
    assert found == (f"other processes used up to {other:.1f} of {cores} cores" if disturbed else "")


def test_results_in_a_file_are_computed_anew() -> None:
    entries = [measurement("base", 0, 10.0), measurement("healed", 0, 15.0)]
    found = Comparison(settings={}, environment=CPU, models={}, reference="base", measurements=entries)
    edited = found.model_dump(mode="json") | {"results": []}
    assert Comparison.model_validate(edited).results[0].ratios["healed"]["output_tokens_per_s"].median == 1.5
    assert Comparison.model_validate(found.model_dump(mode="json")) == found


def test_concurrencies_are_apart_and_in_order() -> None:
    entries = [measurement("base", 0, 8.0, 8), measurement("base", 0, 2.0, 2), measurement("healed", 0, 4.0, 2)]
    two, eight = compare(entries, "base", CPU)
    assert (two.concurrency, eight.concurrency) == (2, 8)
    assert eight.ratios == {}
    assert two.ratios["healed"]["kv_cache_tokens"].median == 1


def test_a_number_that_is_not_finite_is_not_compared() -> None:
    raw = dict.fromkeys(FROM_VLLM.values(), 1.0) | {"median_tpot_ms": math.nan, "p99_itl_ms": math.inf}
    assert metrics_of(raw) == {ours: 1.0 for ours in FROM_VLLM if ours not in ("tpot_ms_median", "itl_ms_p99")}
