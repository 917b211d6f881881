"""Thinned MLPs: which neurons stay, and the output projection fitted to what they have to add.

Neurons are ranked by what they add to the stream on text: the mean of |activation| times the norm of their column of
the output projection. The columns that stay are fitted by ridge regression to the whole MLP's output.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from layerboost.errors import ConfigError, LayerboostError
from layerboost.model.mlp import mlp_output
from layerboost.model.modeling import decoder_layers
from layerboost.model.ridge import Sums, best_change, held_out
from layerboost.model.stream import LayerStream, input_of, recorded
from layerboost.model.surgery import Thinned
from layerboost.runtime import Progress
from layerboost.traffic import Traffic, unpacked

# By layer and width.
ThinnedMLPs = Mapping[tuple[int, int], Thinned]
MULTIPLE = 64  # of neurons, which kernels divide into tiles of that many


def widths_of(config: PreTrainedConfig, fractions: Sequence[float]) -> list[int]:
    """Return the widths of these fractions of a model's MLPs, widest first: multiples of 64, or of less in MLPs of
    fewer than 256 neurons; raise ConfigError if a fraction leaves nothing, or all."""
    full: int = config.intermediate_size
    multiple = min(MULTIPLE, 1 << max(0, full.bit_length() - 3))
    widths = sorted({round(fraction * full / multiple) * multiple for fraction in fractions}, reverse=True)
    if not all(0 < width < full for width in widths):
        raise ConfigError(
            "measure.mlp_widths must leave some neurons of an MLP and remove others",
            found=f"{', '.join(map(str, widths))} of {full} neurons, in multiples of {multiple}",
        )
    return widths


@dataclass
class Activations:
    """Sums over tokens of one MLP's neurons: products of every two `[W, W]`, of fitted and of held-out sequences, and
    absolute values `[W]`."""

    fitted: torch.Tensor
    unseen: torch.Tensor
    absolute: torch.Tensor

    @staticmethod
    def zeros(output: nn.Linear) -> Activations:
        """Return empty sums: float64, on the device of the MLP's output projection."""
        width = output.in_features
        square = torch.zeros(width, width, dtype=torch.float64, device=output.weight.device)
        return Activations(square, square.clone(), square.new_zeros(width))

    def add(self, neurons: torch.Tensor, unseen: bool) -> None:
        """Add one sequence of neurons `[T, W]`."""
        neurons = neurons.float()
        square = self.unseen if unseen else self.fitted
        square += neurons.T @ neurons
        self.absolute += neurons.abs().sum(0)

    def thinned(self, weight: torch.Tensor, width: int) -> Thinned:
        """Return the `width` neurons that add most and their columns of the output projection `weight` `[D, W]`, fitted
        if that lowers the error on the held-out sequences."""
        weight = weight.double()
        ranked = (self.absolute * weight.norm(dim=0)).argsort(descending=True, stable=True)
        neurons, others = ranked[:width].sort().values, ranked[width:]
        change = best_change(*(_sums(square, weight, neurons, others) for square in (self.fitted, self.unseen)))
        kept = weight[:, neurons]
        return Thinned(neurons, kept if change is None else kept + change)


@torch.no_grad()
def thin_mlps(
    model: PreTrainedModel, batches: Sequence[torch.Tensor | Traffic], wanted: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], Thinned]:
    """Return the thinned MLPs of these layers and widths, fitted to the stock model's own states on `batches` of ids
    `[B, T]`: the same ones whatever else is asked for.

    The model runs twice. Memory: one hidden state per token, and the products of one MLP's neurons. Raise ConfigError
    for an MLP that cannot be thinned, LayerboostError if its neurons are not finite.
    """
    widths: dict[int, list[int]] = {}
    for layer, width in wanted:
        widths.setdefault(layer, []).append(width)
    found: dict[tuple[int, int], Thinned] = {}
    if not widths:
        return found
    stream, sequences = LayerStream(model), [unpacked(each) for each in batches]
    streams = [stream.own() if given else stream for *_, given in sequences]
    rows = [lengths for _, lengths, _ in sequences]
    total = sum(map(sum, rows))
    states = [
        each.forward(ids.to(model.device), given=given)[0]
        for each, (ids, _, given) in zip(streams, sequences, strict=True)
    ]
    with Progress("fitting thinned MLPs", len(widths), "MLPs") as progress:
        for layer in range(max(widths) + 1):
            if layer not in widths:
                states = [each.layer(layer, state) for each, state in zip(streams, states, strict=True)]
                continue
            output = output_of(decoder_layers(model)[layer], layer)
            sums, end = Activations.zeros(output), 0
            with recorded({layer: output}, input_of) as neurons:
                for index, lengths in enumerate(rows):
                    states[index] = streams[index].layer(layer, states[index])
                    for row, length in enumerate(lengths):
                        end += length
                        sums.add(neurons[layer][row, :length], held_out(end, total))
            if not math.isfinite(float(sums.absolute.sum())):
                raise LayerboostError(
                    f"the MLP of layer {layer} is not finite on the text it is fitted to",
                    do="look for the cause in the base: `layerboost evaluate` names layer and token",
                )
            for width in widths[layer]:
                thinned = sums.thinned(output.weight, width)
                # Kept for as long as plans are measured, so not in a GPU's memory.
                found[layer, width] = Thinned(thinned.neurons.cpu(), thinned.output.to(output.weight.dtype).cpu())
            del sums  # before the next layer's
            progress.advance(1)
    return found


def output_of(layer: Any, index: int) -> nn.Linear:
    """Return the output projection of a decoder layer's MLP; raise ConfigError if the MLP cannot be thinned."""
    output = mlp_output(layer.mlp) if hasattr(layer, "mlp") else None
    if output is None:
        raise ConfigError(
            f"the MLP of layer {index} cannot be thinned: it is not one of neurons between linear layers",
            found=type(getattr(layer, "mlp", layer)).__name__,
            do="leave mlp out of measure.components",
        )
    return output


def _sums(square: torch.Tensor, weight: torch.Tensor, neurons: torch.Tensor, others: torch.Tensor) -> Sums:
    """Return the sums of the fit: its inputs are the neurons that stay, its error is what the others add."""
    lost = weight[:, others]
    error = ((lost @ square[others][:, others]) * lost).sum()
    return Sums(lost @ square[others][:, neurons], square[neurons][:, neurons], float(error))
