"""Linear layers in float32 on CPUs by oneDNN.

PyTorch gives float32 products to MKL, which keeps to AVX2 on AMD's processors; oneDNN, which comes with PyTorch too,
uses AVX-512 where they have it and is twice as fast there. With AVX2 alone it gains nothing, and PyTorch keeps
all products (`benchmarks/products.py`). `torch.backends.mkldnn.flags(enabled=False)` turns it off.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

ONEDNN_PRODUCT = "mkldnn::_linear_pointwise"
FEWEST_TOKENS = 16  # below, oneDNN is slower in small layers
IS_FASTER = torch.backends.cpu.get_cpu_capability() == "AVX512"


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return `F.linear` `[..., N]` of `x` `[..., K]`, `weight` `[N, K]` in any layout and `bias` `[N]`, with gradients.

    Few tokens, what oneDNN cannot do, and all on a processor where it is slower, go to PyTorch.
    """
    if not _fits(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias)


def use_onednn(model: nn.Module) -> None:
    """Have every plain linear layer of a model, adapters too, computed by `linear`; nothing else of it changes."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = OneDNNLinear


class OneDNNLinear(nn.Linear):
    """A linear layer computed by `linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return `[..., N]` of `[..., K]`."""
        return linear(input, self.weight, self.bias)


def _fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        IS_FASTER
        and bool(torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.dim() > 1
        and math.prod(x.shape[:-1]) >= FEWEST_TOKENS
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    # The operator that PyTorch's own compiler puts in a linear layer's place, without an operation fused to it.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """Return rows `[M, K]` padded with zeros: 8 to 16 sizes from one power of two to the next.

    oneDNN compiles a kernel for every size and keeps a thousand of them: text of all lengths would fill gigabytes.
    """
    count = len(rows)
    step = max(FEWEST_TOKENS, 1 << count.bit_length() >> 4)
    missing = -count % step
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


class _Linear(torch.autograd.Function):
    """All three products by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight if x.requires_grad else None)
        rows = x.flatten(0, -2)
        out = _product(_padded(rows), weight, bias)[: len(rows)]
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), (x, weight) = outputs, ctx.saved_tensors
        rows, by_input, by_weight = gradient.flatten(0, -2), None, None
        padded = _padded(rows)
        if weight is not None:
            by_input = _product(padded, weight.T)[: len(rows)].view(*gradient.shape[:-1], -1)
        if x is not None:
            inputs = _padded(x.flatten(0, -2))
            wide = rows.shape[1] > inputs.shape[1]  # thin adapters: several times slower the other way round
            by_weight = _product(inputs.T, padded.T).T if wide else _product(padded.T, inputs.T)
        return by_input, by_weight, rows.sum(0) if ctx.needs_input_grad[2] else None
