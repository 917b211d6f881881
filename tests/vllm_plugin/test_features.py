"""What of vLLM works with boosted checkpoints, each feature on its own classes and on its Transformers backend."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from offline import Vllm, check_same_model
from peft import LoraConfig, get_peft_model
from tiny import WINDOW, save_tiny, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from layerboost.model.surgery import apply_plan
from layerboost.runtime import cores
from layerboost.schemas.plan import LayerPlan

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

# Attention-free, sliding with and without sinks, and full layers, first and last among them.
MODELS = {"llama": ("llama", "nSfHn"), "qwen3": ("qwen3", "SnfsS"), "smollm3": ("smollm3", "hnfsS")}
FEATURES: dict[str, dict[str, Any]] = {
    "no-prefix-caching": {"enable_prefix_caching": False},
    "compiled": {"enforce_eager": False},
    "lora": {"max_lora_rank": 8},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(root / name, *arguments) for name, arguments in MODELS.items()}


@pytest.fixture(scope="module")
def adapters(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA adapter of every linear layer, its matrices random."""
    root = tmp_path_factory.mktemp("adapters")
    for name, folder in folders.items():
        torch.manual_seed(2)
        settings = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(AutoModelForCausalLM.from_pretrained(folder), settings).save_pretrained(root / name)
    return {name: root / name for name in folders}


QUICK = {("no-prefix-caching", "llama"), ("compiled", "llama"), ("lora", "llama"), ("compiled", "smollm3")}


@pytest.mark.parametrize(
    ("feature", "name"),
    [
        pytest.param(feature, name, marks=() if (feature, name) in QUICK else pytest.mark.exhaustive)
        for feature in FEATURES
        for name in MODELS
    ],
)
def test_log_probabilities_are_those_of_transformers(
    vllm: Vllm, folders: dict[str, Path], adapters: dict[str, Path], feature: str, name: str
) -> None:
    adapter = adapters[name] if feature == "lora" else None
    found = vllm.answers(folders[name], **FEATURES[feature], adapter=str(adapter) if adapter else None)
    check_same_model(folders[name], found, adapter=adapter)


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs answer rightly without it")
def test_a_cache_manager_by_which_a_cpu_answers_wrongly_is_refused(vllm: Vllm, folders: dict[str, Path]) -> None:
    refused = vllm.answers(folders["llama"], disable_hybrid_kv_cache_manager=True)
    assert "leave --disable-hybrid-kv-cache-manager out" in refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="pipelines on a CPU")
def test_a_pipeline_that_would_fail_at_its_first_request_is_refused(vllm: Vllm, folders: dict[str, Path]) -> None:
    ways: list[dict[str, Any]] = [
        {"enforce_eager": True},
        {"enforce_eager": False, "enable_lora": True},
        {"enforce_eager": False, "optimization_level": 0},
        {"enforce_eager": False, "compilation_config": {"mode": 0}},
    ]
    for way in ways:
        refused = vllm.answers(folders["llama"], pipeline_parallel_size=2, **way)
        assert "works with torch.compile alone" in refused, way


TWO_PROCESSES = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cores()[:2])), "VLLM_CPU_CI_ENV": "0"}
PARALLEL: dict[str, dict[str, Any]] = {
    "tensor": {"tensor_parallel_size": 2},
    # Traced by Dynamo and compiled by nothing; vLLM warms up, which pipelines need.
    "pipeline": {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "compilation_config": {"mode": 2, "backend": "eager"},
    },
}


@pytest.mark.exhaustive
@pytest.mark.skipif(len(cores()) < 2, reason="two processes of vLLM need a core each")
@pytest.mark.skipif(torch.cuda.is_available(), reason="parallelism on a CPU")
@pytest.mark.parametrize(
    ("kind", "name"), [("tensor", "llama"), ("tensor", "qwen3"), ("pipeline", "llama"), ("pipeline", "smollm3")]
)
def test_two_processes_on_a_cpu(
    vllm_with: Callable[..., Vllm], folders: dict[str, Path], even: dict[str, Path], kind: str, name: str
) -> None:
    folder = even.get(name, folders[name]) if kind == "tensor" else folders[name]
    check_same_model(folder, vllm_with(**TWO_PROCESSES).answers(folder, **PARALLEL[kind]))


@pytest.fixture(scope="module")
def even(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models of which both ranks get one full KV head and one with a window."""
    root, folders = tmp_path_factory.mktemp("even"), {}
    for name in ("llama", "qwen3"):
        plan = [
            LayerPlan(layer=layer, attention="sliding", window=WINDOW, sink=sink, full_kv_heads=(0, 2))
            for layer, sink in enumerate((True, False))
        ]
        model = apply_plan(tiny_model(name, 2, num_key_value_heads=4), plan, {0: torch.randn(2)})
        model.save_pretrained(root / name)
        tiny_tokenizer().save_pretrained(root / name)
        folders[name] = root / name
    return folders


@pytest.mark.exhaustive
def test_ranks_that_would_differ_are_refused(vllm: Vllm, folders: dict[str, Path]) -> None:
    refused = vllm.answers(folders["llama"], tensor_parallel_size=2)
    assert "layer 3 keeps KV heads 0 of 2 full" in refused


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", ["tensor_parallel_size", "pipeline_parallel_size"])
@pytest.mark.parametrize("name", MODELS)
def test_two_gpus(vllm: Vllm, folders: dict[str, Path], name: str, kind: str) -> None:
    check_same_model(folders[name], vllm.answers(folders[name], **{kind: 2}))


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_fp8_weights(vllm: Vllm, folders: dict[str, Path], name: str) -> None:
    # Rounded while they are loaded; as wide a margin as int8 has.
    check_same_model(folders[name], vllm.answers(folders[name], quantization="fp8", dtype="bfloat16"), most=1.0)
