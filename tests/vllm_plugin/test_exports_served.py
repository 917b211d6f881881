"""Exports under vLLM, its plugins off and no layerboost to import: log-probabilities are the boosted checkpoint's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from exported import BIASES, DYNAMIC, FACTOR, LINEAR, LLAMA3, TIED, YARN, check_cases
from offline import Vllm, check_same_model
from smollm2 import boosted_default
from tiny import RUNTIME, boosted, info, plan_file, save_checkpoint
from vllm_offline import BLOCK_SIZE, KV_CACHE_BYTES

from layerboost.exporting.stage import run_export
from layerboost.exporting.targets import TARGETS
from layerboost.model.base import find_model

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

# By format: the family, layers and settings.
CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama": ("decilm", "llama", "fnfn", TIED),
    "biases": ("decilm", "llama", "fnnf", BIASES | {"rope_parameters": LINEAR}),
    "all-full": ("decilm", "llama", "ff", {"rope_parameters": DYNAMIC}),
    "qwen2": ("decilm", "qwen2", "fnf", {"rope_parameters": FACTOR}),
    "thinned": ("decilm", "llama", "tfou", {"rope_parameters": LLAMA3}),
    "thinned-qwen2": ("decilm", "qwen2", "futo", {"rope_parameters": YARN}),
    "decilm-windows": ("decilm", "llama", "sfnsf", {}),
    "decilm-windows-qwen2": ("decilm", "qwen2", "fsn", {}),
    "windows": ("granite-swa", "llama", "nfSsn", TIED),
    "windows-biases": ("granite-swa", "llama", "fSns", BIASES | {"rope_parameters": LINEAR}),
    "windows-mistral": ("granite-swa", "mistral", "fSns", {"rope_parameters": LLAMA3}),
    "windows-ministral": ("granite-swa", "ministral", "Sfnf", {"rope_parameters": YARN}),
    "windows-qwen2": ("granite-swa", "qwen2", "fSns", {"rope_parameters": FACTOR}),
    "windows-smollm3": ("granite-swa", "smollm3", "SsfnS", {}),
    "windows-phi3": ("granite-swa", "phi3", "fSns", {}),
    "windows-granite": ("granite-swa", "granite", "nSfs", {"rope_parameters": DYNAMIC}),
}


def test_cases_have_all_that_the_formats_claim() -> None:
    for name, target in TARGETS.items():
        if "vLLM" in target.runs:  # others: tests/exporting/
            check_cases(target, [case[1:] for case in CASES.values() if case[0] == name])


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_the_boosted_checkpoint(stock_vllm: Vllm, tmp_path: Path, case: str) -> None:
    to, family, letters, changes = CASES[case]
    boosted_folder, exported = tmp_path / "boosted", tmp_path / "exported"
    save_checkpoint(boosted_folder, boosted(letters, family, **changes), plan_file(letters))
    run_export(boosted_folder, to, exported)
    found = stock_vllm.answers(exported, trust_remote_code=to == "decilm")
    check_same_model(boosted_folder, found)
    layers = letters.count("f")
    assert set(letters) != {"f", "n"} or found[
        "blocks"
    ] * BLOCK_SIZE * layers * info().kv_bytes_per_token == pytest.approx(KV_CACHE_BYTES, rel=0.02)


@pytest.mark.real
@pytest.mark.exhaustive
@pytest.mark.parametrize("to", ["granite-swa", "decilm"])
def test_log_probabilities_are_those_of_the_real_model(stock_vllm: Vllm, tmp_path: Path, to: str) -> None:
    folder = boosted_default(tmp_path, sinks=to == "granite-swa", heads=False)
    run_export(folder, to, tmp_path / "exported")
    ids = find_model(str(folder), RUNTIME).tokenizer(Path(__file__).read_text())["input_ids"]
    asked = [
        ids[start : start + length] for start, length in ((0, 3), (30, 63), (60, 64), (90, 65), (0, 129), (0, 300))
    ]
    options = {"trust_remote_code": to == "decilm", "max_model_len": 512, "kv_cache_memory_bytes": KV_CACHE_BYTES << 3}
    check_same_model(folder, stock_vllm.answers(tmp_path / "exported", asked, **options), asked)
