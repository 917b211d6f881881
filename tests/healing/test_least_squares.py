from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_distillers import END
from tiny import boosted, families, fitted, layer_plans, tiny_model

from layerboost.healing import least_squares
from layerboost.healing.distillers import AttentionDistiller
from layerboost.healing.least_squares import fit_outputs, fit_stage, projection_of, put
from layerboost.healing.student import with_adapters
from layerboost.model.ridge import RIDGES, Sums

LENGTH, TOKENS = 40, 40 * 30 - 7
IDS = torch.randint(3, 20, (30, LENGTH), generator=torch.Generator().manual_seed(0))


def made(letters: str, model_type: str = "llama") -> AttentionDistiller:
    letters = fitted(letters, model_type)
    student = boosted(letters, model_type).requires_grad_(False)
    teacher = tiny_model(model_type, len(letters)).requires_grad_(False)
    return AttentionDistiller(student, teacher, layer_plans(letters), END)


def test_the_solution_is_the_one_that_ridge_regression_has() -> None:
    draw = torch.Generator().manual_seed(0)
    inputs, error = torch.randn(1, 50, 6, generator=draw), torch.randn(1, 50, 4, generator=draw)
    sums = Sums(torch.zeros(4, 6).double(), torch.zeros(6, 6).double())
    sums.add(inputs[:, :20], error[:, :20])
    sums.add(inputs[:, 20:], error[:, 20:])
    change = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    penalty = 0.3 * inputs.square().sum((0, 1)).mean()
    loss = (error - inputs @ change.T.float()).square().sum() + penalty * change.square().sum()
    # A quadratic form: one Newton step from zero ends in its minimum.
    (slope,) = torch.autograd.grad(loss, change)
    hessian = 2 * (inputs[0].T @ inputs[0] + penalty * torch.eye(6))
    torch.testing.assert_close(sums.solve(0.3).float(), -torch.linalg.solve(hessian, slope.float().T).T)
    left = (error - inputs @ sums.solve(0.3).T.float()).square().sum() / error.square().sum()
    assert sums.remaining(sums.solve(0.3)) == pytest.approx(float(left), rel=1e-5)


@pytest.mark.parametrize("model_type", families())
def test_a_fit_brings_every_sliding_layer_nearer_to_the_base(model_type: str) -> None:
    local = made("sfSns", model_type)
    other = torch.randint(3, 20, (8, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = local.layer_losses(other)
        found = fit_outputs(local, list(IDS), TOKENS)
        put(local, found)
        after = local.layer_losses(other)
    sliding = {entry.layer for entry in local.changed if entry.attention == "sliding"}
    # Random weights leave some layers nothing to fit; the held-out sequences say which.
    assert sliding >= found.keys()
    assert found or not sliding
    for layer, loss in before.items():
        assert after[layer] < loss if layer in found else torch.equal(after[layer], loss)


def test_the_base_keeps_its_weights_and_adapters_sit_on_the_fitted_ones() -> None:
    local = made("fSs")
    names = {"model.layers.1.self_attn.o_proj"}
    with_adapters(local.student, frozenset(names), 2)
    shared = projection_of(local, 1).weight
    put(local, {1: shared + 1})
    assert torch.equal(projection_of(local, 1).weight, shared + 1)
    before = tiny_model("llama", 3).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in local.teacher.state_dict().items())


def test_passes_of_few_layers_give_what_one_pass_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    local = made("sSsns")
    at_once = fit_outputs(local, list(IDS), TOKENS)
    monkeypatch.setattr(least_squares, "MOST_BYTES", 1)
    one_by_one = fit_outputs(local, list(IDS), TOKENS)
    assert at_once.keys() == one_by_one.keys()
    assert all(torch.equal(value, one_by_one[layer]) for layer, value in at_once.items())


def test_a_window_that_cuts_nothing_off_leaves_the_layer_alone() -> None:
    local = made("sfs")
    assert fit_outputs(local, list(IDS[:, :8]), 8 * 30) == {}


def test_a_sequence_cut_short_neither_fits_nor_judges() -> None:
    local = made("sfs")
    whole = fit_outputs(local, list(IDS), 29 * LENGTH)
    assert whole
    cut = fit_outputs(local, list(IDS), 29 * LENGTH + 3)
    assert all(torch.equal(weight, cut[layer]) for layer, weight in whole.items())


def test_of_several_lengths_the_last_fifth_of_the_tokens_is_held_out() -> None:
    local = made("sfs")
    sequences = [*IDS[:8], IDS[8:10].flatten()]
    found = fit_outputs(local, [*sequences, IDS[10]], 10 * LENGTH + 7)
    assert found.keys() == {0, 2}
    sums = {layer: [Sums.zeros(projection_of(local, layer)) for _ in range(2)] for layer in found}
    with torch.no_grad():
        for ids in sequences:
            for layer, inputs, error in least_squares._errors(local, [local.changed[0], local.changed[-1]], ids[None]):
                sums[layer][len(ids) > LENGTH].add(inputs, error)
    for layer, (seen, unseen) in sums.items():
        ridge = min(RIDGES, key=lambda ridge: unseen.remaining(seen.solve(ridge)))
        expected = projection_of(local, layer).weight + (seen + unseen).solve(ridge).float()
        torch.testing.assert_close(found[layer], expected)


def test_a_fit_of_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    local = made("sfs")
    fit_stage(local, list(IDS[:, :8]), 8 * 30, tmp_path, lambda: {"validation_kl": 1.0})
    assert "no output projection is fitted" in caplog.text


def test_a_fit_that_is_no_better_is_dropped_and_a_finished_one_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kls = iter([1.0, 2.0])
    local = made("sfs")
    before = projection_of(local, 0).weight
    fit_stage(local, list(IDS), TOKENS, tmp_path, lambda: {"validation_kl": next(kls)})
    assert torch.equal(projection_of(local, 0).weight, before)
    assert "dropped" in caplog.text
    (tmp_path / "fit.safetensors").unlink()
    kls = iter([2.0, 1.0])
    fit_stage(local, list(IDS), TOKENS, tmp_path, lambda: {"validation_kl": next(kls)})
    again = made("sfs")
    fit_stage(again, list(IDS), TOKENS, tmp_path, lambda: {"validation_kl": next(iter([]))})
    assert not torch.equal(projection_of(again, 0).weight, before)
    assert torch.equal(projection_of(again, 0).weight, projection_of(local, 0).weight)


def test_attention_is_fitted_to_the_bases_attention_whatever_the_mlp() -> None:
    alone, thinned = made("fsfs"), made("fufs")
    expected, found = (fit_outputs(each, list(IDS), TOKENS) for each in (alone, thinned))
    assert found.keys() == expected.keys() == {1, 3}
    assert all(torch.equal(found[layer], expected[layer]) for layer in found)
    assert fit_outputs(made("ftfm"), list(IDS), TOKENS) == {}
