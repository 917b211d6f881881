"""The scan against the exact losses of changed models, for changes small enough for second order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from tiny import tiny_model

from layerboost.measuring.scan import scan, scan_answers
from layerboost.model.sinks import calibrate_sinks
from layerboost.model.surgery import apply_plan
from layerboost.probes.metrics import answer_scores
from layerboost.retrieval import Prompts
from layerboost.schemas.plan import LayerPlan

IDS = torch.randint(3, 200, (6, 48), generator=torch.Generator().manual_seed(1))


def site(layer: int, head: int, window: int = 24, sink: bool = False) -> LayerPlan:
    others = tuple(other for other in range(2) if other != head)
    return LayerPlan(layer=layer, attention="sliding", window=window, sink=sink, full_kv_heads=others)


@torch.no_grad()
def exact(plan: LayerPlan, **changes: Any) -> float:
    """The KL of a changed model per token."""
    base = tiny_model(layers=3, **changes)
    expected = base(IDS).logits.log_softmax(-1)
    sinks = calibrate_sinks(base, list(IDS.split(2)), range(3), [24])
    layers = [LayerPlan(layer=layer, attention="full") for layer in range(3)]
    layers[plan.layer] = plan
    changed = apply_plan(base, layers, {entry.layer: sinks(entry) for entry in layers if entry.sink})(IDS).logits
    return float((expected.exp() * (expected - changed.log_softmax(-1))).sum(-1).mean())


@pytest.mark.parametrize("sink", [False, True])
def test_scores_are_those_of_small_changes(sink: bool) -> None:
    """With small weights a window changes little, and the second order is all there is."""
    small: dict[str, Any] = {"initializer_range": 0.08}
    base = tiny_model(layers=3, **small)
    sites = [site(layer, head, sink=sink) for layer in range(3) for head in range(2)]
    batches = list(IDS.split(4))
    found = scan(base, batches, sites, calibrate_sinks(base, batches, range(3), [24]), draws=200)
    assert found.shape == (6, 200, 6)
    values = found.square().mean((0, 1)).div(2).tolist()
    expected = [exact(plan, **small) for plan in sites]
    assert values == pytest.approx(expected, rel=0.35)
    assert spearmanr(values, expected).statistic > 0.7
    assert all(parameter.grad is None for parameter in base.parameters())


def test_the_model_is_as_before_and_a_seed_repeats() -> None:
    base = tiny_model(layers=3)
    before = base(IDS).logits
    sites = [site(0, 1), site(2, 0)]
    batches = list(IDS.split(2))
    sinks = calibrate_sinks(base, batches, range(3), [24])
    one, again, other = (scan(base, batches, sites, sinks, draws=2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(base(IDS).logits, before)


def test_answers_lose_what_small_changes_take() -> None:
    """To first order: the loss of an answer's log-probability, by prompt and site."""
    small: dict[str, Any] = {"initializer_range": 0.02}
    base = tiny_model(layers=3, **small)
    prompts = Prompts("passkey", IDS, answers=(3,) * 6, depths=(0.5,) * 6)
    sites = [site(layer, head) for layer in range(3) for head in range(2)]
    sinks = calibrate_sinks(base, list(IDS.split(2)), range(3), [24])
    found = scan_answers(base, prompts.batches(4), sites, sinks)
    assert found.shape == (6, 6)
    expected = torch.stack([answers_lost(plan, prompts, **small) for plan in sites], 1)
    assert spearmanr(found.flatten(), expected.flatten()).statistic > 0.95
    assert torch.allclose(found, expected, atol=0.1 * float(expected.abs().max()))


@torch.no_grad()
def answers_lost(plan: LayerPlan, prompts: Prompts, **changes: Any) -> torch.Tensor:
    """The log-probability of each answer that one site loses."""
    base = tiny_model(layers=3, **changes)
    before = answer_scores(base, prompts, base.model(IDS).last_hidden_state)[0]
    layers = [LayerPlan(layer=layer, attention="full") for layer in range(3)]
    layers[plan.layer] = plan
    changed = apply_plan(base, layers)
    return before - answer_scores(changed, prompts, changed.model(IDS).last_hidden_state)[0]
