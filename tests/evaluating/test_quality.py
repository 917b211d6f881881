from __future__ import annotations

import pytest
import torch
from tiny_bench import tiny_model

from layerboost.evaluating.quality import hidden_states, text_losses


@pytest.fixture
def batches() -> list[torch.Tensor]:
    ids = torch.randint(0, 300, (3, 100), generator=torch.Generator().manual_seed(1))
    return list(torch.split(ids, 2))


@torch.no_grad()
def test_losses_are_those_of_whole_logits(batches: list[torch.Tensor]) -> None:
    base, changed = tiny_model(0), tiny_model(1)
    done: list[float] = []
    hidden = hidden_states(base, batches, done.append)
    found = text_losses(base, hidden, changed, batches, done.append)
    assert sum(done) == 2 * 300
    ids = torch.cat(batches)
    p, q = (model(ids).logits[:, :-1].double().log_softmax(-1) for model in (base, changed))
    labels = ids[:, 1:, None]
    torch.testing.assert_close(found.kl.double(), (p.exp() * (p - q)).sum(-1).mean(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.nll.double(), -q.gather(-1, labels)[..., 0].mean(-1), rtol=1e-4, atol=1e-5)
    alone = text_losses(base, hidden, None, batches, done.append)
    torch.testing.assert_close(alone.nll.double(), -p.gather(-1, labels)[..., 0].mean(-1), rtol=1e-4, atol=1e-5)
    assert not alone.kl.any()
