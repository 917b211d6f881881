"""int8 checkpoints on CPUs with AMX: through oneDNN, since the kernel that vLLM 0.32 prefers there fails."""

from __future__ import annotations

from functools import cache

import torch


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
