"""Bases that came quantised: vLLM's own classes read what Transformers dequantised to RUN/base."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from fp8 import to_fp8
from offline import Vllm, check_same_model
from tiny import RUNTIME, save_tiny

from layerboost.model.base import open_base
from layerboost.model.families import FAMILIES
from layerboost.recipe import Recipe

pytestmark = [
    pytest.mark.server,
    pytest.mark.exhaustive,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


def dequantised(folder: Path, family: str) -> Path:
    to_fp8(save_tiny(folder / "model", family, layers=2))
    return open_base(Recipe(model=str(folder / "model"), device="cpu"), folder / "run", RUNTIME).folder


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_dequantised_base_is_served(family: str, vllm: Vllm, tmp_path: Path) -> None:
    folder = dequantised(tmp_path, family)
    check_same_model(folder, vllm.answers(folder))


@pytest.mark.skipif(torch.cuda.is_available(), reason="what vLLM lacks on CPUs")
@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if row.base_lacks])
def test_vllm_still_lacks_what_a_stock_base_needs(family: str, vllm: Vllm, tmp_path: Path) -> None:
    """When this fails, vLLM serves it: drop the row's `base_lacks`, and serve the base in the test above."""
    assert vllm.answers(dequantised(tmp_path, family)) == "AssertionError: "  # of its router, without words
