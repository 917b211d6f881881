from __future__ import annotations

import itertools

import pytest
import torch

from layerboost.model.attention import sliding_attention, sliding_attention_reference

LENGTHS = [(50, 50), (16, 16), (64, 64), (33, 40), (1, 30), (20, 27), (5, 90)]


def inputs(queries: int, keys: int, groups: int = 2) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(2, 2 * groups, queries, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 8)


@pytest.mark.parametrize("window", [1, 4, 7, 16, 200])
@pytest.mark.parametrize(("queries", "keys"), LENGTHS)
@pytest.mark.parametrize("sink", [False, True])
def test_sliding_equals_reference(window: int, queries: int, keys: int, sink: bool) -> None:
    query, key, value = inputs(queries, keys)
    sinks = torch.randn(4) if sink else None
    fast = sliding_attention(query, key, value, window, sinks)
    torch.testing.assert_close(
        fast, sliding_attention_reference(query, key, value, window, sinks), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(("window", "sink"), itertools.product([4, 16], [False, True]))
def test_left_padding(window: int, sink: bool) -> None:
    query, key, value = inputs(40, 40)
    mask = torch.ones(40, 40, dtype=torch.bool).tril().expand(2, 1, 40, 40).clone()
    mask[1, :, :, :9] = False
    sinks = torch.randn(4) if sink else None
    fast = sliding_attention(query, key, value, window, sinks, mask)
    slow = sliding_attention_reference(query, key, value, window, sinks, mask)
    torch.testing.assert_close(fast[0], slow[0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fast[1, :, 9:], slow[1, :, 9:], atol=1e-5, rtol=1e-4)
    assert fast.isfinite().all()


def test_packed_documents_do_not_see_each_other() -> None:
    query, key, value = inputs(48, 48)
    document = torch.arange(48) // 20
    mask = (document[:, None] == document[None, :])[None, None].expand(2, 1, 48, 48)
    fast = sliding_attention(query, key, value, 8, None, mask)
    torch.testing.assert_close(
        fast, sliding_attention_reference(query, key, value, 8, None, mask), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("groups", [1, 3])
def test_gradients(groups: int) -> None:
    tensors = [x.requires_grad_() for x in inputs(40, 40, groups)]
    sinks = torch.randn(2 * groups, requires_grad=True)
    found = []
    for function in (sliding_attention, sliding_attention_reference):
        function(*tensors, 8, sinks).square().sum().backward()
        found.append([x.grad.clone() for x in (*tensors, sinks)])
        for x in (*tensors, sinks):
            x.grad = None
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-3)


def test_a_window_as_long_as_the_text_is_full_attention() -> None:
    query, key, value = inputs(40, 40)
    full = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(sliding_attention(query, key, value, 40), full, atol=1e-5, rtol=1e-4)
