"""The student: the converted model on the base's own weights, its adapters, and the parameters of each stage."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from layerboost.errors import ConfigError
from layerboost.model.families import FAMILIES
from layerboost.model.files import as_saved, read_weights
from layerboost.model.linear import use_onednn
from layerboost.model.linear_attention import FEATURE_PARAMETERS
from layerboost.model.modeling import decoder_layers
from layerboost.model.surgery import ADDED_PARAMETERS, apply_plan, packed_parameters
from layerboost.schemas.plan import LayerPlan

VALUES = ("v_proj", "qkv_proj")  # Phi-3's q, k and v are one
# What chooses the experts of a token, and weighs a shared one. Healing trains none of it: where experts were chosen
# otherwise, the student would learn from another model's activations.
ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


def shared_student(teacher: PreTrainedModel, checkpoint: Path, layers: list[LayerPlan]) -> PreTrainedModel:
    """Return the boosted model in `checkpoint`; weights that equal those of `teacher` are the same tensors.

    Frozen. Raise ConfigError if the checkpoint's weights are not those of the plan.
    """
    teacher.requires_grad_(False)
    student = copy.deepcopy(teacher, {id(parameter): parameter for parameter in teacher.parameters()})
    apply_plan(student, layers)
    student.requires_grad_(False)
    buffers = {name for name, _ in student.named_buffers()}  # those that Apertus saves
    found = read_weights(checkpoint)
    wrong = ""
    for name, own in student.state_dict().items():
        saved = as_saved(student, name, own)
        for key, value in saved.items():
            stored = found.pop(key, None)
            if stored is None:
                wrong = wrong or f"no {key}" * (key.rpartition(".")[2] in ADDED_PARAMETERS)
            elif stored.shape != value.shape:
                wrong = wrong or key
            elif name not in buffers and not torch.equal(stored.to(value), value):
                if len(saved) > 1:
                    raise ConfigError(f"{checkpoint} has other experts than its base", found=key)
                owner, _, attribute = name.rpartition(".")
                # A copy: the file's own tensor would keep the file mapped, as much memory as the weights.
                new = nn.Parameter(stored.to(value, copy=True), requires_grad=False)
                setattr(student.get_submodule(owner), attribute, new)
    if wrong or found:
        raise ConfigError(f"{checkpoint} does not hold the weights of its plan", found=wrong or min(found))
    return student


def adapted_layers(
    model: PreTrainedModel, layers: list[LayerPlan], targets: tuple[str, ...] | None
) -> dict[str, frozenset[str]]:
    """Return the names of a stock model's modules that get an adapter in each stage, `attention` and `lora`.

    They are linear layers, and packed experts, of which all parameters get one. Routers never do, nor does what a
    hybrid's layers of another kind have in place of attention.

    Stage 1: the modules it trains, a sliding layer's attention and an attention-free layer's MLP, both in a layer with
    another MLP; a linear layer trains its feature maps instead. Stage 2: `targets` from the first changed layer up,
    also in full layers; below it, student and base are equal. By default v and o of changed layers, and the MLPs.
    Experts are adapted where a layer has nothing else to learn through, or if `targets` name them. Raise ConfigError
    for other targets, naming those that there are.
    """
    keeps = {entry.layer: entry.strategy.keeps_weights for entry in layers if entry.attention_changed}
    mlps = {entry.layer: entry.mlp for entry in layers if entry.mlp_changed}
    linear = {entry.layer for entry in layers if entry.feature_map}
    first = min([*keeps, *mlps], default=0)
    family = FAMILIES[model.config.get_text_config().model_type]
    values = {*VALUES, family.output}
    prefix = _layers_name(model)
    stage1, stage2, known = set(), set(), set()
    experts: dict[int, set[str]] = {}
    for name, module in decoder_layers(model).named_modules():
        index, *parts = name.split(".")
        packed = bool(packed_parameters(module))
        if {*ROUTERS, family.mixer} & set(parts) or not (packed or isinstance(module, nn.Linear)):
            continue
        layer, in_attention, full_name = int(index), family.attention in parts, f"{prefix}.{name}"
        known.add(parts[-1])
        has_attention = keeps.get(layer)  # None in an unchanged layer
        if in_attention and has_attention is False:
            continue
        if not in_attention and mlps.get(layer) == "none":
            continue
        if packed and has_attention is False:
            experts.setdefault(layer, set()).add(full_name)
        elif layer not in linear and (layer in mlps or (has_attention is not None and has_attention == in_attention)):
            stage1.add(full_name)
        by_default = not packed and (not in_attention or (has_attention is True and parts[-1] in values))
        if layer >= first and (parts[-1] in targets if targets else by_default):
            stage2.add(full_name)
    for layer, names in experts.items():
        if not any(name.startswith(f"{prefix}.{layer}.") for name in stage1):
            stage1 |= names
            stage2 |= names if targets is None else set()
    if unknown := set(targets or ()) - known:
        raise ConfigError(
            f"heal.lora_targets names no layers that can be adapted: {', '.join(sorted(unknown))}",
            found=f"this model has {', '.join(sorted(known))}; routers are never trained",
        )
    return {"attention": frozenset(stage1), "lora": frozenset(stage2)}


def describe(adapted: Mapping[str, frozenset[str]]) -> str:
    """Return in words what each stage adapts."""
    stages = []
    for stage, names in adapted.items():
        counts = Counter(name.rpartition(".")[2] for name in names)
        found = ", ".join(f"{leaf} in {count}" for leaf, count in sorted(counts.items()))
        stages.append(f"{stage}: {found or 'none'}")
    return "; ".join(stages)


def with_adapters(student: PreTrainedModel, names: frozenset[str], rank: int) -> PeftModel:
    """Add LoRA to the named modules, alpha twice the rank; make what surgery added float32, in which it is trained.

    Return what merges the adapters into `student`, which changes in place.
    """
    for name, parameter in list(student.named_parameters()):
        if name.rpartition(".")[2] in ADDED_PARAMETERS:
            parameter.data = parameter.data.float()
    prefix = f"{_layers_name(student)}."
    linear, packed = [], []
    for name in sorted(names):
        module, relative = student.get_submodule(name), name.removeprefix(prefix)
        packed += [f"{relative}.{parameter}" for parameter in packed_parameters(module)]
        linear += [] if packed_parameters(module) else [relative]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=linear, target_parameters=packed)
    # Of the layers alone, which have no config: in a mixture of experts peft takes every `up_proj` and `down_proj` for
    # those of all experts, and `gate` for the routers.
    adapted = get_peft_model(decoder_layers(student), config)
    use_onednn(student)
    return adapted


def train_only(student: PreTrainedModel, stage: str, names: frozenset[str]) -> None:
    """Make trainable the adapters of the named modules and all sinks; in the stage `attention` also feature maps."""
    added = {"sinks", *(FEATURE_PARAMETERS if stage == "attention" else ())}
    for name, parameter in student.named_parameters():
        # peft nests the adapters of one module's parameters.
        owner = name.partition(".lora_")[0].replace(".base_layer", "")
        parameter.requires_grad_(("lora_" in name and owner in names) or name.rpartition(".")[2] in added)


def _layers_name(model: PreTrainedModel) -> str:
    names: list[str] = [name for name, module in model.named_modules() if module is decoder_layers(model)]
    return names[0]
