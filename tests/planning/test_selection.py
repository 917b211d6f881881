from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import info, layer_plans

from layerboost.costs.budget import Budget, Costs, Rates
from layerboost.errors import ConfigError, InfeasibleBudget
from layerboost.planning.choices import blended, choices, predict
from layerboost.planning.methods import select
from layerboost.recipe import Plan
from layerboost.schemas.artifact import write_json
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.sensitivity import LayerSensitivity, Score, Sensitivity, Variant
from layerboost.strategies import ComponentName


def sensitivity(layers: int = 4, windows: tuple[int, ...] = (16,), none: bool = True) -> Sensitivity:
    draw = random.Random(3)

    def scores(*extra: str) -> dict[str, Score]:
        return {name: Score(mean=draw.random(), standard_error=0.01) for name in ("kl", "nll", "retrieval", *extra)}

    def variants() -> list[Variant]:
        removed = [Variant(attention="none", scores=scores("cosine"))] if none else []
        return removed + [
            Variant(attention="sliding", window=window, sink=sink, scores=scores())
            for window in windows
            for sink in (False, True)
        ]

    return Sensitivity(
        model=info(layers), text="t", settings={}, sequences=2, tokens=64, base_nll=Score(mean=3, standard_error=0.1),
        layers=[LayerSensitivity(layer=index, variants=variants()) for index in range(layers)],
    )  # fmt: skip


def altered(found: Sensitivity, change: Callable[[LayerSensitivity], dict[str, Any]], **model: Any) -> Sensitivity:
    """Return sensitivities with other fields in each layer and in the facts of the model."""
    layers = [entry.model_copy(update=change(entry)) for entry in found.layers]
    return found.model_copy(update={"layers": layers, "model": found.model.model_copy(update=model)})


def with_heads(layers: int = 3, kv_heads: int = 3, group: int = 1) -> Sensitivity:
    """Sensitivities of KV heads too, each with the sink that its layer prefers."""
    draw = random.Random(5)

    def heads(entry: LayerSensitivity) -> dict[str, Any]:
        best = min(entry.variants[1:], key=lambda variant: variant.scores["kl"].mean)
        groups = [tuple(head for head in range(kv_heads) if head // group != out) for out in range(kv_heads // group)]
        scores = [{name: Score(mean=draw.random() / 2, standard_error=0.01) for name in best.scores} for _ in groups]
        changes = zip(groups, scores, strict=True)
        return {"heads": [best.model_copy(update={"full_kv_heads": kept, "scores": own}) for kept, own in changes]}

    return altered(sensitivity(layers), heads, kv_heads=kv_heads)


def with_mlps(layers: int = 4, widths: tuple[int, ...] = (48, 24)) -> Sensitivity:
    """Sensitivities of MLPs too."""
    draw = random.Random(7)

    def variant(**fields: Any) -> Variant:
        names = ("kl", "nll", "retrieval", *(["cosine"] if fields["mlp"] == "none" else []))
        scores = {name: Score(mean=draw.random(), standard_error=0.01) for name in names}
        return Variant(attention="full", scores=scores, **fields)

    def mlps(entry: LayerSensitivity) -> dict[str, Any]:
        thin = [variant(mlp="thin", mlp_width=width) for width in widths]
        variants = [*entry.variants, *thin, variant(mlp="none")]
        return {"variants": variants, "block_influence": Score(mean=draw.random(), standard_error=0.01)}

    return altered(sensitivity(layers), mlps)


def scaled(found: Sensitivity, scale: float) -> Sensitivity:
    def scores(variant: Variant) -> dict[str, Score]:
        return {"kl": Score(mean=variant.scores["kl"].mean * scale, standard_error=0)}

    return altered(
        found, lambda entry: {"variants": [each.model_copy(update={"scores": scores(each)}) for each in entry.variants]}
    )


@pytest.mark.parametrize("scale", [1e-8, 1e-5, 1e5])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_the_size_of_the_losses_does_not_matter(scale: float, fraction: float) -> None:
    """A solver with absolute tolerances took losses of wide windows for equal."""
    found = sensitivity(layers=12)
    settings = Plan(kv_fraction=fraction, context_tokens=100)
    assert select(scaled(found, scale), settings) == select(found, settings)


EVERY_SITE = [
    attention.with_site(mlp)
    for attention in layer_plans("fsSn")
    for mlp in (
        attention,
        LayerPlan(layer=0, attention="full", mlp="thin", mlp_width=48),
        LayerPlan(layer=0, attention="full", mlp="thin", mlp_width=24),
        LayerPlan(layer=0, attention="full", mlp="none"),
    )
]


@pytest.mark.parametrize(
    ("kv", "parameters", "decode", "components"),
    [
        (1.0, 0.8, None, None),
        (0.5, 0.75, None, None),
        (0.3, 0.6, None, ("attention", "mlp")),
        (1.0, None, 0.7, None),
        (1.0, 0.8, None, ("mlp",)),
        (1.0, 0.7, None, ("attention",)),
    ],
)
def test_one_program_over_attention_and_mlps_finds_the_best_of_all_plans(
    kv: float,
    parameters: float | None,
    decode: float | None,
    components: tuple[ComponentName, ...] | None,
    tmp_path: Path,
) -> None:
    found = with_mlps(layers=2)
    costs = Costs(rates=Rates(layer_ms=0.5, weight_bytes_per_s=1e6, kv_bytes_per_s=2e7))
    write_json(tmp_path / "costs.json", costs)
    settings = Plan(
        kv_fraction=kv, parameter_fraction=parameters, decode_fraction=decode, context_tokens=100,
        costs=str(tmp_path / "costs.json"), components=components,
    )  # fmt: skip
    chosen, limits = select(found, settings), Budget.of(found, settings)
    assert limits.met(chosen)
    may_change = components or ("attention", "mlp")
    sites = [
        site
        for site in EVERY_SITE
        if ("attention" in may_change or not site.attention_changed) and ("mlp" in may_change or not site.mlp_changed)
    ]
    best = min(
        predict(found, plan, settings).quality_loss.get("kl", 0)
        for picked in itertools.product(sites, repeat=2)
        if limits.met(plan := [entry.model_copy(update={"layer": layer}) for layer, entry in enumerate(picked)])
    )
    predicted = predict(found, chosen, settings)
    assert predicted.quality_loss.get("kl", 0) == pytest.approx(best)
    assert predicted.parameter_fraction <= (parameters or 1) + 1e-9
    assert parameters is None or any(entry.mlp_changed for entry in chosen) == ("mlp" in may_change)
    assert "attention" in may_change or not any(entry.attention_changed for entry in chosen)


@pytest.mark.parametrize("fraction", [0.9, 0.6, 0.3])
def test_what_turns_the_stream_least_is_removed_first(fraction: float) -> None:
    """LLM-Drop's joint drop, and whole layers by ShortGPT's Block Influence: as little as the budget allows."""
    found = with_mlps(6)
    settings = Plan(method="cosine", components=("attention", "mlp"), parameter_fraction=fraction, kv_fraction=1)
    limits = Budget.of(found, settings)
    plan = select(found, settings)
    removed = {(entry.layer, name) for entry in plan for name in ("attention", "mlp") if getattr(entry, name) == "none"}
    turns = {
        (entry.layer, "attention" if variant.attention == "none" else "mlp"): variant.scores["cosine"].mean
        for entry in found.layers
        for variant in entry.variants
        if "cosine" in variant.scores
    }
    order = sorted(turns, key=lambda site: turns[site])
    assert removed == set(order[: len(removed)])
    assert limits.met(plan)
    last = next(entry for entry in plan if entry.layer == order[len(removed) - 1][0])
    kept = last.model_copy(update={order[len(removed) - 1][1]: "full"})
    assert not limits.met([*plan[: kept.layer], kept, *plan[kept.layer + 1 :]])

    layers = select(found, settings.model_copy(update={"method": "block_influence", "components": None}))
    whole = [entry.layer for entry in layers if entry.attention == "none"]
    assert whole == [entry.layer for entry in layers if entry.mlp == "none"]
    influence = {entry.layer: entry.block_influence.mean for entry in found.layers if entry.block_influence}
    assert set(whole) == set(sorted(influence, key=lambda layer: influence[layer])[: len(whole)])
    assert limits.met(layers)
    assert predict(found, layers, settings).parameter_fraction > fraction - 43_072 / found.model.parameters


def test_components_that_were_not_measured_or_do_not_apply() -> None:
    for method in ("budget", "cosine"):
        with pytest.raises(ConfigError, match=r"layer 0 was not measured as MLP none[\s\S]*measure.components"):
            select(sensitivity(), Plan.model_validate({"method": method, "components": ["mlp"]}))
    with pytest.raises(ConfigError, match="uniform knows itself what to change"):
        select(sensitivity(), Plan(method="uniform", components=("attention",)))
    with pytest.raises(ConfigError, match="the sensitivities lack block_influence"):
        select(sensitivity(), Plan(method="block_influence"))


def test_kv_bytes_alone_leave_mlps_as_they_are_and_controls_do_too() -> None:
    found = with_mlps()
    for settings in (Plan(kv_fraction=0.4, context_tokens=100), Plan(method="threshold", context_tokens=100)):
        assert not any(entry.mlp_changed for entry in select(found, settings))


def test_an_infeasible_number_of_parameters_names_the_nearest() -> None:
    settings = Plan(kv_fraction=1, parameter_fraction=0.05, context_tokens=100)
    with pytest.raises(InfeasibleBudget, match=r"0 full, 0 sliding, 4 none; MLPs: 4 none\) has \d+\.\d% of the base's"):
        select(with_mlps(), settings)


def test_a_width_that_was_not_measured_is_named() -> None:
    plan = [LayerPlan(layer=0, attention="full", mlp="thin", mlp_width=50)]
    with pytest.raises(ConfigError, match=r"layer 0 was not measured as MLP thin 50[\s\S]*measure.mlp_widths"):
        predict(with_mlps(layers=1), plan, Plan())


@pytest.mark.parametrize("fraction", [0.25, 0.4, 0.6, 0.9])
def test_plans_by_kv_heads_are_the_best_of_all_subsets(fraction: float) -> None:
    found = with_heads()
    settings = Plan(kv_fraction=fraction, context_tokens=100, unit="kv_head")
    chosen = select(found, settings)
    assert Budget.of(found, settings).met(chosen)
    every = [
        [
            *layer_plans("fsSn"),
            *(
                LayerPlan(layer=0, attention="sliding", window=16, sink=entry.heads[0].sink, full_kv_heads=full)
                for size in (1, 2)
                for full in itertools.combinations(range(3), size)
            ),
        ]
        for entry in found.layers
    ]
    best = min(
        predict(found, plan, settings).quality_loss.get("kl", 0)
        for picked in itertools.product(*every)
        if (plan := [entry.model_copy(update={"layer": layer}) for layer, entry in enumerate(picked)])
        and Budget.of(found, settings).met(plan)
    )
    assert predict(found, chosen, settings).quality_loss.get("kl", 0) == pytest.approx(best)
    layers = predict(found, select(found, settings.model_copy(update={"unit": "layer"})), settings)
    assert best <= layers.quality_loss.get("kl", 0) + 1e-9


@pytest.mark.parametrize(("call_ms", "heads"), [(0.0, True), (100.0, False)])
def test_attention_calls_of_kv_heads_count_as_time(call_ms: float, heads: bool, tmp_path: Path) -> None:
    """Calls that cost nothing let heads win; dear ones leave whole layers, which is not worse than they can be."""
    rates = Rates(step_ms=1.0, kv_bytes_per_s=1e8, call_ms=call_ms)
    write_json(tmp_path / "costs.json", Costs(rates=rates))
    found = with_heads()
    settings = Plan(
        costs=str(tmp_path / "costs.json"), decode_fraction=0.5, kv_fraction=1, context_tokens=100, unit="kv_head"
    )
    chosen = select(found, settings)
    assert Budget.of(found, settings).met(chosen)
    assert any(entry.full_kv_heads for entry in chosen) == heads
    if not heads:
        assert chosen == select(found, settings.model_copy(update={"unit": "layer"}))


def test_predictions_of_kv_heads_are_sums_of_their_groups() -> None:
    found = with_heads(layers=1, kv_heads=4, group=2)
    one, other = found.layers[0].heads
    settings = Plan(context_tokens=100, unit="kv_head")
    plan = [one.plan(0)]
    predicted = predict(found, plan, settings)
    assert predicted.quality_loss["kl"] == pytest.approx(one.scores["kl"].mean)
    assert predicted.kv_fraction == pytest.approx((2 * 100 + 2 * 16) / 400)
    with pytest.raises(ConfigError, match="was not measured as sliding 16"):
        predict(found, [plan[0].model_copy(update={"full_kv_heads": (0,)})], settings)
    assert other.plan(0).full_kv_heads == (0, 1)


@pytest.mark.parametrize("method", ["uniform", "random", "threshold", "cosine"])
def test_controls_give_every_layer_one_strategy(method: str) -> None:
    with pytest.raises(ConfigError, match=f"plan.method {method} gives every layer one strategy"):
        select(with_heads(), Plan.model_validate({"method": method, "unit": "kv_head"}))


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("metric", ["kl", "nll"])
def test_budget_is_the_best_of_all_plans(fraction: float, metric: str) -> None:
    found = sensitivity(windows=(16, 40))
    settings = Plan(kv_fraction=fraction, context_tokens=100, metric=metric)
    chosen = predict(found, select(found, settings), settings)
    assert chosen.kv_fraction <= fraction + 1e-9
    best = min(
        predict(found, plan, settings).quality_loss.get(metric, 0)
        for window in (16, 40)
        for letters in itertools.product("fsSn", repeat=4)
        if (plan := layer_plans("".join(letters), window)) and Budget.of(found, settings).met(plan)
    )
    assert chosen.quality_loss.get(metric, 0) == pytest.approx(best)


@pytest.mark.parametrize("method", ["budget", "uniform", "threshold"])
def test_a_blend_leaves_sinks_to_the_text(method: str) -> None:
    found = sensitivity(8, none=method == "threshold")
    settings = Plan(method=method, kv_fraction=0.4, context_tokens=100, retrieval_weight=0.9)
    plan = select(found, settings)
    assert any(entry.attention == "sliding" for entry in plan)
    for entry in plan:
        plain, sink = found.layers[entry.layer].variants[-2:]
        assert entry.attention != "sliding" or entry.sink == (sink.scores["kl"].mean < plain.scores["kl"].mean)


@pytest.mark.parametrize("method", ["budget", "uniform", "random", "threshold"])
def test_a_plan_without_sinks_is_the_best_of_those(method: str) -> None:
    found = sensitivity(8)
    settings = Plan.model_validate({"method": method, "kv_fraction": 0.4, "context_tokens": 100})
    assert any(entry.sink for entry in select(found, settings))
    bare = altered(found, lambda entry: {"variants": [each for each in entry.variants if not each.sink]})
    plan = select(found, settings.model_copy(update={"sinks": False}))
    assert plan == select(bare, settings)
    assert any(entry.window for entry in plan)


def test_no_kv_heads_with_sinks_either() -> None:
    found = with_heads()
    heads = [variant.model_copy(update={"sink": True}) for variant in found.layers[1].heads]
    found.layers[1] = found.layers[1].model_copy(update={"heads": heads})
    settings = Plan(unit="kv_head", kv_fraction=0.5, context_tokens=100)
    with_sinks, without = choices(found, settings, 16), choices(found, settings.model_copy(update={"sinks": False}), 16)
    assert any(choice.plan.sink and choice.plan.full_kv_heads for choice in with_sinks[1])
    assert not any(choice.plan.sink for options in without for choice in options)
    assert any(choice.plan.full_kv_heads for choice in without[0])


def test_an_infeasible_budget_names_the_nearest() -> None:
    with pytest.raises(InfeasibleBudget, match=r"nearest \(0 full, 4 sliding, 0 none\) has 16\.0%") as caught:
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
    for entry, quality_loss in zip(values, removal, strict=True):
        assert entry.attention == ("full" if quality_loss > 0.5 else "none" if quality_loss < 0.2 else "sliding")
        if entry.attention == "sliding":
            plain, sink = found.layers[entry.layer].variants[1:]
            assert entry.sink == (sink.scores["kl"].mean < plain.scores["kl"].mean)


@pytest.mark.parametrize("limits", [{"max_retrieval": 0.9}, {"max_kl": 0.9, "retrieval_weight": 1.0}])
def test_one_metric_under_a_limit_on_the_other(limits: dict[str, float]) -> None:
    found = sensitivity()
    settings = Plan(kv_fraction=0.6, context_tokens=100, parameter_fraction=0.99, **limits)
    limited = "retrieval" if settings.max_retrieval else "kl"
    low = "kl" if settings.max_retrieval else "retrieval"
    chosen = predict(found, select(found, settings), settings)
    best = min(
        made.quality_loss[low]
        for letters in itertools.product("fsSn", repeat=4)
        if (plan := layer_plans("".join(letters))) and Budget.of(found, settings).met(plan)
        for made in [predict(found, plan, settings)]
        if made.quality_loss[limited] <= (settings.max_retrieval or settings.max_kl or 0)
    )
    assert chosen.quality_loss[low] == pytest.approx(best)
    assert chosen.parameter_fraction <= 0.99
    with pytest.raises(InfeasibleBudget, match=f"a predicted {limited} of at most 0.01"):
        select(found, settings.model_copy(update={f"max_{limited}": 0.01}))


def test_blended_damage_counts_each_metric_in_its_own_mean() -> None:
    found = sensitivity()
    mean = {
        metric: np.mean([variant.scores[metric].mean for entry in found.layers for variant in entry.variants])
        for metric in ("kl", "retrieval")
    }
    for options, entry in zip(choices(found, Plan(retrieval_weight=0.25), 16), found.layers, strict=True):
        for choice, variant in zip(options[1:], entry.variants, strict=True):
            blend = (
                0.75 * variant.scores["kl"].mean / mean["kl"]
                + 0.25 * variant.scores["retrieval"].mean / mean["retrieval"]
            )
            assert choice.loss == pytest.approx(blend)


def test_better_than_the_base_is_no_damage_in_a_blend_and_pays_for_none() -> None:
    scales = {"kl": 2.0, "retrieval": 0.5}
    assert blended({"kl": 0.1, "retrieval": -3.0}, scales) == pytest.approx(0.2)
    assert blended({"kl": 0.1, "retrieval": 1.0}, scales) == pytest.approx(0.7)
    assert blended({"nll": -0.1}, {"nll": 1.0}) == pytest.approx(-0.1)


def test_controls_keep_as_many_full_layers_as_the_budget_allows() -> None:
    found = sensitivity(10)
    # 16 of 100 tokens in a sliding layer: 4 full and 6 sliding hold 49.6 %.
    uniform = select(found, Plan(method="uniform", context_tokens=100))
    assert [entry.layer for entry in uniform if entry.attention == "full"] == [1, 3, 6, 8]
    for entry, measured in zip(uniform, found.layers, strict=True):
        plain, sink = measured.variants[1:]
        assert entry.attention == "full" or entry.sink == (sink.scores["kl"].mean < plain.scores["kl"].mean)
    draws = [select(found, Plan(method="random", context_tokens=100), seed) for seed in range(5)]
    assert {sum(entry.attention == "full" for entry in plan) for plan in draws} == {4}
    assert len({tuple(entry.attention for entry in plan) for plan in draws}) > 1
    assert draws[0] == select(found, Plan(method="random", context_tokens=100), 0)
    cosine = select(found, Plan(method="cosine", context_tokens=100))
    order = sorted(range(10), key=lambda layer: found.layers[layer].variants[0].scores["cosine"].mean)
    assert [entry.layer for entry in cosine if entry.attention == "none"] == sorted(order[:5])
    tiers = select(found, Plan(method="threshold", context_tokens=100))
    assert [sum(entry.attention == kind for entry in tiers) for kind in ("full", "sliding", "none")] == [4, 3, 3]
    with pytest.raises(InfeasibleBudget, match="no plan by uniform keeps the KV cache within 5"):
        select(found, Plan(method="uniform", context_tokens=100, kv_fraction=0.05))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Plan(window=17), "window 17 was not measured"),
        (Plan(method="threshold", full_layers=3, none_layers=3), "exceed the layers"),
        (Plan(method="threshold", none_layers=40), r"exceed the layers of the model\nfound: 0 \+ 40 > 4"),
        (
            Plan(metric="benchmark"),
            "no benchmark\nfound: layer 0, none: kl, nll, retrieval, cosine\ndo: measure benchmark",
        ),
        (Plan(decode_fraction=0.5), "needs to know how fast"),
    ],
)
def test_settings_that_cannot_be_met(settings: Plan, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        select(sensitivity(), settings)


@pytest.mark.parametrize("method", ["budget", "threshold", "uniform", "random"])
def test_layers_that_slide_in_the_base_are_never_given_a_window(method: str) -> None:
    found = altered(
        sensitivity(6),
        lambda entry: {"variants": entry.variants[: 1 if entry.layer in (0, 2) else None]},
        sliding_layers=[0, 2],
        sliding_window=16,
    )
    plan = select(found, Plan(method=method, kv_fraction=0.7, context_tokens=100))
    assert all(plan[layer].window is None for layer in (0, 2))
    assert Budget.of(found, Plan(kv_fraction=0.7, context_tokens=100)).met(plan)


@pytest.mark.parametrize("method", ["budget", "threshold"])
def test_where_every_layer_slides_in_the_base_some_are_removed(method: str) -> None:
    slides = {"sliding_layers": list(range(6)), "sliding_window": 64}
    found = altered(sensitivity(6), lambda entry: {"variants": entry.variants[:1]}, **slides)
    plan = select(found, Plan(method=method, kv_fraction=0.7, context_tokens=100, none_layers=2))
    assert {entry.attention for entry in plan} == {"full", "none"}
    with pytest.raises(InfeasibleBudget):
        select(found, Plan(method="uniform", kv_fraction=0.7, context_tokens=100))


@pytest.mark.parametrize("method", ["budget", "threshold", "uniform", "random", "cosine"])
def test_layers_of_another_kind_stay_as_they_are_and_cost_no_cache(method: str) -> None:
    others = [0, 2]
    found = altered(
        sensitivity(5), lambda entry: {"variants": []} if entry.layer in others else {}, other_layers=others
    )
    settings = Plan(method=method, kv_fraction=0.6, context_tokens=64)
    plan = select(found, settings, seed=1)
    assert [entry.layer for entry in plan if entry.attention == "other"] == others
    assert any(entry.changed for entry in plan)
    assert Budget.of(found, settings).met(plan)
    # A window of 16 holds a quarter of a layer's 64 tokens.
    held = {"full": 1.0, "sliding": 0.25}
    expected = sum(held.get(entry.attention, 0) for entry in plan) / 3
    assert predict(found, plan, settings).kv_fraction == pytest.approx(expected)


def test_mlps_of_layers_of_another_kind_cost_no_cache() -> None:
    others = [0, 2]

    def mlps(entry: LayerSensitivity) -> dict[str, Any]:
        return {"variants": [each for each in entry.variants if entry.layer not in others or each.mlp != "full"]}

    plain, hybrid = (
        select(altered(with_mlps(4), mlps, other_layers=names), Plan(kv_fraction=1, parameter_fraction=0.75))
        for names in ([], others)
    )
    assert any(entry.mlp_changed for entry in plain if entry.layer in others)
    kind = dict.fromkeys(others, "other")
    assert hybrid == [entry.model_copy(update={"attention": kind.get(entry.layer, entry.attention)}) for entry in plain]
