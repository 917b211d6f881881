from __future__ import annotations

import pytest
import torch
from tiny import layer_plans, tiny_model

from layerboost.artifacts import LayerPlan, LayerSensitivity, Score
from layerboost.model.surgery import apply_plan
from layerboost.sensitivity.metrics import score, token_losses
from layerboost.sensitivity.sweep import calibrate_sinks, sweep

IDS = torch.randint(3, 200, (5, 40), generator=torch.Generator().manual_seed(1))


def naive(base_logits: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    p, q = base_logits[:, :-1].log_softmax(-1), logits[:, :-1].log_softmax(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean(-1)
    labels = IDS[:, 1:, None]
    return kl, (p.gather(-1, labels) - q.gather(-1, labels))[..., 0].mean(-1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite"])
def test_the_sweep_equals_a_full_forward_per_variant(family: str) -> None:
    base = tiny_model(family, layers=4)
    found: list[LayerSensitivity] = []

    def save(base_nll: Score, layers: list[LayerSensitivity]) -> None:
        found[:] = layers

    sweep(base, list(IDS.split(2)), (8, 16), [], save)
    with torch.no_grad():
        logits = base(IDS).logits
    assert [entry.layer for entry in found] == [0, 1, 2, 3]
    for entry in found:
        assert len(entry.variants) == 5
        for variant in entry.variants:
            plan = layer_plans("ffff")
            plan[entry.layer] = LayerPlan(
                layer=entry.layer, attention=variant.attention, window=variant.window, sink=variant.sink
            )
            sinks = {}
            if variant.sink:
                calibrated = calibrate_sinks(base, list(IDS.split(2)), [entry.layer], [variant.window])
                sinks = {entry.layer: calibrated[entry.layer, variant.window]}
            with torch.no_grad():
                kl, nll = naive(logits, apply_plan(tiny_model(family, layers=4), plan, sinks)(IDS).logits)
            assert variant.scores["kl"].mean == pytest.approx(float(kl.mean()), abs=1e-5)
            assert variant.scores["kl"].standard_error == pytest.approx(float(kl.std() / 5**0.5), abs=1e-5)
            assert variant.scores["nll"].mean == pytest.approx(float(nll.mean()), abs=1e-5)


def test_a_sweep_goes_on_where_it_stopped() -> None:
    base = tiny_model(layers=4)
    saved: list[list[LayerSensitivity]] = []
    sweep(base, [IDS], (8,), [], lambda nll, layers: saved.append(list(layers)))
    again: list[list[LayerSensitivity]] = []
    sweep(base, [IDS], (8,), saved[1], lambda nll, layers: again.append(list(layers)))
    assert len(again) == 2
    assert again[-1] == saved[-1]


def test_losses_of_the_model_itself_are_zero_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(layers=2)
    with torch.no_grad():
        hidden = base.model(IDS).last_hidden_state
        nll, (same,) = token_losses(base, hidden, IDS, [hidden])
        monkeypatch.setattr("layerboost.sensitivity.metrics.CHUNK_TOKENS", 7)
        chunked, _ = token_losses(base, hidden, IDS, [])
    assert same.kl.abs().max() == 0
    torch.testing.assert_close(chunked, nll)
    torch.testing.assert_close(same.nll, nll)


def test_score() -> None:
    found = score(torch.tensor([1.0, 2.0, 3.0]))
    assert found.mean == 2
    assert found.standard_error == pytest.approx(1 / 3**0.5)
