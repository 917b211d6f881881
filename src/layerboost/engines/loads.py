"""The prompts of a load, and its throughput and latency, for engines without a load generator of their own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from layerboost.engines.protocol import Load

# Special tokens usually have the first ids.
FIRST_TOKEN = 3


def prompts(load: Load, vocabulary: int) -> torch.Tensor:
    """Return random prompts `[requests, shared prefix + input]`, the same for every model with this vocabulary."""
    draw = torch.Generator().manual_seed(load.seed)
    prefix = torch.randint(FIRST_TOKEN, vocabulary, (1, load.shared_prefix_tokens), generator=draw)
    own = torch.randint(FIRST_TOKEN, vocabulary, (load.requests, load.input_tokens), generator=draw)
    return torch.cat([prefix.expand(load.requests, -1), own], 1)


def latencies(answered: Sequence[Sequence[float]], duration_s: float) -> dict[str, float]:
    """Return throughput and latency under the names of `vllm bench serve`.

    `answered`: for each request, the time of each of its tokens in seconds since it was sent; `duration_s`: of all.
    """
    tokens = sum(len(times) for times in answered)

    def spread(name: str, values: Sequence[float]) -> dict[str, float]:
        ms = np.array(values or [0.0]) * 1e3
        return {f"median_{name}_ms": float(np.median(ms)), f"p99_{name}_ms": float(np.percentile(ms, 99))}

    return {
        "completed": len(answered),
        "duration": float(duration_s),
        "total_output_tokens": tokens,
        "request_throughput": float(len(answered) / duration_s),
        "output_throughput": float(tokens / duration_s),
        **spread("ttft", [times[0] for times in answered]),
        **spread("tpot", [(times[-1] - times[0]) / max(len(times) - 1, 1) for times in answered]),
        **spread("e2el", [times[-1] for times in answered]),
        **spread("itl", [float(gap) for times in answered for gap in np.diff(times)]),
    }
