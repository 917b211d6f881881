"""FSDP2 for healing: weights, gradients and optimizer sharded over processes; base and student share weights.

PyTorch's `fully_shard` is applied here and not by accelerate's plugin: the plugin is off on CPUs, and it shards one
module that is called from its top. Here two models share their tensors, two stages share the shards, and the distillers
call layers, attention, norm and head separately.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from layerboost.model.modeling import decoder_layers
from layerboost.model.stream import with_gradient
from layerboost.model.surgery import attention_of
from layerboost.runtime import world_size


class Shards(nn.Module):
    """Modules whose parameters are gathered together while one of their methods runs, shared ones once.

    FSDP2 gathers before the forward pass of the module that owns the parameters and frees them after it. A layer of the
    base and the student's are two modules on the same tensors, so a third module must own them: this one.
    """

    def __init__(self, held: Iterable[nn.Module]) -> None:
        super().__init__()
        self.held = nn.ModuleList(held)
        self.gathered = False

    def forward(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return `run(...)`, called between FSDP2's hooks."""
        return run(*args, **kwargs)

    def gather_for(self, owner: object, *methods: str, layer: bool = False) -> None:
        """Make methods of `owner` gather the parameters while they run; nested calls gather once.

        `layer`: the methods take hidden states first, as decoder layers do.
        """
        for method in methods:
            setattr(owner, method, self._gathering(getattr(owner, method), layer))

    def _gathering(self, run: Callable[..., Any], layer: bool) -> Callable[..., Any]:
        @functools.wraps(run)
        def gathering(*args: Any, **kwargs: Any) -> Any:
            if self.gathered:
                return run(*args, **kwargs)
            if layer and torch.is_grad_enabled():
                # FSDP2 frees a group in the backward pass when its inputs have their gradient; without one all groups
                # stay gathered to the end of the pass.
                args, kwargs = with_gradient(args, kwargs)
            self.gathered = True
            try:
                return self(run, *args, **kwargs)
            finally:
                self.gathered = False

        return gathering


def shard(teacher: PreTrainedModel, student: PreTrainedModel, device: torch.device) -> Shards:
    """Shard both models in place, from full ones on the CPU of every process, to shards on `device`.

    A layer of the base and the student's are one group, which gathers when either runs. The returned group holds the
    rest (embeddings, final norm, head) and must gather for every method that runs layers.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    groups: list[nn.Module] = []
    for index, layers in enumerate(zip(decoder_layers(teacher), decoder_layers(student), strict=True)):
        group = Shards(layers)
        fully_shard(group, mesh=mesh, reshard_after_forward=True)
        for module in (*layers, attention_of(student, index)):
            group.gather_for(module, "forward", layer=True)
        groups.append(group)
    rest = Shards([*groups, *_outside_layers(teacher), *_outside_layers(student)])
    fully_shard(rest, mesh=mesh)
    return rest


def is_sharded(module: nn.Module) -> bool:
    """Return whether the parameters are sharded over the processes."""
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


def to_full_tensor(value: Any) -> Any:
    """Return a shard's full tensor, on the CPU, or any other value unchanged; every process must take part."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def distribute_like(value: Any, parameter: torch.Tensor) -> Any:
    """Return this process's shard of a full tensor of `parameter`'s shape if that is sharded; else the value."""
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    # Every process has the full tensor: nothing is sent.
    local = value.to(parameter.device)
    return distribute_tensor(local, parameter.device_mesh, parameter.placements, src_data_rank=None)


class FullStateAdamW(torch.optim.AdamW):
    """AdamW whose state dict holds full tensors, sharded or not: a checkpoint fits any number of processes."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state; every process must take part."""
        packed = super().state_dict()
        state = {
            index: {key: to_full_tensor(value) for key, value in values.items()}
            for index, values in packed["state"].items()
        }
        return {**packed, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        state = {
            index: {key: distribute_like(value, parameters[index]) for key, value in values.items()}
            for index, values in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": state})


def _outside_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules with parameters or buffers of their own that are not in a decoder layer."""
    inside = set(decoder_layers(model).modules())
    return [
        module
        for module in model.modules()
        if module not in inside and [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    ]
