"""Which neurons stay and how their output projection is fitted, against plain computations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from references import refit_reference
from tiny import families, tiny_model

from layerboost.errors import ConfigError, LayerboostError
from layerboost.model.mlp import mlp_output
from layerboost.model.modeling import decoder_layers
from layerboost.model.ridge import RIDGES
from layerboost.model.thinning import thin_mlps, widths_of
from layerboost.traffic import Traffic

IDS = torch.randint(3, 200, (10, 40), generator=torch.Generator().manual_seed(0))


def output_of(model: Any, layer: int) -> torch.nn.Linear:
    output = mlp_output(model.model.layers[layer].mlp)
    assert output is not None
    return output


def activations(model: Any, layer: int, ids: torch.Tensor) -> torch.Tensor:
    """The neurons of one MLP `[N, T, W]`."""
    seen: list[torch.Tensor] = []
    output = output_of(model, layer)
    hook = output.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    return seen[0].double()


@pytest.mark.parametrize("family", families(mlps=True))
def test_the_neurons_that_add_most_stay_and_are_fitted(family: str) -> None:
    model = tiny_model(family, layers=2)
    found = thin_mlps(model, list(IDS.split(4)), [(1, 32), (1, 64)])
    assert found.keys() == {(1, 32), (1, 64)}
    neurons = activations(model, 1, IDS)
    weight = output_of(model, 1).weight.detach().double()
    score = neurons.abs().mean((0, 1)) * weight.norm(dim=0)
    for (_, width), thinned in found.items():
        assert torch.equal(thinned.neurons, score.topk(width).indices.sort().values)
        # By the last fifth of the sequences the ridge is chosen; then all of them fit.
        fitted, unseen = neurons[:8].flatten(0, 1), neurons[8:].flatten(0, 1)

        def error(columns: torch.Tensor, kept: torch.Tensor = thinned.neurons, held: torch.Tensor = unseen) -> float:
            return float((held @ weight.T - held[:, kept] @ columns.T).square().sum())

        ridge = min(RIDGES, key=lambda ridge: error(refit_reference(fitted, weight, thinned.neurons, ridge)))
        expected = refit_reference(neurons.flatten(0, 1), weight, thinned.neurons, ridge)
        torch.testing.assert_close(thinned.output.double(), expected, atol=1e-4, rtol=1e-3)
        assert error(thinned.output.double()) < error(weight[:, thinned.neurons])


def test_what_else_is_asked_for_changes_nothing() -> None:
    model = tiny_model(layers=3)
    alone = thin_mlps(model, list(IDS.split(4)), [(2, 48)])[2, 48]
    among = thin_mlps(model, list(IDS.split(4)), [(0, 48), (2, 24), (2, 48)])[2, 48]
    assert torch.equal(alone.neurons, among.neurons)
    assert torch.equal(alone.output, among.output)
    assert thin_mlps(model, list(IDS), []) == {}


def test_padding_is_not_fitted_to() -> None:
    model = tiny_model(layers=1)
    lengths = [40, 25, 40, 31]
    scored = torch.arange(40)[None] < torch.tensor(lengths)[:, None]
    padded = thin_mlps(model, [Traffic(torch.where(scored, IDS[:4], 1), scored)], [(0, 48)])[0, 48]
    alone = thin_mlps(model, [row[None, :length] for row, length in zip(IDS, lengths, strict=False)], [(0, 48)])[0, 48]
    assert torch.equal(padded.neurons, alone.neurons)
    torch.testing.assert_close(padded.output, alone.output, atol=1e-5, rtol=1e-4)


def test_widths_are_multiples_that_kernels_like() -> None:
    config = tiny_model().config
    assert widths_of(config, (0.25, 0.75, 0.5)) == [64, 48, 32]
    config.intermediate_size = 1536
    assert widths_of(config, (0.75, 0.5, 0.25, 0.26)) == [1152, 768, 384]
    with pytest.raises(ConfigError, match=r"0 of 1536 neurons, in multiples of 64"):
        widths_of(config, (0.01,))


def test_an_mlp_of_experts_or_of_numbers_that_are_not_finite_is_named() -> None:
    model = tiny_model(layers=2)
    layer: Any = decoder_layers(model)[1]
    with torch.no_grad():
        layer.mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(LayerboostError, match="the MLP of layer 1 is not finite"):
        thin_mlps(model, [IDS], [(1, 48)])
    layer.mlp = torch.nn.Identity()
    with pytest.raises(ConfigError, match=r"the MLP of layer 1 cannot be thinned[\s\S]*Identity"):
        thin_mlps(model, [IDS], [(1, 48)])
