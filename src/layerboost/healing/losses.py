"""The healing losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

CHUNK_TOKENS = 256
Head = Callable[[torch.Tensor], torch.Tensor]


def normalized_mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of `output` against `target` `[B, T, D]`, over the target's mean square.

    An output of zeros scores 1.
    """
    return F.mse_loss(output.float(), target.float()) / target.float().square().mean().clamp_min(1e-12)


def distillation_loss_reference(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    temperature: float = 1.0,
) -> torch.Tensor:
    """KL(teacher ‖ student) per token, times temperature² (Hinton et al. 2015), the plain way.

    Logits of all tokens, `[B, T, V]`, are in memory at once.
    """
    student = (student_head(student_hidden).float() / temperature).log_softmax(-1)
    teacher = (teacher_head(teacher_hidden).float() / temperature).log_softmax(-1)
    return F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).mean() * temperature**2


def distillation_loss(
    student_hidden: torch.Tensor,
    teacher_hidden: torch.Tensor,
    student_head: Head,
    teacher_head: Head,
    temperature: float = 1.0,
) -> torch.Tensor:
    """The same value and the same gradient to `student_hidden` with logits of 256 tokens at a time.

    Hidden states are normed and final, `[B, T, D]`; the heads are frozen: no gradient reaches them.
    """
    loss: torch.Tensor = _ChunkedDistillation.apply(
        student_hidden, teacher_hidden, student_head, teacher_head, temperature
    )
    return loss


class _ChunkedDistillation(torch.autograd.Function):
    """Each chunk's gradient is taken in the forward pass, while its logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: torch.Tensor,
        teacher_hidden: torch.Tensor,
        student_head: Head,
        teacher_head: Head,
        temperature: float,
    ) -> torch.Tensor:
        rows = student_hidden.detach().flatten(0, 1)
        teacher_rows = teacher_hidden.detach().flatten(0, 1)
        gradient, total = torch.empty_like(rows), rows.new_zeros((), dtype=torch.float32)
        for start in range(0, len(rows), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            with torch.enable_grad():
                part = rows[chunk].clone().requires_grad_()
                with torch.no_grad():
                    teacher = (teacher_head(teacher_rows[chunk]).float() / temperature).log_softmax(-1)
                student = (student_head(part).float() / temperature).log_softmax(-1)
                loss = F.kl_div(student, teacher, log_target=True, reduction="sum") * temperature**2 / len(rows)
                (gradient[chunk],) = torch.autograd.grad(loss, part)
            total += loss.detach()
        ctx.save_for_backward(gradient.view_as(student_hidden))
        return total

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0], None, None, None, None
