"""FP8 checkpoints made of tiny ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny import edit_config

FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}


def to_fp8(folder: Path, quantisation: dict[str, Any] = FP8) -> dict[str, torch.Tensor]:
    """Quantise the layers' matrices by these settings, in place; return all tensors as they are then, dequantised."""
    tensors, wanted = load_file(folder / "model.safetensors"), {}
    blocks = quantisation["weight_block_size"]
    for name, weight in list(tensors.items()):
        wanted[name] = weight
        if "layers." in name and re.search(r"(proj|w\d)\.weight$", name) and "vision" not in name:
            rows, columns = blocks or weight.shape
            cut = weight.view(weight.shape[0] // rows, rows, weight.shape[1] // columns, columns)
            scale = cut.abs().amax((1, 3), keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
            tensors[name] = (cut / scale).to(torch.float8_e4m3fn).view_as(weight)
            tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0] if blocks else scale.reshape(())
            wanted[name] = (tensors[name].float().view_as(cut) * scale).view_as(weight)
            if quantisation["activation_scheme"] == "static":
                tensors[name.replace(".weight", ".activation_scale")] = torch.tensor(1.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, quantization_config=quantisation)
    return wanted
