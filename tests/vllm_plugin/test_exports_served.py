"""Exports under vLLM with its plugins off: its log-probabilities against those of the boosted checkpoint."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from offline import Vllm, check_same_model
from smollm2 import RUNTIME, boosted_default
from tiny import boosted, info, layer_plans, tiny_tokenizer
from vllm_offline import BLOCK_SIZE, KV_CACHE_BYTES

from layerboost.exporting.stage import run_export
from layerboost.exporting.targets import TARGETS
from layerboost.model.base import find_model
from layerboost.model.checkpoint import save_boosted
from layerboost.schemas.plan import PlanFile

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("decilm", "llama", "fnfn", {"tie_word_embeddings": True}),
    "biases": ("decilm", "llama", "fnnf", {"attention_bias": True, "mlp_bias": True, "rope_parameters": ROPE}),
    "all-full": ("decilm", "llama", "ff", {}),
    "qwen2": ("decilm", "qwen2", "fnf", {}),
    "decilm-windows": ("decilm", "llama", "sfnsf", {}),
    "decilm-windows-qwen2": ("decilm", "qwen2", "fsn", {}),
    "windows": ("granite-swa", "llama", "nfSsn", {"tie_word_embeddings": True}),
    "windows-biases": ("granite-swa", "llama", "fSns", {"attention_bias": True, "mlp_bias": True}),
    "windows-mistral": ("granite-swa", "mistral", "fSns", {}),
    "windows-ministral": ("granite-swa", "ministral", "Sfnf", {}),
    "windows-qwen2": ("granite-swa", "qwen2", "fSns", {}),
    "windows-smollm3": ("granite-swa", "smollm3", "SsfnS", {}),
    "windows-phi3": ("granite-swa", "phi3", "fSns", {}),
    "windows-granite": ("granite-swa", "granite", "nSfs", {}),
}


def test_cases_cover_every_family() -> None:
    for name, target in TARGETS.items():
        if "vLLM" not in target.runs:  # tests/exporting/
            continue
        assert {family for to, family, _, _ in CASES.values() if to == name} == set(target.families)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_the_boosted_checkpoint(
    vllm_with: Callable[..., Vllm], tmp_path: Path, case: str
) -> None:
    to, family, letters, changes = CASES[case]
    boosted_folder, exported = tmp_path / "boosted", tmp_path / "exported"
    plan = PlanFile(model=info(len(letters)), method="by hand", layers=layer_plans(letters))
    model = boosted(letters, family, **changes)
    save_boosted(model, tiny_tokenizer(), plan, boosted_folder, recipe_yaml="schema_version: 1\n")
    run_export(boosted_folder, to, exported)
    found = vllm_with(VLLM_PLUGINS="").answers(exported, trust_remote_code=to == "decilm")
    check_same_model(boosted_folder, found)
    layers = letters.count("f")
    assert set(letters) != {"f", "n"} or found[
        "blocks"
    ] * BLOCK_SIZE * layers * info().kv_bytes_per_token == pytest.approx(KV_CACHE_BYTES, rel=0.02)


@pytest.mark.real
@pytest.mark.exhaustive
@pytest.mark.parametrize("to", ["granite-swa", "decilm"])
def test_log_probabilities_are_those_of_the_real_model(vllm_with: Callable[..., Vllm], tmp_path: Path, to: str) -> None:
    folder = boosted_default(tmp_path, sinks=to == "granite-swa", heads=False)
    run_export(folder, to, tmp_path / "exported")
    ids = find_model(str(folder), RUNTIME).tokenizer(Path(__file__).read_text())["input_ids"]
    asked = [
        ids[start : start + length] for start, length in ((0, 3), (30, 63), (60, 64), (90, 65), (0, 129), (0, 300))
    ]
    options = {"trust_remote_code": to == "decilm", "max_model_len": 512, "kv_cache_memory_bytes": KV_CACHE_BYTES << 3}
    check_same_model(folder, vllm_with(VLLM_PLUGINS="").answers(tmp_path / "exported", asked, **options), asked)
