from __future__ import annotations

import math

import pytest
import torch
from tiny_bench import tiny_model

from layerboost.evaluation.quality import (
    average_tasks,
    base_losses,
    changed_losses,
    hidden_states,
    mean_and_error,
    paired_difference,
)


@pytest.fixture
def batches() -> list[torch.Tensor]:
    ids = torch.randint(0, 300, (3, 100), generator=torch.Generator().manual_seed(1))
    return list(torch.split(ids, 2))


@torch.no_grad()
def test_losses_are_those_of_whole_logits(batches: list[torch.Tensor]) -> None:
    base, changed = tiny_model(0), tiny_model(1)
    done: list[float] = []
    hidden = hidden_states(base, batches, done.append)
    found = changed_losses(base, hidden, changed, batches, done.append)
    assert sum(done) == 2 * 300
    ids = torch.cat(batches)
    p, q = (model(ids).logits[:, :-1].double().log_softmax(-1) for model in (base, changed))
    labels = ids[:, 1:, None]
    torch.testing.assert_close(found.kl.double(), (p.exp() * (p - q)).sum(-1).mean(-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.nll.double(), -q.gather(-1, labels)[..., 0].mean(-1), rtol=1e-4, atol=1e-5)
    alone = base_losses(base, batches, hidden)
    torch.testing.assert_close(alone.nll.double(), -p.gather(-1, labels)[..., 0].mean(-1), rtol=1e-4, atol=1e-5)
    assert not alone.kl.any()


def test_the_same_model_loses_nothing(batches: list[torch.Tensor]) -> None:
    base = tiny_model()
    hidden = hidden_states(base, batches, lambda tokens: None)
    found = changed_losses(base, hidden, tiny_model(), batches, lambda tokens: None)
    assert not found.kl.any()
    assert torch.equal(found.nll, base_losses(base, batches, hidden).nll)


def test_mean_and_error() -> None:
    assert mean_and_error([1.0, 2.0, 3.0, 6.0]) == {
        "mean": 3.0,
        "standard_error": pytest.approx(math.sqrt((4 + 1 + 0 + 9) / 3 / 4)),
    }
    assert mean_and_error([2.0]) == {"mean": 2.0, "standard_error": 0.0}


def test_differences_are_paired_over_items_in_any_order() -> None:
    base = {("t", 0): 1.0, ("t", 1): 0.0, ("t", 2): 1.0, ("u", 0): 1.0}
    changed = {("u", 0): 0.0, ("t", 2): 1.0, ("t", 1): 1.0, ("t", 0): 0.0}
    differences = torch.tensor([-1.0, 1.0, 0.0, -1.0])
    found = paired_difference(base, changed)
    assert found["mean"] == pytest.approx(float(differences.mean()))
    assert found["standard_error"] == pytest.approx(float(differences.std()) / 2)


def test_the_average_weighs_tasks_alike() -> None:
    def task(value: float, error: float, difference: float) -> dict[str, object]:
        return {
            "metric": "acc",
            "items": 10,
            "models": {"base": {"value": value, "standard_error": error}},
            "difference": {"healed": {"mean": difference, "standard_error": error}},
        }

    assert average_tasks({"a": task(0.5, 0.03, -0.1), "b": task(0.7, 0.04, 0.3)}) == {
        "metric": "mean over tasks",
        "items": 20,
        "models": {"base": {"value": pytest.approx(0.6), "standard_error": pytest.approx(0.025)}},
        "difference": {"healed": {"mean": pytest.approx(0.1), "standard_error": pytest.approx(0.025)}},
    }
    assert average_tasks({}) is None
