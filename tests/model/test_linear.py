"""oneDNN's products against PyTorch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch.nn import functional as F

from layerboost.model.linear import OneDNNLinear, linear, use_onednn

NO_ONEDNN = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@NO_ONEDNN
@pytest.mark.parametrize("shape", [(5, 24), (2, 5, 24), (1, 24), (2, 3, 4, 24)])
@pytest.mark.parametrize("biased", [False, True])
def test_values_and_gradients_are_those_of_f_linear(shape: tuple[int, ...], biased: bool) -> None:
    given = [random(*shape), random(40, 24, seed=1), *([random(40, seed=2)] if biased else [])]
    found, expected = [], []
    for function, results in ((linear, found), (F.linear, expected)):
        leaves = [value.clone().requires_grad_() for value in given]
        out = function(*leaves)
        assert out.grad_fn is not None
        out.square().sum().backward()
        results += [out.detach(), *(leaf.grad for leaf in leaves)]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)


@NO_ONEDNN
@pytest.mark.parametrize("trained", ["x", "weight"])
def test_only_what_is_trained_gets_a_gradient(trained: str) -> None:
    given = {"x": random(5, 24), "weight": random(40, 24, seed=1)}
    given[trained].requires_grad_()
    linear(**given).square().sum().backward()
    by_onednn = given[trained].grad
    given[trained].grad = None
    F.linear(given["x"], given["weight"]).square().sum().backward()
    torch.testing.assert_close(by_onednn, given[trained].grad, atol=1e-4, rtol=1e-5)
    assert given["x" if trained == "weight" else "weight"].grad is None


@NO_ONEDNN
def test_slices_and_transposed_weights() -> None:
    x, weight = random(2, 9, 24)[:, 4:, :], random(24, 40, seed=1).T
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(
    ("x", "weight"),
    [
        (random(24), random(40, 24)),
        (random(0, 24), random(40, 24)),
        (random(3, 24).double(), random(40, 24).double()),
        (random(3, 24).bfloat16(), random(40, 24).bfloat16()),
        (torch.empty(3, 24, device="meta"), torch.empty(40, 24, device="meta")),
    ],
    ids=["vector", "empty", "double", "bfloat16", "meta"],
)
def test_what_onednn_does_not_do_is_left_to_pytorch(x: torch.Tensor, weight: torch.Tensor) -> None:
    found, expected = linear(x, weight), F.linear(x, weight)
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, expected.device)
    assert found.device.type == "meta" or torch.equal(found, expected)


@NO_ONEDNN
def test_it_is_onednn_and_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, calls = random(5, 24), random(40, 24), []
    monkeypatch.setattr(F, "linear", lambda *_: calls.append(1))
    linear(x, weight)
    assert not calls
    with torch.backends.mkldnn.flags(enabled=False):
        linear(x, weight)
    assert calls


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
