"""FP8 checkpoints made of tiny ones."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import edit_config

BLOCK = 16
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def to_fp8(folder: Path) -> dict[str, torch.Tensor]:
    """Quantise the layers' matrices in blocks, in place; return all tensors as they are then, dequantised."""
    tensors, wanted = load_file(folder / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        wanted[name] = weight
        if "layers." in name and re.search(r"(proj|w\d)\.weight$", name) and "vision" not in name:
            rows, columns = (size // BLOCK for size in weight.shape)
            blocks = weight.view(rows, BLOCK, columns, BLOCK)
            scale = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
            wide = scale[:, None, :, None]
            tensors[name] = (blocks / wide).to(torch.float8_e4m3fn).view_as(weight)
            tensors[f"{name}_scale_inv"] = scale
            wanted[name] = (tensors[name].float().view_as(blocks) * wide).view_as(weight)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, quantization_config=FP8)
    return wanted
