"""Compat exports under vLLM with its plugins off: its log-probabilities against those of the exported checkpoint."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from offline import Vllm, check_same_model
from tiny import boosted, info, layer_plans, tiny_tokenizer
from vllm_offline import BLOCK_SIZE, KV_CACHE_BYTES

from layerboost.model.checkpoint import save_boosted
from layerboost.model.compat import LLAMA_SHAPED, export_compat
from layerboost.schemas.plan import PlanFile

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "fnfn", {"tie_word_embeddings": True}),
    "biases": ("llama", "fnnf", {"attention_bias": True, "mlp_bias": True, "rope_parameters": ROPE}),
    "all-full": ("llama", "ff", {}),
    "qwen2": ("qwen2", "fnf", {}),
}


def test_cases_cover_every_family() -> None:
    assert {family for family, _, _ in CASES.values()} == LLAMA_SHAPED.keys()


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_the_boosted_checkpoint(
    vllm_with: Callable[..., Vllm], tmp_path: Path, case: str
) -> None:
    family, letters, changes = CASES[case]
    boosted_folder, compat = tmp_path / "boosted", tmp_path / "compat"
    plan = PlanFile(model=info(len(letters)), method="by hand", layers=layer_plans(letters))
    model = boosted(letters, family, **changes)
    save_boosted(model, tiny_tokenizer(), plan, boosted_folder, recipe_yaml="schema_version: 1\n")
    export_compat(boosted_folder, compat)
    found = vllm_with(VLLM_PLUGINS="").answers(compat, trust_remote_code=True)
    check_same_model(boosted_folder, found)
    layers = letters.count("f")
    assert found["blocks"] * BLOCK_SIZE * layers * info().kv_bytes_per_token == pytest.approx(KV_CACHE_BYTES, rel=0.02)
