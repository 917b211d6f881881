"""oneDNN's products against PyTorch's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import Products, tiny_model
from torch import nn
from torch.nn import functional as F

from layerboost.model.linear import OneDNNLinear, linear, use_onednn

NO_ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """On every processor, also where PyTorch is faster and keeps the products."""
    monkeypatch.setattr("layerboost.model.linear.IS_FASTER", True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@NO_ONEDNN
@pytest.mark.parametrize("shape", [(16, 24), (2, 25, 24), (37, 24), (2, 3, 64, 24)])
@pytest.mark.parametrize("trained", ["x", "weight", "bias", "all"])
@pytest.mark.parametrize("out", [16, 40])
def test_values_and_gradients_are_those_of_f_linear(shape: tuple[int, ...], trained: str, out: int) -> None:
    given = {"x": random(*shape), "weight": random(out, 24, seed=1), "bias": random(out, seed=2)}
    found: dict[Any, list[torch.Tensor | None]] = {}
    counted = Products()
    for function in (linear, F.linear):
        leaves = {name: value.clone().requires_grad_(trained in (name, "all")) for name, value in given.items()}
        with counted:
            result = function(leaves["x"], leaves["weight"], leaves["bias"])
            result.square().sum().backward()
        found[function] = [result.detach(), *(leaf.grad for leaf in leaves.values())]
    assert len(counted.rows) == {"x": 2, "weight": 2, "bias": 1, "all": 3}[trained]
    for one, other in zip(found[linear], found[F.linear], strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


@NO_ONEDNN
def test_texts_of_all_lengths_need_few_kernels() -> None:
    weight, counted = random(40, 24), Products()
    with counted, torch.no_grad():
        for count in range(16, 600):
            linear(torch.ones(count, 24), weight)
    assert len(counted.rows) == 584
    assert len(set(counted.rows)) < 50
    assert set(counted.rows) >= {64, 256, 384, 448, 512}
    assert max(padded / count for padded, count in zip(counted.rows, range(16, 600), strict=True) if count > 127) < 1.13


@NO_ONEDNN
def test_slices_and_transposed_weights() -> None:
    x, weight = random(2, 19, 24)[:, 4:, :], random(24, 40, seed=1).T
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (random(24), random(40, 24)),
        (random(15, 24), random(40, 24)),
        (random(20, 24).double(), random(40, 24).double()),
        (random(20, 24).bfloat16(), random(40, 24).bfloat16()),
        (torch.empty(20, 24, device="meta"), torch.empty(40, 24, device="meta")),
    ],
    ids=["vector", "few", "double", "bfloat16", "meta"],
)
def test_what_onednn_does_not_do_is_left_to_pytorch(x: torch.Tensor, weight: torch.Tensor) -> None:
    found, expected = linear(x, weight), F.linear(x, weight)
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    assert found.device.type == "meta" or torch.equal(found, expected)


@NO_ONEDNN
def test_it_is_onednn_and_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, calls = random(20, 24), random(40, 24), []
    monkeypatch.setattr(F, "linear", lambda *_: calls.append(1))
    linear(x, weight)
    assert not calls
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, weight)
    monkeypatch.setattr("layerboost.model.linear.IS_FASTER", False)
    linear(x, weight)
    assert len(calls) == 2


def test_a_model_keeps_its_weights_and_its_results() -> None:
    model = tiny_model("llama")
    ids = torch.arange(3, 40)[None]
    expected, weights = model(ids).logits, {name: id(value) for name, value in model.named_parameters()}
    use_onednn(model)
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {OneDNNLinear}
    assert {name: id(value) for name, value in model.named_parameters()} == weights
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(copy.deepcopy(model)(ids).logits, expected, atol=1e-4, rtol=1e-4)
