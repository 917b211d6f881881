"""Real vLLM: its log-probabilities against Transformers', and real servers started, benchmarked and stopped."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from offline import check_same_model, vllm_answers
from tiny import info, layer_plans, save_tiny, tiny_model
from vllm_offline import BATCHED_TOKENS, BLOCK_SIZE, KV_CACHE_BYTES

from layerboost.errors import ConfigError, LayerboostError
from layerboost.model.families import FAMILIES
from layerboost.model.memory import Engine, admission_bytes, block_bytes
from layerboost.model.modeling import base_layer_types
from layerboost.model.surgery import native_window
from layerboost.recipe import Bench, parse_recipe
from layerboost.serving.command import check_port
from layerboost.serving.server import running_server
from layerboost.stages.bench import run_bench

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

# First, middle and last layer of every kind; no full layer at all; a single layer with attention.
CASES = {
    "first-and-last-none": ("llama", "nfsSn"),
    "no-full": ("llama", "sSnS"),
    "qwen3": ("qwen3", "SnfsS"),
    "one-left": ("qwen2", "fnnn"),
    "olmo2": ("olmo2", "nsSf"),
    "smollm3": ("smollm3", "fnSs"),
    "granite": ("granite", "nfSs"),
    "padded": ("llama", "ffsfSsS"),
    "mistral": ("mistral", "nSfs"),
    "ministral": ("ministral", "nfSf"),
    "phi3": ("phi3", "fSns"),
    "gemma2": ("gemma2", "fSnf"),
    "gemma3_text": ("gemma3_text", "ffSnff"),
    "olmo3": ("olmo3", "nffSff"),
    "cohere2": ("cohere2", "nffSff"),
}
REFUSED = ("llama", "nn")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Per case: the checkpoint and what vLLM makes of it. One process for all, importing vLLM being slow."""
    root = tmp_path_factory.mktemp("served")
    folders = {
        case: str(save_tiny(root / case, *arguments)) for case, arguments in {**CASES, "refused": REFUSED}.items()
    }
    prefixes = {"no-full": {"prefix_tokens": 96}, "long": {"prefix_tokens": 1100}}
    folders["long"] = str(save_tiny(root / "long", "llama", "fsSn", max_position_embeddings=2048))
    engines = {case: {"model": folder} | prefixes.get(case, {}) for case, folder in folders.items()}
    answers = vllm_answers(engines, root)
    return {case: (folder, answers[case]) for case, folder in folders.items()}


def test_cases_cover_every_family_that_vllm_serves() -> None:
    assert {family for family, _ in CASES.values()} == {name for name, family in FAMILIES.items() if family.vllm}


@pytest.mark.parametrize("case", CASES)
def test_log_probabilities_are_those_of_transformers(served: dict[str, Any], case: str) -> None:
    check_same_model(*served[case])


@pytest.mark.parametrize("case", CASES)
def test_the_memory_model_says_what_vllm_does(served: dict[str, Any], case: str) -> None:
    family, letters = CASES[case]
    layers, engine, base = layer_plans(letters), Engine(BATCHED_TOKENS, BLOCK_SIZE, 1), tiny_model(family, len(letters))
    slides = [index for index, kind in enumerate(base_layer_types(base.config)) if kind == "sliding_attention"]
    model = info(len(letters)).model_copy(
        update={"sliding_layers": slides, "sliding_window": native_window(base.config)}
    )
    blocks = KV_CACHE_BYTES // block_bytes(model, layers, engine)
    assert served[case][1]["blocks"] == blocks
    request = admission_bytes(model, layers, 512, engine)
    assert served[case][1]["concurrency"] == pytest.approx(blocks * block_bytes(model, layers, engine) / request)


def test_the_second_request_finds_the_prefix_of_the_first(served: dict[str, Any]) -> None:
    assert served["no-full"][1]["cached_of_prefix"] == 96
    assert served["long"][1]["cached_of_prefix"] == 1024


def test_a_model_without_any_attention_is_refused(served: dict[str, Any]) -> None:
    assert "without any attention: keep one of layers 0 to 1 full or sliding" in served["refused"][1]


def small_bench(port: int, **changes: Any) -> dict[str, Any]:
    small = {
        "concurrency": [1],
        "requests_per_concurrency": 2,
        "repeats": 1,
        "input_tokens": 48,
        "output_tokens": 8,
        "kv_cache_gib": 0.25,
    }
    return {"bench": {**small, "port": port, "startup_timeout_s": 300, **changes}}


def test_bench_measures_both_models_and_leaves_nothing_running(
    tmp_path: Path, free_port: int, survivors: Callable[[float], list[str]]
) -> None:
    models = {
        "base": save_tiny(tmp_path / "base", "llama", ""),
        "healed": save_tiny(tmp_path / "healed", "llama", "nSnf"),
    }
    recipe = parse_recipe(small_bench(free_port), "test")
    comparison = run_bench(recipe, tmp_path / "run", models)

    assert survivors(2) == []
    check_port(free_port)
    assert comparison["complete"]
    for name in models:
        raw = json.loads((tmp_path / "run" / "bench" / f"{name}-c1-r0.json").read_text())
        metrics = comparison["results"][0]["models"][name]
        assert raw["completed"] == 2
        assert raw["total_output_tokens"] == 16
        assert metrics["output_tokens_per_s"]["median"] == raw["output_throughput"]
        assert metrics["ttft_ms_p99"]["median"] == raw["p99_ttft_ms"]
        assert metrics["peak_rss_gib"]["median"] > 0.1
    assert comparison["results"][0]["ratios"]["healed"]["kv_cache_tokens"]["median"] > 1

    # A second call finds everything there; other lengths are refused.
    assert run_bench(recipe, tmp_path / "run", models) == comparison
    with pytest.raises(ConfigError, match=r"bench\.output_tokens was 8, is 9"):
        run_bench(parse_recipe(small_bench(free_port, output_tokens=9), "test"), tmp_path / "run", models)


def test_a_server_that_dies_says_why(tmp_path: Path, free_port: int, survivors: Callable[[float], list[str]]) -> None:
    folder = save_tiny(tmp_path / "model", "llama", "nf")
    bench = Bench.model_validate(small_bench(free_port, server_args=["--no-such-option"])["bench"])
    log_file = tmp_path / "server.log"
    with (
        pytest.raises(LayerboostError, match=r"vLLM died while serving it\n.*--no-such-option") as raised,
        running_server("it", folder, bench, log_file),
    ):
        raise AssertionError("it answered")
    assert raised.value.exit_code == 1
    assert str(log_file) in str(raised.value)
    assert survivors(2) == []
