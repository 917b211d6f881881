"""examples/int8.py on boosted checkpoints: they load and generate in Transformers, and vLLM serves the same model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from offline import Vllm, check_same_model
from safetensors.torch import load_file
from tiny import boosted, plan_file, save_checkpoint
from transformers import AutoModelForCausalLM

from layerboost.model.integrity import check_checkpoint
from layerboost.vllm_plugin.plugin import check_int8, int8_overflows

pytest.importorskip("compressed_tensors", reason="comes with vLLM")
from int8 import quantise

# vLLM's own classes, and its Transformers backend.
CASES = {
    "llama": ("llama", "nSfs", True),
    "qwen3": ("qwen3", "SnfsS", False),
    "smollm3": ("smollm3", "SnfsS", False),
}


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Per case: a boosted checkpoint and its int8 form."""
    root = tmp_path_factory.mktemp("int8")
    made = {}
    for case, (family, letters, tied) in CASES.items():
        save_checkpoint(root / case, boosted(letters, family, tie_word_embeddings=tied), plan_file(letters))
        quantise(root / case, root / f"{case}-int8")
        made[case] = (root / case, root / f"{case}-int8")
    return made


@pytest.mark.parametrize("case", CASES)
def test_it_is_int8_and_close_and_generates(quantised: dict[str, tuple[Path, Path]], case: str) -> None:
    before, after = quantised[case]
    check_checkpoint(after)
    assert {file.name for file in before.iterdir()} == {file.name for file in after.iterdir()}
    weights = load_file(after / "model.safetensors")
    projections = [name for name in weights if name.endswith("_proj.weight")]
    assert projections
    assert all(weights[name].dtype == torch.int8 and f"{name}_scale" in weights for name in projections)
    assert weights[
        "model.layers.1.self_attn.sinks" if case == "llama" else "model.layers.0.self_attn.sinks"
    ].is_floating_point()
    ids = torch.arange(3, 63)[None]
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (before, after)]
        exact, rounded = (model(ids).logits for model in models)
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.15
    assert models[1].generate(ids, min_new_tokens=5, max_new_tokens=5).shape == (1, 65)


def test_a_cpu_that_cannot_multiply_int8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = SimpleNamespace(quantization_config={"format": "int-quantized"})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_vnni": False})
    with pytest.raises(ValueError, match="wrong answers on this CPU"):
        check_int8(config)
    check_int8(SimpleNamespace(quantization_config=None))
    for able in ({"avx2": True, "avx512_vnni": True}, {"avx2": True, "avx_vnni": True}, {"dot": True}):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        check_int8(config)


@pytest.mark.server
@pytest.mark.skipif(int8_overflows(), reason="vLLM's int8 products overflow on a CPU without VNNI")
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(
    "case", ["llama", *(pytest.param(case, marks=pytest.mark.exhaustive) for case in ("qwen3", "smollm3"))]
)
def test_vllm_serves_the_same_model(quantised: dict[str, tuple[Path, Path]], vllm: Vllm, case: str) -> None:
    # vLLM's kernel scales activations by 127, compressed-tensors by 127.5, so both round as far from each other as from
    # the exact model (at most 0.66 here).
    check_same_model(quantised[case][1], vllm.answers(quantised[case][1]), most=1.0)
