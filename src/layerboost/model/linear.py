"""Linear layers in float32 on CPUs by oneDNN.

PyTorch gives float32 products to MKL, which keeps to AVX2 on AMD's processors; oneDNN, which comes with PyTorch too,
uses AVX-512 there and is more than twice as fast (`benchmarks/products.py`).
`torch.backends.mkldnn.flags(enabled=False)` turns it off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`F.linear` and its gradients: `x` `[..., K]`, `weight` `[N, K]` in any layout, `bias` `[N]`; `[..., N]`.

    What oneDNN cannot do or would not do faster goes to PyTorch.
    """
    if not _fits(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        out: torch.Tensor = _Linear.apply(x, weight, bias)
        return out
    return _product(x, weight, bias)


def use_onednn(model: nn.Module) -> None:
    """Have every plain linear layer of a model, adapters too, computed by `linear`; nothing else of it changes."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear


class OneDNNLinear(nn.Linear):
    """A linear layer computed by `linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., K]` to `[..., N]`."""
        return linear(input, self.weight, self.bias)


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() > 1
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # The operator that PyTorch's own compiler puts in a linear layer's place, without an operation fused to it.
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    """All three products by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), (x, weight) = outputs, ctx.saved_tensors
        rows = gradient.flatten(0, -2)
        by_input = _product(gradient, weight.T) if weight is not None else None
        by_weight = _product(rows.T, x.flatten(0, -2).T) if x is not None else None
        return by_input, by_weight, rows.sum(0) if ctx.needs_input_grad[2] else None
