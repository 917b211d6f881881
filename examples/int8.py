"""Quantise a checkpoint, boosted or not, to int8 with compressed-tensors: weights per channel, activations per token.

    python examples/int8.py runs/smollm2/healed runs/smollm2/int8

Every linear layer but the head; round to nearest, no data. Needs `pip install compressed-tensors`, which vLLM brings.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, is_module_quantized

from layerboost import AutoModelForCausalLM  # Transformers' own, which then loads boosted checkpoints too

WEIGHTS = (".safetensors", ".safetensors.index.json")


def quantise(folder: Path, target: Path) -> None:
    """Write the checkpoint in `folder` as int8 to `target`, with every file that lies beside its weights."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    scheme = preset_name_to_scheme("W8A8", ["Linear"])
    apply_quantization_config(model, QuantizationConfig(config_groups={"linear": scheme}, ignore=["lm_head"]))
    for module in filter(is_module_quantized, model.modules()):
        low, high = torch.aminmax(module.weight.detach(), dim=1, keepdim=True)
        scale, _ = calculate_qparams(low, high, scheme.weights)
        module.weight_scale.data.copy_(scale)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(target)
    for file in target.glob("*.safetensors"):
        shutil.copymode(target / "config.json", file)  # safetensors lets only the owner read its files
    compressor.update_config(target)
    for file in folder.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHTS) and not (target / file.name).exists():
            shutil.copy(file, target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a Hugging Face checkpoint")
    parser.add_argument("target", type=Path, help="where to write the int8 checkpoint")
    quantise(**vars(parser.parse_args()))
