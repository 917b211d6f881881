"""MLPs of fewer neurons, or none.

Travels inside every boosted checkpoint, so it imports nothing of layerboost.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

# Names of an MLP's linear layer after the activation, over the families.
OUTPUTS = ("down_proj", "fc2", "c_proj")


class NoMLP(nn.Module):
    """Replaces the MLP of a layer without one: adds nothing to the stream."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def mlp_output(mlp: nn.Module) -> nn.Linear | None:
    """Return the linear layer after the activation, one column per neuron; None for an MLP that cannot be thinned, such
    as a mixture of experts."""
    output = next((layer for name, layer in mlp.named_children() if name in OUTPUTS), None)
    if not isinstance(output, nn.Linear):
        return None
    inputs = [layer for layer in mlp.children() if isinstance(layer, nn.Linear) and layer is not output]
    # Phi-3 and GLM compute gate and neuron by one product.
    fits = all(layer.out_features in (output.in_features, 2 * output.in_features) for layer in inputs)
    return output if inputs and fits else None


def thin(mlp: nn.Module, neurons: torch.Tensor, fitted: torch.Tensor | None = None) -> nn.Module:
    """Return an MLP of some neurons `[W]` of another, with copies of their weights; it shares all else.

    `fitted` `[D, W]`: weights of the output projection in place of its own.
    """
    output = mlp_output(mlp)
    assert output is not None
    width, neurons = output.in_features, neurons.to(output.weight.device)
    thinned = copy.copy(mlp)
    thinned._modules = dict(mlp._modules)  # a shallow copy has the same dictionary
    for name, layer in mlp.named_children():
        if layer is output:
            setattr(thinned, name, _part(output, neurons, 1))
            if fitted is not None:
                getattr(thinned, name).weight.data.copy_(fitted)
        elif isinstance(layer, nn.Linear):
            rows = neurons if layer.out_features == width else torch.cat([neurons, neurons + width])
            setattr(thinned, name, _part(layer, rows, 0))
    return thinned


def set_mlp(layer: Any, width: int) -> None:
    """Give a decoder layer the first `width` neurons of its MLP, or no MLP if 0; nothing if it has as many already."""
    if width == 0:
        layer.mlp = NoMLP()
        return
    output = mlp_output(layer.mlp)
    if output is None:
        raise ValueError(f"{type(layer.mlp).__name__} is not an MLP that can be thinned")
    if output.in_features != width:
        layer.mlp = thin(layer.mlp, torch.arange(width, device=output.weight.device))


def recorded_widths(config: Any) -> dict[int, int]:
    """Return the width of each MLP that a config thins, and 0 for each that it removes: `intermediate_size` and `skip`
    in `per_layer_config`."""
    if not config.is_heterogeneous:
        return {}
    stock = copy.copy(config)
    stock.per_layer_config = None
    layers = enumerate(config.per_layer_config)
    full = getattr(stock, "intermediate_size", None)  # a mixture of experts may have none
    widths = {index: 0 if "mlp" in layer.skip else getattr(layer, "intermediate_size", None) for index, layer in layers}
    return {index: width for index, width in widths.items() if width is not None and width != full}


def _part(linear: nn.Linear, index: torch.Tensor, dim: int) -> nn.Linear:
    """Return a linear layer of some rows (`dim` 0) or columns (1) of another."""
    weight, bias = linear.weight.detach().index_select(dim, index), linear.bias
    part = type(linear)(weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype)
    part.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if bias is not None:
        some = bias.detach().index_select(0, index) if dim == 0 else bias.detach()
        part.bias = nn.Parameter(some, requires_grad=bias.requires_grad)
    return part
