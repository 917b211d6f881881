"""Real vLLM: its log-probabilities and memory against Transformers and our arithmetic, and one real server."""

from __future__ import annotations

import importlib.util
import json
import urllib.request
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest
from offline import Vllm, check_same_model
from tiny import info, layer_plans, save_tiny, tiny_model
from vllm_offline import BATCHED_TOKENS, BLOCK_SIZE, KV_CACHE_BYTES

from layerboost.costs.memory import CacheSettings, admission_bytes, block_bytes
from layerboost.engines.protocol import Load
from layerboost.engines.server import Server, check_port
from layerboost.engines.vllm_server import launched
from layerboost.errors import LayerboostError
from layerboost.model.families import FAMILIES
from layerboost.model.modeling import base_layer_types
from layerboost.model.surgery import native_window
from layerboost.recipe import Bench
from layerboost.runtime import GIB
from layerboost.schemas.benchmark import metrics_of

pytestmark = pytest.mark.server

# First, middle and last layer of every kind; no full layer at all; a single layer with attention.
FAMILY_PLANS = {
    "nSfs": (
        "mistral cohere stablelm arcee gemma glm4 hunyuan_v1_dense hyperclovax ministral3 nemotron seed_oss "
        "qwen3_moe mixtral granitemoe minimax_m2 dots1 flex_olmo phimoe"
    ),
    "fSns": "phi3 phi ernie4_5 helium nanochat starcoder2 qwen2_moe granitemoeshared ernie4_5_moe solar_open",
    "fnSs": "smollm3 apertus glm jais2 olmo olmoe glm4_moe hunyuan_v1_moe hy_v3",
    "nffSff": "olmo3 cohere2 exaone4",
    "SnfsS": "qwen3",
    "nsSf": "olmo2",
    "nfSs": "granite",
    "nfSf": "ministral",
    "fSnf": "gemma2",
    "ffSnff": "gemma3_text",
    "fffnS": "cwm",
    "fnfS": "vaultgemma",
    "ffnSff": "afmoe",
    "Sfnfs": "cohere2_moe",
    "fSfnfs": "exaone_moe",
    "Sfnfsf": "mellum",
}
CASES = {family: (family, letters) for letters, families in FAMILY_PLANS.items() for family in families.split()} | {
    "first-and-last-none": ("llama", "nfsSn"),
    "no-full": ("llama", "sSnS"),
    "one-left": ("qwen2", "fnnn"),
    "padded": ("llama", "ffsfSsS"),
    "mlps": ("llama", "tuzfom"),
    "mlps-qwen3": ("qwen3", "tfouz"),
    "mlps-backend": ("smollm3", "ftuom"),
    "heads": ("llama", "nHfsh"),
    "heads-alone": ("qwen3", "hHhH"),
    "heads-backend": ("smollm3", "fHnh"),
    "heads-gemma2": ("gemma2", "fHfh"),
}
# Of every kind of attention on vLLM's own classes and on its Transformers backend; the others in `make test-all`.
QUICK = {"padded", "no-full", "qwen3", "gemma3_text", "heads", "heads-alone", "heads-backend"}
EACH_CASE = [pytest.param(case, marks=() if case in QUICK else pytest.mark.exhaustive) for case in CASES]
Served = Callable[[str], tuple[Path, Any]]


@pytest.fixture(scope="module")
def served(vllm: Vllm, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A case's checkpoint, and what vLLM makes of it."""
    root = tmp_path_factory.mktemp("served")

    @cache
    def serve(case: str) -> tuple[Path, Any]:
        folder = save_tiny(root / case, *CASES[case])
        return folder, vllm.answers(folder, prefix_tokens=96 if case == "no-full" else 0)

    return serve


def test_cases_cover_every_family_that_vllm_serves() -> None:
    assert {family for family, _ in CASES.values()} == {name for name, family in FAMILIES.items() if family.vllm}


@pytest.mark.parametrize("case", EACH_CASE)
def test_log_probabilities_are_those_of_transformers(served: Served, case: str) -> None:
    check_same_model(*served(case))


@pytest.mark.parametrize("case", EACH_CASE)
def test_the_memory_model_says_what_vllm_does(served: Served, case: str) -> None:
    family, letters = CASES[case]
    layers, engine, base = (
        layer_plans(letters),
        CacheSettings(BATCHED_TOKENS, BLOCK_SIZE, 1),
        tiny_model(family, len(letters)),
    )
    slides = [index for index, kind in enumerate(base_layer_types(base.config)) if kind == "sliding_attention"]
    model = info(len(letters)).model_copy(
        update={"sliding_layers": slides, "sliding_window": native_window(base.config)}
    )
    blocks = KV_CACHE_BYTES // block_bytes(model, layers, engine)
    found = served(case)[1]
    assert found["blocks"] == blocks
    request = admission_bytes(model, layers, 512, engine)
    assert found["concurrency"] == pytest.approx(blocks * block_bytes(model, layers, engine) / request)


def test_the_second_request_finds_the_prefix_of_the_first(served: Served, vllm: Vllm, tmp_path: Path) -> None:
    assert served("no-full")[1]["cached_of_prefix"] == 96
    long = save_tiny(tmp_path / "long", "llama", "fsSn", max_position_embeddings=2048)
    assert vllm.answers(long, prefix_tokens=1100)["cached_of_prefix"] == 1024


def test_a_model_without_any_attention_is_refused(vllm: Vllm, tmp_path: Path) -> None:
    refused = vllm.answers(save_tiny(tmp_path / "refused", "llama", "nn"))
    assert "without any attention: keep one of layers 0 to 1 full or sliding" in refused


SETTINGS = {"concurrency": [1, 2], "input_tokens": 48, "output_tokens": 8, "kv_cache_gib": 0.25}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_real_server_answers_loads_survives_an_aborted_request_and_is_missed_when_killed(
    tmp_path: Path, free_port: int, survivors: Callable[[float], list[str]]
) -> None:
    folder = save_tiny(tmp_path / "model", "llama", "nSnf")
    bench = Bench.model_validate({**SETTINGS, "port": free_port, "startup_timeout_s": 300})
    with launched("it", folder, bench, tmp_path / "server.log") as running:
        server, cache = running.server, running.cache
        assert cache
        assert cache.bytes == GIB // 4
        # 0.25 GiB of one full and one sliding layer of 2 heads of 32 numbers in float32.
        assert cache.tokens > 100_000
        for concurrency in bench.concurrency:
            load = Load(concurrency, 4, 0, bench.input_tokens, bench.output_tokens, seed=concurrency)
            counted: list[float] = []
            answer = running.answer(load, counted.append)
            raw = answer.raw
            assert (raw["completed"], raw["total_output_tokens"], sum(counted)) == (4, 32, 32)
            assert metrics_of(raw)["output_tokens_per_s"] == raw["output_throughput"]
            assert answer.metrics["peak_rss_gib"] > 0.1
            assert answer.metrics["kv_cache_tokens"] == cache.tokens

        abort_a_request(server)
        assert running.answer(load, counted.append).raw["completed"] == 4
        assert sum(server.metrics()["vllm:num_requests_running"]) == 0

        for process in psutil.Process(server.process.pid).children(recursive=True):
            process.kill()
        with pytest.raises(LayerboostError, match="vLLM died while serving it"):
            server.check_alive(60)
    assert survivors(2) == []
    check_port(free_port)


def abort_a_request(server: Server) -> None:
    """Ask for a long answer and hang up when it has begun."""
    body = {"model": str(server.folder), "prompt": [5] * 20, "max_tokens": 400, "ignore_eos": True, "stream": True}
    request = urllib.request.Request(
        f"{server.url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert answer.readline().startswith(b"data:")


@pytest.mark.exhaustive
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_server_that_dies_says_why(tmp_path: Path, free_port: int, survivors: Callable[[float], list[str]]) -> None:
    folder = save_tiny(tmp_path / "model", "llama", "nf")
    bench = Bench(**SETTINGS, port=free_port, server_args=("--no-such-option",))
    log_file = tmp_path / "server.log"
    with (
        pytest.raises(LayerboostError, match=r"vLLM died while serving it\n.*--no-such-option") as raised,
        launched("it", folder, bench, log_file),
    ):
        raise AssertionError("it answered")
    assert raised.value.exit_code == 1
    assert str(log_file) in str(raised.value)
    assert survivors(2) == []
