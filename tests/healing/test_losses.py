from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from layerboost.healing import losses
from layerboost.healing.losses import NO_LABEL, Head, distillation_loss, normalized_mse


def distillation_loss_reference(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    weights: torch.Tensor,
    *,
    temperature: float = 1.0,
    labels: torch.Tensor | None = None,
    ce_weight: float = 0.0,
) -> torch.Tensor:
    """The same with the logits of all tokens, `[B, T, V]`, in memory at once."""
    logits = student_head(student_hidden).float()
    student = (logits / temperature).log_softmax(-1)
    teacher = (teacher_head(teacher_hidden).float() / temperature).log_softmax(-1)
    loss = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1) * temperature**2
    if labels is not None and ce_weight:
        entropy = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=NO_LABEL, reduction="none")
        loss = loss + ce_weight * entropy
    return (loss * weights).sum()


@pytest.mark.parametrize(("temperature", "ce_weight"), [(1.0, 0.0), (2.0, 0.0), (2.0, 0.5)])
def test_chunked_distillation_equals_the_plain_way(
    monkeypatch: pytest.MonkeyPatch, temperature: float, ce_weight: float
) -> None:
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 50 * 70)  # chunks of 70 tokens, a short last one
    torch.manual_seed(0)
    heads = [torch.nn.Linear(16, 50, bias=False).requires_grad_(False) for _ in range(2)]
    student, teacher = torch.randn(3, 200, 16, requires_grad=True), torch.randn(3, 200, 16)
    weights, labels = torch.rand(3, 200) * (torch.rand(3, 200) > 0.3), torch.randint(0, 50, (3, 200))
    labels[:, ::7] = NO_LABEL
    found = []
    for function in (distillation_loss, distillation_loss_reference):
        loss = function(
            student, teacher, heads[0], heads[1], weights, temperature=temperature, labels=labels, ce_weight=ce_weight
        )
        (3 * loss).backward()
        found.append((loss.detach(), student.grad))
        student.grad = None
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_the_kl_is_float32_in_autocast() -> None:
    torch.manual_seed(0)
    teacher = 5 * torch.randn(20, 300)
    student = teacher + 0.05 * torch.randn(20, 300)
    plain = losses._kl_and_slope(student.clone(), teacher.clone(), 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = losses._kl_and_slope(student.clone(), teacher.clone(), 1.0)
    for one, other in zip(plain, mixed, strict=True):
        torch.testing.assert_close(one, other)


def test_normalized_mse() -> None:
    target = torch.randn(2, 5, 8) * torch.tensor([1.0, 70.0])[:, None, None]
    weights = torch.full((2, 5), 0.1)
    assert normalized_mse(target, target, weights, target) == 0
    assert float(normalized_mse(torch.zeros_like(target), target, weights, target)) == pytest.approx(1)


def test_what_does_not_count_does_not_matter() -> None:
    output, target = torch.randn(1, 6, 8), torch.randn(1, 6, 8)
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25, 0, 0]])
    short = normalized_mse(output[:, :4], target[:, :4], weights[:, :4], target[:, :4])
    torch.testing.assert_close(normalized_mse(output, target, weights, target), short)
