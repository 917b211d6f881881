"""Quantised models as MODEL: dequantised once where Transformers can, or refused before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8 import to_fp8
from safetensors.torch import load_file
from tiny import MIXTURES, MODEL_TYPES, RUNTIME, change_weights, edit_config, save_tiny

from layerboost.errors import ConfigError
from layerboost.model.base import find_base, find_model, open_base
from layerboost.model.files import in_original_format
from layerboost.model.integrity import check_base
from layerboost.recipe import Recipe
from layerboost.runtime import Runtime

CARD = "---\nbase_model: someone/original\nlicense: mit\n---\n"


# Mixtures of experts whose files hold each expert apart: packed ones have no scales by block.
PACKED = ("granitemoe", "granitemoeshared", "hy_v3")
DEQUANTISED = (
    *[("llama", {}), ("qwen3_moe", {}), ("minimax_m2", {}), ("mistral3", {"inside": "ministral3"})],
    *[
        pytest.param(name, {}, marks=pytest.mark.exhaustive)
        for name in MIXTURES
        if name in MODEL_TYPES and name not in ("qwen3_moe", "minimax_m2", *PACKED)
    ],
)


@pytest.mark.parametrize(("model_type", "changes"), DEQUANTISED, ids=str)
def test_fp8_is_dequantised_once(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", model_type, layers=2, **changes)
    wanted = to_fp8(folder)
    (folder / "README.md").write_text(CARD)
    recipe = Recipe(model=str(folder), dtype="float32", device="cpu")
    base = find_base(recipe, tmp_path / "run", RUNTIME)
    assert base.packed
    parameters = base.info.parameters
    assert not (tmp_path / "run").exists()
    base = open_base(recipe, tmp_path / "run", RUNTIME)
    assert base.folder == tmp_path / "run" / "base"
    assert base.info.parameters == parameters
    assert "quantization_config" not in json.loads((base.folder / "config.json").read_text())
    assert "license: mit" in (base.folder / "README.md").read_text()
    check_base(base.folder, torch.float32)
    names = load_file(base.folder / "model.safetensors").keys()
    assert names == wanted.keys() or not in_original_format(base.model_config)
    stock = save_tiny(tmp_path / "stock", model_type, layers=2, **changes)
    change_weights(stock, lambda t: t.update(wanted))
    ids = torch.arange(3, 43)[None]
    expected = find_model(str(stock), RUNTIME).load()(ids).logits
    torch.testing.assert_close(base.load()(ids).logits, expected, atol=1e-4, rtol=1e-4)
    made = (base.folder / "model.safetensors").stat().st_mtime_ns
    weights, config = base.folder / "model.safetensors", base.folder / "config.json"
    assert weights.stat().st_mode == config.stat().st_mode
    again = open_base(recipe, tmp_path / "run", RUNTIME)
    assert (again.folder, again.fingerprint) == (base.folder, base.fingerprint)
    assert (base.folder / "model.safetensors").stat().st_mtime_ns == made


def test_a_base_is_dequantised_on_the_cpu(tmp_path: Path) -> None:
    """Here a device that keeps no value stands for a GPU that is too small."""
    folder = save_tiny(tmp_path / "model", layers=1)
    wanted = to_fp8(folder)
    base = open_base(Recipe(model=str(folder)), tmp_path / "run", Runtime(torch.device("meta"), torch.float32))
    assert base.runtime.device.type == "meta"
    for name, value in load_file(base.folder / "model.safetensors").items():
        torch.testing.assert_close(value, wanted[name])


def test_compressed_tensors_are_dequantised(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="comes with vLLM")
    from int8 import quantise

    before = save_tiny(tmp_path / "model", layers=2)
    quantise(before, tmp_path / "int8")
    base = open_base(Recipe(model=str(tmp_path / "int8"), dtype="float32"), tmp_path / "run", RUNTIME)
    stock, found = find_model(str(before), RUNTIME).load(), base.load()
    for name, value in found.state_dict().items():
        torch.testing.assert_close(value, stock.state_dict()[name], atol=0.01, rtol=0.01)
    assert "quantization_config" not in json.loads((base.folder / "config.json").read_text())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "awq": ({"quant_method": "awq", "bits": 4}, '"quant_method": "awq"'),
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, '"quant_method": "gptq"'),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, '"quant_method": "bitsandbytes"'),
    "no method": ({"bits": 4}, '"bits": 4'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_methods_are_refused_before_any_weight_is_read(case: str, tmp_path: Path) -> None:
    folder, (settings, found) = save_tiny(tmp_path, layers=1), REFUSED[case]
    edit_config(folder, quantization_config=settings)
    (folder / "model.safetensors").write_bytes(b"not read")
    message = (
        rf"is quantised, which MODEL cannot be\nfound: quantization_config [^$]*{found}[^$]*\ndo: use the original"
    )
    with pytest.raises(ConfigError, match=message) as raised:
        find_base(Recipe(model=str(folder)), tmp_path / "run", RUNTIME)
    assert "quantised from, and" in str(raised.value.do)
    (folder / "README.md").write_text(CARD)
    with pytest.raises(ConfigError, match="quantised from, someone/original, and quantise after healing"):
        find_base(Recipe(model=str(folder)), tmp_path / "run", RUNTIME)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path, layers=1)
    edit_config(folder, quantization_config={"quant_method": "compressed-tensors", "format": "int-quantized"})
    monkeypatch.setattr("layerboost.model.integrity.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="takes the package compressed_tensors to undo"):
        check_base(folder, torch.float32)


def test_fp8_without_its_scales(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, layers=1)
    to_fp8(folder)
    change_weights(folder, lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale_inv"))
    with pytest.raises(ConfigError, match=r"mlp.up_proj.weight of type torch.float8_e4m3fn without a scale"):
        check_base(folder, torch.float32)
