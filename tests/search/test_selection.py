from __future__ import annotations

import itertools
import random

import pytest
from tiny import info, layer_plans

from layerboost.artifacts import LayerSensitivity, Score, Sensitivity, Variant
from layerboost.errors import ConfigError, InfeasibleBudget
from layerboost.recipe import Plan
from layerboost.search.costs import base_kv_bytes, plan_kv_bytes
from layerboost.search.selection import predict, select


def sensitivity(layers: int = 4, windows: tuple[int, ...] = (16,), none: bool = True) -> Sensitivity:
    draw = random.Random(3)

    def value() -> Score:
        return Score(mean=draw.random(), standard_error=0.01)

    def variants() -> list[Variant]:
        removed = [Variant(attention="none", scores={"kl": value(), "nll": value()})] if none else []
        return removed + [
            Variant(attention="sliding", window=window, sink=sink, scores={"kl": value(), "nll": value()})
            for window in windows
            for sink in (False, True)
        ]

    return Sensitivity(
        model=info(layers), text="t", settings={}, sequences=2, tokens=64, base_nll=Score(mean=3, standard_error=0.1),
        layers=[LayerSensitivity(layer=index, variants=variants()) for index in range(layers)],
    )  # fmt: skip


def test_kv_bytes() -> None:
    assert base_kv_bytes(info(), 100) == 4 * 100 * 2 * 2 * 32 * 4
    assert plan_kv_bytes(info(), layer_plans("fsSn"), 100) == (100 + 16 + 16) * 2 * 2 * 32 * 4
    assert plan_kv_bytes(info(), layer_plans("ssss"), 10) == base_kv_bytes(info(), 10)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("metric", ["kl", "nll"])
def test_budget_is_the_best_of_all_plans(fraction: float, metric: str) -> None:
    found = sensitivity(windows=(16, 40))
    settings = Plan(kv_fraction=fraction, context_tokens=100, metric=metric)
    chosen = predict(found, select(found, settings), 100)
    assert chosen.kv_fraction <= fraction + 1e-9
    best = min(
        getattr(predict(found, plan, 100), metric)
        for window in (16, 40)
        for letters in itertools.product("fsSn", repeat=4)
        if (plan := layer_plans("".join(letters), window)) and predict(found, plan, 100).kv_fraction <= fraction + 1e-9
    )
    assert getattr(chosen, metric) == pytest.approx(best)


def test_an_infeasible_budget_names_the_nearest() -> None:
    with pytest.raises(InfeasibleBudget, match=r"nearest holds 16\.0%") as caught:
        select(sensitivity(none=False), Plan(kv_fraction=0.1, context_tokens=100))
    assert caught.value.exit_code == 3


def test_threshold_by_counts_and_by_values() -> None:
    found = sensitivity(6)
    removal = [entry.variants[0].scores["kl"].mean for entry in found.layers]
    counts = select(found, Plan(method="threshold", full_layers=2, none_layers=3))
    order = sorted(range(6), key=lambda layer: -removal[layer])
    assert [entry.layer for entry in counts if entry.attention == "full"] == sorted(order[:2])
    assert [entry.layer for entry in counts if entry.attention == "none"] == sorted(order[3:])
    values = select(found, Plan(method="threshold", full_above=0.5, none_below=0.2))
    for entry, damage in zip(values, removal, strict=True):
        assert entry.attention == ("full" if damage > 0.5 else "none" if damage < 0.2 else "sliding")
        if entry.attention == "sliding":
            plain, sink = found.layers[entry.layer].variants[1:]
            assert entry.sink == (sink.scores["kl"].mean < plain.scores["kl"].mean)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Plan(window=17), "window 17 was not measured"),
        (Plan(method="threshold", full_layers=3, none_layers=3), "exceed the layers"),
    ],
)
def test_settings_that_cannot_be_met(settings: Plan, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(sensitivity(), settings)


def test_kv_bytes_of_a_base_with_sliding_layers() -> None:
    model = info().model_copy(update={"sliding_layers": [0, 2], "sliding_window": 16})
    token = model.kv_bytes_per_token
    assert base_kv_bytes(model, 100) == (16 + 100 + 16 + 100) * token
    assert plan_kv_bytes(model, layer_plans("fsnf"), 100) == (16 + 16 + 0 + 100) * token
    assert base_kv_bytes(model, 10) == 4 * 10 * token
