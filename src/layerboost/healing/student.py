"""The student: the converted model on the base's own weights, its adapters, and the parameters of each stage."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from layerboost.errors import ConfigError
from layerboost.model.families import FAMILIES
from layerboost.model.linear import use_onednn
from layerboost.model.modeling import decoder_layers
from layerboost.model.surgery import apply_plan
from layerboost.schemas.plan import LayerPlan

VALUES = ("v_proj", "qkv_proj")  # Phi-3's q, k and v are one


def shared_student(teacher: PreTrainedModel, checkpoint: Path, layers: list[LayerPlan]) -> PreTrainedModel:
    """Return the boosted model in `checkpoint`; weights that equal those of `teacher` are the same tensors.

    Frozen. Raise ConfigError if the checkpoint's weights are not those of the plan.
    """
    teacher.requires_grad_(False)
    student = copy.deepcopy(teacher, {id(parameter): parameter for parameter in teacher.parameters()})
    apply_plan(student, layers)
    student.requires_grad_(False)
    parameters = dict(student.named_parameters(remove_duplicate=False))
    constants = {name for name, _ in student.named_buffers()}  # those that Apertus saves
    missing = {name for name in parameters if name.endswith(".sinks")}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in set(tensors.keys()) - constants:
                shape = tensors.get_slice(name).get_shape()
                if name not in parameters or list(parameters[name].shape) != shape:
                    raise ConfigError(f"{checkpoint} does not hold the weights of its plan", found=name)
                missing.discard(name)
                value = tensors.get_tensor(name).to(parameters[name])
                if not torch.equal(value, parameters[name]):
                    owner, _, attribute = name.rpartition(".")
                    # A copy: the file's own tensor would keep the file mapped, as much memory as the weights.
                    setattr(student.get_submodule(owner), attribute, nn.Parameter(value.clone(), requires_grad=False))
    if missing:
        raise ConfigError(f"{checkpoint} does not hold the weights of its plan", found=f"no {min(missing)}")
    return student


def adapted_layers(
    model: PreTrainedModel, layers: list[LayerPlan], targets: tuple[str, ...] | None
) -> dict[str, frozenset[str]]:
    """Return the names of a stock model's linear layers that get an adapter in each stage, `attention` and `lora`.

    Stage 1: the modules it trains, a sliding layer's attention and an attention-free layer's MLP, both in a layer with
    another MLP. Stage 2: `targets` from the first changed layer up, also in full layers; below it, student and base are
    equal. By default v and o of sliding layers, and the MLPs. Raise ConfigError for targets that do not exist, naming
    those that do.
    """
    keeps = {entry.layer: entry.strategy.keeps_weights for entry in layers if entry.attention_changed}
    mlps = {entry.layer: entry.mlp for entry in layers if entry.mlp_changed}
    first = min([*keeps, *mlps], default=0)
    family = FAMILIES[model.config.model_type]
    values = {*VALUES, family.output}
    prefix = next(name for name, module in model.named_modules() if module is decoder_layers(model))
    stage1, stage2, known = set(), set(), set()
    for name, module in decoder_layers(model).named_modules():
        if not isinstance(module, nn.Linear):
            continue
        index, *parts = name.split(".")
        layer, in_attention, full_name = int(index), family.attention in parts, f"{prefix}.{name}"
        known.add(parts[-1])
        has_attention = keeps.get(layer)  # None in an unchanged layer
        if in_attention and has_attention is False:
            continue
        if not in_attention and mlps.get(layer) == "none":
            continue
        if layer in mlps or (has_attention is not None and has_attention == in_attention):
            stage1.add(full_name)
        by_default = not in_attention or (has_attention is True and parts[-1] in values)
        if layer >= first and (parts[-1] in targets if targets else by_default):
            stage2.add(full_name)
    if unknown := set(targets or ()) - known:
        raise ConfigError(
            f"heal.lora_targets names layers that do not exist: {', '.join(sorted(unknown))}",
            found=f"this model has {', '.join(sorted(known))}",
        )
    return {"attention": frozenset(stage1), "lora": frozenset(stage2)}


def with_adapters(student: PreTrainedModel, names: frozenset[str], rank: int) -> PeftModel:
    """Add LoRA to the named linear layers, alpha twice the rank; make sinks float32, in which they are trained."""
    for name, parameter in list(student.named_parameters()):
        if name.endswith(".sinks"):
            parameter.data = parameter.data.float()
    adapted = get_peft_model(student, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(names)))
    use_onednn(adapted)
    return adapted


def train_only(student: PreTrainedModel, names: frozenset[str]) -> None:
    """Make only the adapters of the named layers and all sinks trainable."""
    for name, parameter in student.named_parameters():
        adapted = "lora_" in name and name.partition(".lora_")[0] in names
        parameter.requires_grad_(adapted or name.endswith(".sinks"))
