"""Bases that came quantised: vLLM's own classes read what Transformers dequantised to RUN/base."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from fp8 import to_fp8
from offline import Vllm, check_same_model
from tiny import RUNTIME, save_tiny

from layerboost.model.base import open_base
from layerboost.recipe import Recipe

pytestmark = [
    pytest.mark.server,
    pytest.mark.exhaustive,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]


@pytest.mark.parametrize("family", ["minimax_m2", "mixtral", "qwen3_moe"])
def test_a_dequantised_base_is_served(family: str, vllm: Vllm, tmp_path: Path) -> None:
    to_fp8(save_tiny(tmp_path / "model", family, layers=2))
    base = open_base(Recipe(model=str(tmp_path / "model"), device="cpu"), tmp_path / "run", RUNTIME)
    check_same_model(base.folder, vllm.answers(base.folder))
