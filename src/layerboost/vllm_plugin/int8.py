"""int8 checkpoints on CPUs: which of vLLM 0.32's kernels are right there."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


def int8_overflows() -> bool:
    """Return whether int8 products are wrong on this CPU: x86 without VNNI adds pairs of them in 16 bits, and oneDNN
    lets them overflow.
    """
    known = torch.cpu.get_capabilities()
    return "avx2" in known and not (known.get("avx512_vnni") or known.get("avx_vnni"))


def check_int8(config: Any) -> None:
    """Raise ValueError for int8 weights on a CPU that cannot multiply them."""
    quantised = getattr(config, "quantization_config", None) or {}
    if "int-quantized" in str(quantised) and int8_overflows():
        raise ValueError(
            "int8 checkpoints give wrong answers on this CPU, which has neither avx512_vnni nor avx_vnni: "
            "serve the checkpoint they were made from, or use another machine"
        )


@cache
def int8_through_onednn() -> None:
    """Have this process's int8 layers take vLLM's oneDNN kernel, as they do on CPUs without AMX. Of no effect on GPUs.

    With AMX vLLM takes `int8_scaled_mm_with_quant`, which refuses float32 activations ("expect A to be bfloat16 or
    half") and the three dimensions of its own Transformers backend ("mat1 must be a 2D tensor").
    """
    try:
        from vllm.model_executor.kernels.linear.scaled_mm import cpu

        stock = cpu.check_cpu_sgl_kernel
    except (ImportError, AttributeError):  # another version, without that choice
        return
    cpu.check_cpu_sgl_kernel = lambda n, k, dtype: dtype != torch.int8 and stock(n, k, dtype)
