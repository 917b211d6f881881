"""The forms of sliding attention against the naive reference, on a named grid: values, gradients, memory."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from layerboost.model import attention
from layerboost.model.attention import (
    sliding_attention,
    sliding_attention_flash,
    sliding_attention_flex,
    sliding_attention_reference,
    window_blocks,
)

SIZE, CUDA_SIZE = 8, 16  # FlexAttention compiles heads of 16 and more
# batch, query heads, key heads, queries, keys: the queries are the last positions.
SHAPES = {
    "one-head": (1, 1, 1, 50, 50),
    "heads": (2, 4, 4, 40, 40),
    "grouped": (2, 6, 2, 64, 64),
    "one-key-head": (2, 4, 1, 33, 33),
    "long": (1, 4, 2, 300, 300),
    "one-query": (2, 4, 2, 1, 30),
    "second-chunk": (2, 4, 2, 33, 40),
    "late-chunk": (2, 4, 2, 70, 170),
}
WINDOWS = {"window-1": 1, "window-7": 7, "window-16": 16, "window-100": 100, "window-beyond-text": 400}
MASKS = ("no-padding", "left-padding", "packed")
EXTRAS = {"plain": (False, None), "sink": (True, None), "softcap": (False, 1.5), "sink-softcap": (True, 1.5)}
GRID = {"-".join(names): names for names in itertools.product(SHAPES, WINDOWS, MASKS, EXTRAS)}
# On CUDA most cases are compiled apart, forward and backward, for seconds each: two for each shape.
CUDA_GRID = [
    "-".join((shape, [*WINDOWS][(row + 2 * turn) % 5], MASKS[(row + turn) % 3], [*EXTRAS][(row + 2 * turn) % 4]))
    for row, shape in enumerate(SHAPES)
    for turn in (0, 1)
]
Case = tuple[list[torch.Tensor], dict[str, Any], torch.Tensor]


def make_case(names: tuple[str, str, str, str], device: str = "cpu") -> Case:
    """Tensors that want gradients, the other arguments, and which queries see anything, `[B, Tq]`."""
    shape, window, padding, extra = names
    batch, heads, key_heads, queries, keys = SHAPES[shape]
    size = SIZE if device == "cpu" else CUDA_SIZE
    sink, softcap = EXTRAS[extra]
    torch.manual_seed(0)
    tensors = [
        torch.randn(batch, heads, queries, size, device=device) * 2,
        torch.randn(batch, key_heads, keys, size, device=device) * 2,
        torch.randn(batch, key_heads, keys, size, device=device),
    ]
    tensors += [torch.randn(heads, device=device)] if sink else []
    mask = None
    sees = torch.ones(batch, queries, dtype=torch.bool, device=device)
    if padding == "left-padding":
        mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool, device=device)
        mask[-1, :, :, :9] = False
        sees[-1] = torch.arange(keys - queries, keys, device=device) >= 9
    elif padding == "packed":  # documents of 20 tokens do not see each other
        document = torch.arange(keys, device=device) // 20
        mask = (document[keys - queries :, None] == document[None, :]).expand(batch, 1, -1, -1)
    arguments = {"window": WINDOWS[window], "mask": mask, "scaling": 0.3, "softcap": softcap}
    return [tensor.requires_grad_() for tensor in tensors], arguments, sees


def outcome(function: Callable[..., torch.Tensor], case: Case) -> list[torch.Tensor]:
    """Output and gradients of a loss over the queries that see anything."""
    tensors, arguments, sees = case
    sinks = tensors[3] if len(tensors) > 3 else None
    out = function(*tensors[:3], sinks=sinks, **arguments)
    out = out * sees[:, None, :, None]
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), tensors)]


def check(function: Callable[..., torch.Tensor], case: Case) -> None:
    names = ("out", "query", "key", "value", "sinks")
    for name, fast, slow in zip(
        names, outcome(function, case), outcome(sliding_attention_reference, case), strict=False
    ):
        torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-3, msg=f"{name} differs")


def trimmed(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A form called past `sliding_attention`, which cuts keys that no query sees."""

    def call(query: Any, key: Any, value: Any, window: int, mask: Any, **arguments: Any) -> torch.Tensor:
        keys = min(key.shape[2], query.shape[2] + window - 1)
        mask = None if mask is None else mask[..., -keys:]
        return function(query, key[:, :, -keys:], value[:, :, -keys:], window, mask=mask, **arguments)

    return call


# With a soft-cap, CPUs take the reference.
@pytest.mark.parametrize("name", [name for name in GRID if "softcap" not in name or "late-chunk" in name])
def test_sliding_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "FLASH_CHUNK", 64)  # so that the longer texts are chunked
    check(sliding_attention, make_case(GRID[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CUDA_GRID)
def test_cuda(name: str) -> None:
    """FlexAttention, compiled; the reference for single queries."""
    torch.set_float32_matmul_precision("highest")  # some images set another, and TF32 has ten bits
    check(sliding_attention, make_case(GRID[name], "cuda"))


@pytest.mark.parametrize("queries", [1, 40, 128, 129, 300, 512])
@pytest.mark.parametrize("before", [0, 1, 100, 128])
@pytest.mark.parametrize("window", [1, 7, 128, 129, 257, 1000])
def test_window_blocks_are_those_of_every_pair(queries: int, before: int, window: int) -> None:
    keys = queries + before

    def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q + before) & (k > q + before - window)

    cpu = torch.device("cpu")
    expected = create_block_mask(visible, None, None, queries, keys, cpu)
    found = window_blocks(queries, keys, window, True, cpu)
    for one, other in zip(found.as_tuple()[:-1], expected.as_tuple()[:-1], strict=True):
        same = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and torch.equal(one, other)
        assert same or one == other
    together = window_blocks(queries, keys, window, False, cpu)
    assert together.full_kv_num_blocks is None
    assert torch.equal(together.to_dense(), expected.to_dense())


@pytest.mark.parametrize("name", [name for name in GRID if "long" in name or "late-chunk" in name])
def test_values_of_flex(name: str) -> None:
    """Unfused, as far as it goes without a GPU: no gradients."""
    tensors, arguments, sees = make_case(GRID[name])
    query, key, value, *sinks = (tensor.detach() for tensor in tensors)
    found, expected = (
        function(query, key, value, sinks=sinks[0] if sinks else None, **arguments)
        for function in (trimmed(sliding_attention_flex), sliding_attention_reference)
    )
    seen = sees[:, None, :, None]
    torch.testing.assert_close(found * seen, expected * seen, atol=1e-4, rtol=1e-3)


def test_each_device_has_its_form(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for form in (sliding_attention_flash, sliding_attention_reference):

        def spy(*args: Any, form: Any = form) -> Any:
            called.append(form.__name__)
            return form(*args)

        monkeypatch.setattr(attention, form.__name__, spy)
    x = torch.randn(1, 2, 40, SIZE)
    sliding_attention(x, x, x, 8)
    sliding_attention(x, x, x, 8, softcap=2.0)
    assert called == ["sliding_attention_flash", "sliding_attention_reference"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    tensors, arguments, _ = make_case(("grouped", "window-16", "no-padding", "sink"))
    case = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
    query, key, value, sinks = case
    found = sliding_attention(query, key, value, sinks=sinks, **arguments)
    found.sum().backward()
    assert found.dtype == dtype
    assert [x.grad.dtype for x in case if x.grad is not None] == [dtype] * 4
    query, key, value, sinks = tensors
    expected = sliding_attention_reference(query, key, value, sinks=sinks, **arguments)
    torch.testing.assert_close(found.float(), expected, atol=5e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)


def test_a_large_log_sum_exp_in_half_precision() -> None:
    """Scores of 32, a log-sum-exp of 36.6, a sink of 36: bfloat16 knows 36.5."""
    query, key, value = torch.full((1, 1, 1, 8), 2.0), torch.full((1, 1, 100, 8), 2.0), torch.ones(1, 1, 100, 8)
    sinks = torch.tensor([36.0])
    expected = sliding_attention_reference(query, key, value, 100, sinks, scaling=1.0)
    query, key, value, sinks = (x.bfloat16() for x in (query, key, value, sinks))
    found = sliding_attention_reference(query, key, value, 100, sinks, scaling=1.0)
    torch.testing.assert_close(found.float(), expected, atol=0.0, rtol=1e-2)


def test_a_window_as_long_as_the_text_is_full_attention() -> None:
    query, key, value = (torch.randn(2, heads, 40, SIZE) for heads in (4, 2, 2))
    full = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(sliding_attention(query, key, value, 40), full, atol=1e-5, rtol=1e-4)


def test_memory_is_linear_in_the_text() -> None:
    """Bytes the operation allocates, forward and backward, as PyTorch's profiler counts them."""

    def bytes_per_token(tokens: int) -> float:
        query, key, value = (torch.randn(1, heads, tokens, 32, requires_grad=True) for heads in (4, 2, 2))
        with torch.profiler.profile(profile_memory=True) as profile:
            sliding_attention(query, key, value, 64).sum().backward()
        allocated: int = sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages())
        return allocated / tokens

    assert bytes_per_token(8192) < 1.1 * bytes_per_token(2048)
