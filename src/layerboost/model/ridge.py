"""Ridge regression of linear layers from sums over tokens, the ridge chosen on held-out sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

# In units of the inputs' mean square; each layer takes the best on held-out sequences.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
HELD_OUT = 5  # one token in five is held out, in whole sequences


@dataclass
class Sums:
    """Sums over tokens: error times input `[E, I]`, input times input `[I, I]`, and the squared error."""

    cross: torch.Tensor
    square: torch.Tensor
    error: float = 0.0

    @staticmethod
    def zeros(projection: nn.Linear) -> Sums:
        """Return empty sums: float64, on the projection's device."""
        cross = torch.zeros_like(projection.weight, dtype=torch.float64, requires_grad=False)
        return Sums(cross, cross.new_zeros(cross.shape[1], cross.shape[1]))

    def add(self, inputs: torch.Tensor, error: torch.Tensor) -> None:
        """Add the tokens of inputs `[B, T, I]` and errors `[B, T, E]`."""
        inputs, error = inputs.flatten(0, 1).float(), error.flatten(0, 1).float()
        self.cross += error.T @ inputs
        self.square += inputs.T @ inputs
        self.error += float(error.square().sum())

    def __add__(self, other: Sums) -> Sums:
        return Sums(self.cross + other.cross, self.square + other.square, self.error + other.error)

    def solve(self, ridge: float) -> torch.Tensor:
        """Return the M `[E, I]` of least Σ|error − M·input|² + ridge · mean square of an input · tokens · |M|²."""
        regular = self.square.clone()
        # Without inputs (a dead layer) the matrix is still positive.
        regular.diagonal().add_(ridge * float(regular.diagonal().mean()) + 1e-12)
        return torch.cholesky_solve(self.cross.T, torch.linalg.cholesky(regular)).T

    def remaining(self, change: torch.Tensor) -> float:
        """Return the fraction of the squared error that remains after a change M `[E, I]` of the projection."""
        gain = 2 * (change * self.cross).sum() - ((change @ self.square) * change).sum()
        return 1 - float(gain) / self.error if self.error else 1.0


def held_out(end: int, total: int) -> bool:
    """Return whether a sequence that ends after `end` of `total` tokens is held out: one of the last fifth."""
    return end * HELD_OUT > total * (HELD_OUT - 1)


def best_change(fitted: Sums, unseen: Sums) -> torch.Tensor | None:
    """Return the M `[E, I]` of all tokens, by the ridge that leaves the least error on held-out ones; None if none
    lowers it."""
    remaining, ridge = min((unseen.remaining(fitted.solve(ridge)), ridge) for ridge in RIDGES)
    return (fitted + unseen).solve(ridge) if remaining < 1 else None
