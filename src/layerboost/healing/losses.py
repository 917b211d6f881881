"""The healing losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

CHUNK_ELEMENTS = 1 << 23  # logits alive at once: 32 MiB in float32, a few times over
NO_LABEL = -100
Head = Callable[[torch.Tensor], torch.Tensor]


def normalized_mse(
    output: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, size: torch.Tensor
) -> torch.Tensor:
    """Squared error of `output` against `target` `[B, T, D]` over the sequence's mean square of `size` `[B, T, D]`.

    `weights` `[B, T]` are those of the tokens, 0 where there is none. With `size` the target and weights
    that sum to 1, an output of zeros scores 1. Each sequence is normed by itself, so that the loss does not depend on
    how sequences are batched or spread over processes.
    """
    error = (output.float() - target.float()).square().mean(-1)
    present = (weights > 0).float()
    square = (size.float().square().mean(-1) * present).sum(-1) / present.sum(-1).clamp_min(1)
    return (error * weights).sum(-1).div(square.clamp_min(1e-12)).sum()


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
    """Weighted sum over tokens of KL(teacher ‖ student) times temperature² (Hinton et al. 2015), the plain way.

    `weights` `[B, T]`; `labels` `[B, T]`: the next tokens, NO_LABEL where there is none, whose cross entropy is added
    `ce_weight` times. Logits of all tokens, `[B, T, V]`, are in memory at once.
    """
    logits = student_head(student_hidden).float()
    student = (logits / temperature).log_softmax(-1)
    teacher = (teacher_head(teacher_hidden).float() / temperature).log_softmax(-1)
    loss = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1) * temperature**2
    if labels is not None and ce_weight:
        entropy = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=NO_LABEL, reduction="none")
        loss = loss + ce_weight * entropy
    return (loss * weights).sum()


def distillation_loss(
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
    """The same value and the same gradient to `student_hidden`; logits exist for a few tokens at a time.

    Hidden states are normed and final, `[B, T, D]`; the heads are linear and frozen: no gradient reaches them.
    """
    loss: torch.Tensor = _ChunkedDistillation.apply(
        student_hidden, teacher_hidden, student_head, teacher_head, weights, temperature, labels, ce_weight
    )
    return loss


class _ChunkedDistillation(torch.autograd.Function):
    """Each chunk's gradient is taken in the forward pass, while its logits exist; nothing of size V is kept."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: torch.Tensor,
        teacher_hidden: torch.Tensor,
        student_head: Head,
        teacher_head: Head,
        weights: torch.Tensor,
        temperature: float,
        labels: torch.Tensor | None,
        ce_weight: float,
    ) -> torch.Tensor:
        rows, teacher_rows = student_hidden.detach().flatten(0, 1), teacher_hidden.detach().flatten(0, 1)
        weight = weights.flatten().float()
        targets = labels.flatten() if labels is not None and ce_weight else None
        gradient, total = torch.empty_like(rows), rows.new_zeros((), dtype=torch.float32)
        step = max(16, CHUNK_ELEMENTS // student_head(rows[:1]).shape[-1])
        for start in range(0, len(rows), step):
            chunk = slice(start, start + step)
            part = rows[chunk].clone().requires_grad_()
            with torch.enable_grad():
                logits = student_head(part)
            student = logits.detach().float()
            loss, slope = _kl_and_slope(student, teacher_head(teacher_rows[chunk]).float(), temperature)
            if targets is not None:
                entropy, more = _ce_and_slope(student, targets[chunk])
                loss, slope = loss + ce_weight * entropy, slope.add_(more, alpha=ce_weight)
            total += (loss * weight[chunk]).sum()
            slope = slope.mul_(weight[chunk, None]).to(logits.dtype)
            (gradient[chunk],) = torch.autograd.grad(logits, part, slope)
        ctx.save_for_backward(gradient.view_as(student_hidden))
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0], *(None,) * 7


def _kl_and_slope(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(teacher ‖ student)·T² of logits `[N, V]`: `[N]`, and its derivative by the student's logits, (q - p)·T."""
    student = (student / temperature if temperature != 1 else student).log_softmax(-1)
    teacher = (teacher / temperature if temperature != 1 else teacher).log_softmax(-1)
    probability = teacher.exp()
    # Elementwise: a product of the two by einsum or vecdot is half precision in autocast.
    loss = teacher.sub_(student).mul_(probability).sum(-1) * temperature**2
    return loss, student.exp_().sub_(probability).mul_(temperature)


def _ce_and_slope(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy of logits `[N, V]`: `[N]`, and its derivative by them, both 0 where there is no label."""
    known = labels != NO_LABEL
    index = labels.clamp_min(0)[:, None]
    log_probability = logits.log_softmax(-1)
    entropy = -log_probability.gather(-1, index)[:, 0] * known
    slope = log_probability.exp_()
    slope.scatter_add_(-1, index, slope.new_full(index.shape, -1.0))
    return entropy, slope.mul_(known[:, None])
