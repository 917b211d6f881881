"""What of vLLM works with boosted checkpoints, each feature on its own classes and on its Transformers backend."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from offline import check_same_model, vllm_answers
from peft import LoraConfig, get_peft_model
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from layerboost.serving.command import cores

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

# Attention-free, sliding with and without sinks, and full layers, first and last among them.
MODELS = {"llama": ("llama", "nSfsn"), "qwen3": ("qwen3", "SnfsS"), "smollm3": ("smollm3", "SnfsS")}
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


@pytest.fixture(scope="module")
def served(folders: dict[str, Path], adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    engines = {
        f"{feature} {name}": {"model": str(folder), **options}
        | ({"adapter": str(adapters[name])} if feature == "lora" else {})
        for feature, options in FEATURES.items()
        for name, folder in folders.items()
    }
    # With this, vLLM has Dynamo trace the model and Inductor compile nothing.
    return vllm_answers(engines, tmp_path_factory.mktemp("served"), VLLM_CPU_CI_ENV="1")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("feature", FEATURES)
def test_log_probabilities_are_those_of_transformers(
    folders: dict[str, Path], adapters: dict[str, Path], served: dict[str, Any], feature: str, name: str
) -> None:
    check_same_model(folders[name], served[f"{feature} {name}"], adapter=adapters[name] if feature == "lora" else None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="GPUs answer rightly without it")
def test_a_cache_manager_by_which_a_cpu_answers_wrongly_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    engine = {"model": str(folders["llama"]), "disable_hybrid_kv_cache_manager": True}
    refused = vllm_answers({"llama": engine}, tmp_path)["llama"]
    assert "leave --disable-hybrid-kv-cache-manager out" in refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="pipelines on a CPU")
def test_a_pipeline_that_would_fail_at_its_first_request_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    ways: list[dict[str, Any]] = [
        {"enforce_eager": True},
        {"enforce_eager": False, "enable_lora": True},
        {"enforce_eager": False, "optimization_level": 0},
        {"enforce_eager": False, "compilation_config": {"mode": 0}},
    ]
    engines = {str(way): {"model": str(folders["llama"]), "pipeline_parallel_size": 2, **way} for way in ways}
    for way, refused in vllm_answers(engines, tmp_path, VLLM_CPU_OMP_THREADS_BIND="nobind").items():
        assert "works with torch.compile alone" in refused, way


@pytest.mark.skipif(len(cores()) < 2, reason="two processes of vLLM need a core each")
@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes of vLLM need a GPU each")
def test_tensor_parallelism(folders: dict[str, Path], tmp_path: Path) -> None:
    engines = {name: {"model": str(folders[name]), "tensor_parallel_size": 2} for name in ("llama", "qwen3")}
    found = vllm_answers(engines, tmp_path, VLLM_CPU_OMP_THREADS_BIND="|".join(map(str, cores()[:2])))
    for name, answers in found.items():
        check_same_model(folders[name], answers)


@pytest.mark.skipif(len(cores()) < 2, reason="two processes of vLLM need a core each")
@pytest.mark.skipif(torch.cuda.is_available(), reason="pipelines on a CPU")
def test_pipeline_parallelism_on_a_cpu(folders: dict[str, Path], tmp_path: Path) -> None:
    # Traced by Dynamo and compiled by nothing; unlike under VLLM_CPU_CI_ENV, vLLM warms up.
    options = {
        "pipeline_parallel_size": 2,
        "enforce_eager": False,
        "compilation_config": {"mode": 2, "backend": "eager"},
    }
    engines = {name: {"model": str(folders[name]), **options} for name in ("llama", "smollm3")}
    found = vllm_answers(engines, tmp_path, VLLM_CPU_OMP_THREADS_BIND="|".join(map(str, cores()[:2])))
    for name, answers in found.items():
        check_same_model(folders[name], answers)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", MODELS)
def test_pipeline_parallelism(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    options = {"model": str(folders[name]), "pipeline_parallel_size": 2}
    check_same_model(folders[name], vllm_answers({name: options}, tmp_path)[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", MODELS)
def test_fp8_weights(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    # Rounded while they are loaded; as wide a margin as int8 has.
    options = {"model": str(folders[name]), "quantization": "fp8", "dtype": "bfloat16"}
    check_same_model(folders[name], vllm_answers({name: options}, tmp_path)[name], most=1.0)
