"""Teacher and student in one module whose forward returns the loss, one class for each healing stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import PreTrainedModel

from layerboost.artifacts import LayerPlan
from layerboost.healing.losses import distillation_loss, normalized_mse
from layerboost.model.modeling import decoder_layers
from layerboost.model.stream import head_logits
from layerboost.model.surgery import attention_of


class Distiller(nn.Module):
    """A student that learns from a frozen teacher.

    Its state is what is trained and nothing else, so a checkpoint holds the adapters and the sinks.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, temperature: float = 1.0) -> None:
        super().__init__()
        self.student = student
        # In a tuple the teacher is no submodule: not trained, not saved, not wrapped by DDP.
        self._teacher = (teacher.requires_grad_(False).eval(),)
        self.temperature = temperature

    @property
    def teacher(self) -> PreTrainedModel:
        return self._teacher[0]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trainable parameters by name."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        full = super().state_dict(*args, **kwargs)
        return {name: value for name, value in full.items() if name in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load the trainable parameters; raises KeyError when the state is of another set of them."""
        missing = self.state_dict().keys() ^ state_dict.keys()
        if missing:
            raise KeyError(f"checkpoint of other parameters: {sorted(missing)[:3]}")
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return _IncompatibleKeys(missing_keys=[], unexpected_keys=[])  # the frozen rest is not missing


class AttentionDistiller(Distiller):
    """Stage 1: each changed layer learns from the base's own activations; no gradient crosses a layer.

    A sliding layer's attention sees what the base's attention saw and learns its output. A layer without attention has
    only its MLP: it sees what the base's layer saw and learns the layer's output.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, layers: list[LayerPlan]) -> None:
        super().__init__(student, teacher)
        self.changed = [entry for entry in layers if entry.attention != "full"]

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Sum over the changed layers of the normalised MSE, for ids `[B, T]`."""
        seen: dict[int, tuple[tuple[Any, ...], dict[str, Any], torch.Tensor]] = {}

        def record(layer: int) -> Any:
            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                seen[layer] = (args, kwargs, output[0] if isinstance(output, tuple) else output)

            return hook

        modules = {entry.layer: self._module(self.teacher, entry) for entry in self.changed}
        hooks = [module.register_forward_hook(record(i), with_kwargs=True) for i, module in modules.items()]
        try:
            with torch.no_grad():
                self.teacher.get_decoder()(input_ids=input_ids, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        losses = []
        for entry in self.changed:
            args, kwargs, target = seen[entry.layer]
            output = self._module(self.student, entry)(*args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            losses.append(normalized_mse(output, target))
        return {"loss": torch.stack(losses).sum()}

    @staticmethod
    def _module(model: PreTrainedModel, entry: LayerPlan) -> nn.Module:
        return attention_of(model, entry.layer) if entry.attention == "sliding" else decoder_layers(model)[entry.layer]


class LogitDistiller(Distiller):
    """Stage 2: the whole student learns the teacher's distribution over the next token."""

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """KL(teacher ‖ student) per token for ids `[B, T]`."""
        with torch.no_grad():
            target = self.teacher.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        hidden = self.student.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
        loss = distillation_loss(
            hidden,
            target,
            lambda rows: head_logits(self.student, rows),
            lambda rows: head_logits(self.teacher, rows),
            self.temperature,
        )
        return {"loss": loss}
