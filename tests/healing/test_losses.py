from __future__ import annotations

import pytest
import torch

from layerboost.healing.losses import distillation_loss, distillation_loss_reference, normalized_mse


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chunked_distillation_equals_the_plain_way(temperature: float) -> None:
    torch.manual_seed(0)
    heads = [torch.nn.Linear(16, 50, bias=False).requires_grad_(False) for _ in range(2)]
    student, teacher = torch.randn(3, 200, 16, requires_grad=True), torch.randn(3, 200, 16)
    found = []
    for function in (distillation_loss, distillation_loss_reference):
        loss = function(student, teacher, heads[0], heads[1], temperature)
        (3 * loss).backward()
        found.append((loss.detach(), student.grad))
        student.grad = None
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_normalized_mse() -> None:
    target = torch.randn(2, 5, 8) * 7
    assert normalized_mse(target, target) == 0
    assert normalized_mse(torch.zeros_like(target), target) == pytest.approx(1)
