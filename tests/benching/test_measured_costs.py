"""A machine's rates: what is refused before an engine starts, and what the times are fitted to."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import byte_level_tokenizer, info, plan_file, save_tiny, tiny_model

from layerboost.benching.costs import BATCHES, LOADS, Timed, fit, plans, run_costs
from layerboost.costs.budget import Costs, Rates, decode_work, prefill_work, read_costs
from layerboost.errors import ConfigError
from layerboost.model.base import find_model
from layerboost.runtime import Runtime
from layerboost.schemas.artifact import write_json
from layerboost.schemas.plan import write_plan
from layerboost.schemas.run import PLAN
from layerboost.tables import costs_rows

RATES = Rates(
    step_ms=2.0,
    layer_ms=0.1,
    weight_bytes_per_s=1e9,
    flops_per_s=1e10,
    kv_bytes_per_s=2e9,
    attention_flops_per_s=5e9,
    call_ms=0.3,
)


def test_rates_are_those_that_explain_the_times() -> None:
    model = info(12)
    timed = [
        Timed(name, "", work, RATES.milliseconds(work))
        for name, layers in plans(model).items()
        for work in (
            *(prefill_work(model, layers, 1024, size) for size in BATCHES),
            *(decode_work(model, layers, requests, tokens) for requests, tokens in LOADS),
        )
    ]
    found = fit(timed)
    assert np.allclose([found.milliseconds(row.work) for row in timed], [row.ms for row in timed], rtol=1e-3)


def test_plans_are_of_every_kind() -> None:
    chosen = plans(info(30))
    counts = {name: [sum(e.attention == kind for e in layers) for kind in ("full", "sliding", "none")]
              for name, layers in chosen.items()}  # fmt: skip
    assert counts["base"] == [30, 0, 0]
    assert counts["sliding 64"] == [8, 22, 0]
    assert min(counts["all three, 128"]) > 0
    assert counts["heads, 64"] == [0, 30, 0]
    assert counts["heads, a third none, 128"] == [0, 20, 10]
    assert all(e.full_kv_heads == (0,) for name in chosen if "heads" in name for e in chosen[name] if e.window)
    assert not any("heads" in name for name in plans(info(30).model_copy(update={"kv_heads": 1})))


def test_the_table_has_measured_and_predicted_values() -> None:
    timing = [{"plan": "base", "what": "decode, 1 x 64", "ms": 10.0, "predicted_ms": 11.0}]
    memory = [{"context_tokens": 1024, "max_batched_tokens": 64, "concurrency": 4.0, "concurrency_predicted": 5.0}]
    header, *rows = costs_rows({"timing": timing, "plans": [{"plan": "base", "memory": memory}]})
    assert rows[0] == ["base", "decode, 1 x 64, ms", "10", "11", "+10.0%"]
    assert rows[1] == ["base", "requests of 1,024 by 64", "4", "5", "+25.0%"]
    assert {len(row) for row in rows} == {len(header)}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_models_that_cannot_be_timed_are_refused(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model")
    with pytest.raises(ConfigError, match="a context of 2048 tokens"):
        run_costs(str(model), tmp_path / "costs.json", 0.1)
    for family, found in (("gemma2", "layers of .* slide already"), ("lfm2", "family lfm2: vLLM")):
        other = save_tiny(tmp_path / family, family, max_position_embeddings=4096)
        with pytest.raises(ConfigError, match=rf"windows of 64 and 128 tokens\nfound: {found}"):
            run_costs(str(other), tmp_path / "costs.json", 0.1, "vllm")
    write_plan(model / PLAN, plan_file("ffff"))
    with pytest.raises(ConfigError, match="with a base in Hugging Face's format"):
        run_costs(str(model), tmp_path / "costs.json", 0.1)
    assert not (tmp_path / "costs.json").exists()


@pytest.mark.parametrize("size", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_cache_of_no_size_is_refused(size: float, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a valid size"):
        run_costs(str(tmp_path), tmp_path / "costs.json", size)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_file_that_cannot_be_written_is_found_before_the_measurement(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", max_position_embeddings=4096)
    with pytest.raises(ConfigError, match=r"nowhere/costs\.json cannot be written"):
        run_costs(str(model), tmp_path / "nowhere" / "costs.json", 1.0)
    with pytest.raises(ConfigError, match=r"cannot be written\nfound: a directory"):
        run_costs(str(model), tmp_path, 1.0)


def test_rates_of_a_disturbed_machine_are_used_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_json(tmp_path / "costs.json", Costs(disturbed="other processes used 1.0 of 2 cores", rates=RATES))
    assert read_costs(tmp_path / "costs.json", info(4)) == RATES
    assert "measured on a disturbed machine (other processes used 1.0 of 2 cores)" in caplog.text


@pytest.mark.multiprocess
def test_rates_under_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("xllamacpp", reason="pip install xllamacpp")
    monkeypatch.setattr("layerboost.benching.costs.LLAMA_LOADS", ((1, 40), (2, 300)))
    model = tmp_path / "model"
    tiny_model("llama", 4, vocab_size=257, max_position_embeddings=4096).save_pretrained(model)
    byte_level_tokenizer().save_pretrained(model)
    found = run_costs(str(model), tmp_path / "costs.json", 1.0, "llama.cpp")
    assert (
        read_costs(
            tmp_path / "costs.json", find_model(str(model), Runtime(torch.device("cpu"), torch.float32)).info
        ).milliseconds(np.ones(7))
        > 0
    )
    for plan in found["plans"]:
        for row in plan["memory"]:
            assert row["kv_bytes"] == pytest.approx(row["kv_bytes_predicted"], rel=0.02)
    header, *rows = costs_rows(found)
    assert {row[1] for row in rows if "MiB" in row[1]} == {
        *("1 requests of 256 by 512, MiB of KV", "2 requests of 512 by 512, MiB of KV"),
        *("1 requests of 256 by 192, MiB of KV", "2 requests of 512 by 192, MiB of KV"),
        *("1 requests of 256 by 128, MiB of KV", "2 requests of 512 by 128, MiB of KV"),
    }
    assert {len(row) for row in rows} == {len(header)}


def test_transformers_has_no_rates(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rates are of a server"):
        run_costs(str(tmp_path), tmp_path / "costs.json", 1.0, "transformers")
