"""Compat exports under vLLM with its plugins off: its log-probabilities against those of the exported checkpoint."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from offline import check_same_model, vllm_answers
from tiny import boosted, info, layer_plans, tiny_tokenizer
from vllm_offline import BLOCK_SIZE, KV_CACHE_BYTES

from layerboost.artifacts import PlanFile
from layerboost.model.checkpoint import save_boosted
from layerboost.model.compat import LLAMA_SHAPED, export_compat

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


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, Any]]:
    """Per case: the boosted checkpoint and what vLLM, without layerboost, makes of its export."""
    root = tmp_path_factory.mktemp("compat")
    engines = {}
    for case, (family, letters, changes) in CASES.items():
        plan = PlanFile(model=info(len(letters)), method="by hand", layers=layer_plans(letters))
        model = boosted(letters, family, **changes)
        save_boosted(model, tiny_tokenizer(), plan, root / case, recipe_yaml="schema_version: 1\n")
        export_compat(root / case, root / f"{case}-compat")
        engines[case] = {"model": str(root / f"{case}-compat"), "trust_remote_code": True}
    found = vllm_answers(engines, root, VLLM_PLUGINS="")
    return {case: (str(root / case), found[case]) for case in engines}


def test_cases_cover_every_family() -> None:
    assert {family for family, _, _ in CASES.values()} == LLAMA_SHAPED.keys()


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_the_boosted_checkpoint(served: dict[str, Any], case: str) -> None:
    folder, found = served[case]
    check_same_model(folder, found)
    layers = CASES[case][1].count("f")
    assert found["blocks"] * BLOCK_SIZE * layers * info().kv_bytes_per_token == pytest.approx(KV_CACHE_BYTES, rel=0.02)
