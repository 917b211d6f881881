from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_selection import sensitivity
from tiny import families, fitted, info, layer_plans, tiny_model

from layerboost.costs.budget import (
    Budget,
    Costs,
    Rates,
    base_kv_bytes,
    decode_work,
    plan_kv_bytes,
    prefill_work,
    read_costs,
)
from layerboost.errors import ConfigError
from layerboost.model.base import parameter_facts
from layerboost.model.families import WRAPPERS
from layerboost.model.surgery import apply_plan
from layerboost.planning.methods import select
from layerboost.recipe import Plan
from layerboost.runtime import machine
from layerboost.schemas.artifact import write_json
from layerboost.schemas.model import ModelInfo
from layerboost.schemas.plan import LayerPlan

RATES = Rates(step_ms=2.0, layer_ms=0.5, weight_bytes_per_s=1e6, flops_per_s=1e7, kv_bytes_per_s=2e6)


def budget(model: ModelInfo, **fractions: float) -> Budget:
    return Budget(model, 100, 8, fractions, RATES)


def test_kv_bytes() -> None:
    assert base_kv_bytes(info(), 100) == 4 * 100 * 2 * 2 * 32 * 4
    assert plan_kv_bytes(info(), layer_plans("fsSn"), 100) == (100 + 16 + 16) * 2 * 2 * 32 * 4
    assert plan_kv_bytes(info(), layer_plans("ssss"), 10) == base_kv_bytes(info(), 10)


@pytest.mark.parametrize("model_type", families())
def test_parameters_are_those_of_the_model_without_what_is_removed(model_type: str) -> None:
    letters = fitted("fnffnf" if model_type in WRAPPERS else "fntomzn", model_type)
    model = tiny_model(model_type, len(letters))
    facts = info(len(letters)).model_copy(update=parameter_facts(model.config))

    def counted() -> int:
        """Those of the language model, tied ones once."""
        found = {*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()}
        return sum(parameter.numel() for parameter in found)

    assert facts.parameters == counted()
    apply_plan(model, layer_plans(letters))
    assert budget(facts).plan(layer_plans(letters))["parameters"] == counted() < facts.parameters


def test_the_facts_of_a_tiny_llama_are_right() -> None:
    found = info().model_copy(update=parameter_facts(tiny_model(layers=4).config))
    same = {"attention_parameters", "mlp_width", "mlp_parameters", "neuron_parameters"}
    assert found.model_dump(include=same) == info().model_dump(include=same)
    assert (found.expert_parameters, found.active_parameters) == (0, found.parameters)
    assert found.idle_parameters(1) == 0


def test_a_token_uses_the_experts_that_it_chooses() -> None:
    """Counted by hand: two of eight experts of three matrices, in all but the first layer."""
    config = tiny_model("glm4_moe", layers=4).config
    found = info().model_copy(update=parameter_facts(config))
    assert found.expert_parameters == 3 * 8 * 3 * 64 * 32
    assert found.active_parameters == found.parameters - 3 * 6 * 3 * 64 * 32
    assert found.idle_parameters(2) == found.expert_parameters * 0.75**2
    assert parameter_facts(tiny_model("hunyuan_v1_moe", moe_topk=[2] * 5).config)["expert_fraction"] == 0.25


def test_time_counts_active_parameters_and_memory_counts_all() -> None:
    """Of a decoding step, FLOPs are those of a token's experts; the weights read are those that any request uses."""
    dense, layers = info(), layer_plans("ffff")
    mixture = dense.model_copy(update={"expert_parameters": 100_000, "expert_fraction": 0.25})
    for requests in (1, 8):
        was, found = decode_work(dense, layers, requests, 64), decode_work(mixture, layers, requests, 64)
        assert was[3] - found[3] == 2 * requests * 75_000
        assert was[2] - found[2] == pytest.approx(4 * 100_000 * 0.75**requests)
    was, found = prefill_work(dense, layers, 64, 16), prefill_work(mixture, layers, 64, 16)
    assert was[3] - found[3] == 2 * 64 * 75_000
    assert was[2] - found[2] == pytest.approx(4 * 4 * 100_000 * 0.75**16)
    assert budget(dense).plan(layers)["parameters"] == budget(mixture).plan(layers)["parameters"]


@pytest.mark.parametrize("rates", [{}, {"weight_bytes_per_s": -5.0}, {"step_ms": -1.0}])
def test_rates_that_cannot_be(rates: dict[str, float], tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({"schema_version": 1, "rates": rates}))
    with pytest.raises(ConfigError, match="decoding takes no time" if not rates else "greater than"):
        Budget.of(sensitivity(4), Plan(costs=str(file), decode_fraction=0.5))


def test_decode_time_is_the_sum_of_its_parts() -> None:
    model, layers = info(), layer_plans("fsSn")
    body = model.parameters - 2 * 64 * 200 - 4 * model.attention_parameters
    weights = body + 64 * 200 + 3 * model.attention_parameters
    held = 8 * (100 + 16 + 16) * model.kv_bytes_per_token
    expected = 2.0 + 3 * 0.5 + 1e3 * (weights * 4 / 1e6 + 2 * weights * 8 / 1e7 + held / 2e6)
    assert RATES.milliseconds(decode_work(model, layers, 8, 100)) == pytest.approx(expected)
    # Per-layer costs add up, which the integer program relies on.
    costs = budget(model)
    parts = sum(costs.added(entry)["decode_ms"] for entry in layers) + costs.base()["decode_ms"]
    assert costs.plan(layers)["decode_ms"] == pytest.approx(parts)
    # Half of an MLP is not read and not multiplied with.
    saved = 48 * 192 * (4 / 1e6 + 2 * 8 / 1e7)
    assert costs.added(layer_plans("t")[0])["decode_ms"] == pytest.approx(-1e3 * saved)


def test_where_kv_heads_differ_every_layer_takes_several_calls() -> None:
    model = info().model_copy(update={"kv_heads": 4, "heads": 8})
    mixed = LayerPlan(layer=1, attention="sliding", window=16, sink=True, full_kv_heads=(1,))
    halves = mixed.model_copy(update={"full_kv_heads": (1, 3)})
    whole = layer_plans("fsSn")

    def calls(second: LayerPlan, module: int | None = None) -> float:
        return float(decode_work(model, [whole[0], second, *whole[2:]], 8, 100, module)[6])

    assert [calls(whole[1]), calls(mixed), calls(halves), calls(whole[1], 1)] == [0, 9, 3, 9]
    assert prefill_work(model, [whole[0], mixed, *whole[2:]], 50, 16)[6] == 4 * 9
    # With the modules given, per-layer costs add up; the base takes one call per layer in any case.
    costs = Budget(model, 100, 8, {}, RATES.model_copy(update={"call_ms": 0.25}), module=1)
    layers = [whole[0], mixed, *whole[2:]]
    full = costs.plan(layer_plans("ffff"))["decode_ms"]
    parts = sum(costs.added(entry)["decode_ms"] for entry in layers) + full
    assert costs.plan(layers)["decode_ms"] == pytest.approx(parts)
    assert costs.base() == Budget(model, 100, 8, {}, RATES).base()


def test_prefill_counts_every_pair_of_query_and_key() -> None:
    mask = np.tril(np.ones((50, 50)))
    pairs = mask.sum() + 2 * (mask - np.tril(mask, -16)).sum()
    work = prefill_work(info(), layer_plans("fsSn"), 50, 16)
    assert work[5] == 4 * 4 * 32 * pairs
    assert list(work[:2]) == [4, 12]


def test_padding_counts_the_full_layers_that_vllm_reserves() -> None:
    model = info(7)
    layers = layer_plans("fffssss")  # groups of four: three full layers and one of padding
    assert budget(model).limited(layers)["kv_bytes"] == pytest.approx(
        budget(model).relative(layers)["kv_bytes"] + 1 / 7
    )
    assert not budget(model, kv_bytes=0.6).met(layers)
    assert Budget(model, 100, 8, {"kv_bytes": 0.6}, None, padding=False).met(layers)


def test_costs_of_another_machine_or_model_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "costs.json"
    for costs, found in [
        (Costs(machine="a toaster, 1 cores", rates=RATES), "a toaster, 1 cores there, "),
        (Costs(machine=machine(), model="xyz", rates=RATES), "xyz there, abc here"),
    ]:
        write_json(file, costs)
        with pytest.raises(ConfigError, match=found):
            read_costs(file, info())
    for costs in (Costs(machine=machine(), model="abc", rates=RATES), Costs(rates=RATES)):
        write_json(file, costs)
        assert read_costs(file, info()) == RATES


def test_a_budget_of_decoding_time(tmp_path: Path) -> None:
    write_json(tmp_path / "costs.json", Costs(rates=RATES))
    settings = Plan(
        kv_fraction=1, decode_fraction=0.8, concurrency=8, context_tokens=100, costs=str(tmp_path / "costs.json")
    )
    found = sensitivity(6)
    layers: list[LayerPlan] = select(found, settings)
    assert 0.5 < Budget.of(found, settings).relative(layers)["decode_ms"] <= 0.8
    assert any(entry.attention != "full" for entry in layers)


def test_kv_bytes_of_a_base_with_sliding_layers() -> None:
    model = info().model_copy(update={"sliding_layers": [0, 2], "sliding_window": 16})
    token = model.kv_bytes_per_token
    assert base_kv_bytes(model, 100) == (16 + 100 + 16 + 100) * token
    assert plan_kv_bytes(model, layer_plans("fsnf"), 100) == (16 + 16 + 0 + 100) * token
    assert base_kv_bytes(model, 10) == 4 * 10 * token


def test_an_engine_that_computes_removed_attention_gains_nothing_by_removing_it() -> None:
    """llama.cpp: the time is that of a sliding layer, KV bytes and parameters are as elsewhere."""
    kept = replace(budget(info()), rates=RATES.model_copy(update={"removed_saves": False}), window=16)
    for removed, sliding in (("nnnn", "ssss"), ("fsnn", "fsss")):
        costs = [kept.plan(layer_plans(letters))["decode_ms"] for letters in (removed, sliding)]
        assert costs[0] == pytest.approx(costs[1])
    assert kept.plan(layer_plans("ffss")) == budget(info()).plan(layer_plans("ffss"))
    assert kept.plan(layer_plans("nnnn"))["kv_bytes"] == 0
    assert budget(info()).plan(layer_plans("nnnn"))["decode_ms"] < kept.plan(layer_plans("nnnn"))["decode_ms"]
