"""Losses against their definitions from full logits."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_model

from layerboost.probes.metrics import BaseText, score, token_losses

IDS = torch.randint(3, 200, (5, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_losses_of_the_model_itself_are_zero_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_model(layers=2)
    hidden = base.model(IDS).last_hidden_state
    same = token_losses(base, hidden, IDS, hidden)
    monkeypatch.setattr("layerboost.probes.metrics.CHUNK_TOKENS", 7)
    chunked = token_losses(base, hidden, IDS, hidden)
    assert same.kl.abs().max() == 0
    assert torch.equal(same.nll, same.base_nll)
    torch.testing.assert_close(chunked.nll, same.nll)


@pytest.mark.parametrize("family", ["llama", "granite"])
@torch.no_grad()
def test_fast_and_general_way_give_what_token_losses_gives(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"logits_scaling": 2.0} if family == "granite" else {}
    base = tiny_model(family, layers=2, **changes)
    hidden = base.model(IDS).last_hidden_state
    other = hidden + 0.3 * torch.randn_like(hidden)
    for name, size in {"CHUNK_TOKENS": 23, "ROWS": 50, "VOCABULARY": 60}.items():
        monkeypatch.setattr(f"layerboost.probes.metrics.{name}", size)
    text = BaseText(base, IDS, hidden)
    assert (text.weight is not None) == (family == "llama")
    found, expected = text.losses(other), token_losses(base, hidden, IDS, other)
    torch.testing.assert_close(found["kl"], expected.kl, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found["nll"], expected.nll - expected.base_nll, atol=1e-5, rtol=1e-5)
    logits, changed = base(IDS).logits, base.lm_head(other)
    if family == "llama":
        moved = (logits.argmax(-1) != changed.argmax(-1))[:, :-1].float().mean(-1)
        torch.testing.assert_close(found["top1"], moved)
    same = text.losses(hidden)
    assert all(values.abs().max() < 1e-5 for values in same.values())


@torch.no_grad()
def test_scored_tokens_alone_count() -> None:
    base, scored = tiny_model(layers=2), torch.rand(IDS.shape) < 0.3
    hidden = base.model(IDS).last_hidden_state
    other = hidden + 0.3 * torch.randn_like(hidden)
    found = token_losses(base, hidden, IDS, other, scored=scored)
    ours, theirs = (base.lm_head(each).log_softmax(-1)[:, :-1] for each in (hidden, other))
    by_token = {
        "kl": (ours.exp() * (ours - theirs)).sum(-1),
        "nll": -theirs.gather(-1, IDS[:, 1:, None])[..., 0],
        "base_nll": -ours.gather(-1, IDS[:, 1:, None])[..., 0],
    }
    for name, values in by_token.items():
        expected = [values[row][scored[row, 1:]].mean() for row in range(len(IDS))]
        torch.testing.assert_close(getattr(found, name), torch.stack(expected))
    text = BaseText(base, IDS, hidden, scored)
    torch.testing.assert_close(text.losses(other)["kl"], found.kl, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "granite"])
@torch.no_grad()
def test_positions_that_are_left_out_lose_nothing(family: str) -> None:
    base = tiny_model(family, layers=2)
    hidden = base.model(IDS).last_hidden_state
    other = torch.cat([hidden[:, :25], hidden[:, 25:] + 0.3 * torch.randn(5, 15, hidden.shape[-1])], dim=1)
    scored = torch.zeros_like(IDS, dtype=torch.bool)
    scored[:, 10:20] = True  # the token at position 25 is predicted at 24
    scored[1:, 24:28] = True
    for text in (BaseText(base, IDS, hidden), BaseText(base, IDS, hidden, scored)):
        whole, part = text.losses(other), text.losses(other[:, 25:])
        for metric, values in whole.items():
            torch.testing.assert_close(part[metric], values, atol=1e-5, rtol=1e-5)
        assert whole["kl"][1:].min() > 1e-3
    scored[:, 24:28] = False
    nothing = BaseText(base, IDS, hidden, scored).losses(other[:, 25:])
    assert all(torch.equal(values, torch.zeros(5)) for values in nothing.values())


def test_score() -> None:
    found = score(torch.arange(100.0), count=7)
    assert found.mean == 49.5
    assert found.standard_error == pytest.approx(float(torch.arange(100.0).std() / 10))
    assert found.count == 7
