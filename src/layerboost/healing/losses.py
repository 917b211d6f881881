"""The healing losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

CHUNK_ELEMENTS = 1 << 23  # logits alive at once: a few copies of 32 MiB in float32
NO_LABEL = -100
Head = Callable[[torch.Tensor], torch.Tensor]


def normalized_mse(
    output: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, size: torch.Tensor
) -> torch.Tensor:
    """Return the squared error of `output` against `target` over the sequence's mean square of `size`, all `[B, T, D]`.

    `weights` `[B, T]` are those of the tokens, 0 for padding. With `size` the target and weights
    that sum to 1, an output of zeros scores 1. Each sequence is normed separately, so that the loss does not depend on
    how sequences are batched or spread over processes.
    """
    error = (output.float() - target.float()).square().mean(-1)
    present = (weights > 0).float()
    square = (size.float().square().mean(-1) * present).sum(-1) / present.sum(-1).clamp_min(1)
    return (error * weights).sum(-1).div(square.clamp_min(1e-12)).sum()


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
    """Return the weighted sum over tokens of KL(teacher ‖ student) times temperature² (Hinton et al. 2015).

    Hidden states are normed and final, `[B, T, D]`; the heads are linear and frozen: no gradient reaches them.
    `weights` `[B, T]`; `labels` `[B, T]`: the next tokens, NO_LABEL if there is none; their cross entropy is added
    `ce_weight` times. Logits exist for a few tokens at a time: each chunk's gradient is computed along with its loss,
    and nothing of the vocabulary's size is saved for the backward pass.
    """
    rows, teacher_rows = student_hidden.detach().flatten(0, 1), teacher_hidden.detach().flatten(0, 1)
    weight = weights.flatten().float()
    targets = labels.flatten() if labels is not None and ce_weight else None
    gradient, total = torch.empty_like(rows), rows.new_zeros((), dtype=torch.float32)
    with torch.no_grad():
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
    return _WithGradient.apply(student_hidden, total, gradient.view_as(student_hidden))


class _WithGradient(torch.autograd.Function):
    """A loss whose gradient by the hidden states is already known."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, loss: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gradient)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0], None, None


def _kl_and_slope(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL(teacher ‖ student)·T² of logits `[N, V]`, `[N]`, and its derivative by the student's, (q - p)·T."""
    student = (student / temperature if temperature != 1 else student).log_softmax(-1)
    teacher = (teacher / temperature if temperature != 1 else teacher).log_softmax(-1)
    probability = teacher.exp()
    # Elementwise: a product of the two by einsum or vecdot is half precision in autocast.
    loss = teacher.sub_(student).mul_(probability).sum(-1) * temperature**2
    return loss, student.exp_().sub_(probability).mul_(temperature)


def _ce_and_slope(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the cross entropy of logits `[N, V]`, `[N]`, and its derivative by them; 0 without a label."""
    known = labels != NO_LABEL
    index = labels.clamp_min(0)[:, None]
    log_probability = logits.log_softmax(-1)
    entropy = -log_probability.gather(-1, index)[:, 0] * known
    slope = log_probability.exp_()
    slope.scatter_add_(-1, index, slope.new_full(index.shape, -1.0))
    return entropy, slope.mul_(known[:, None])
