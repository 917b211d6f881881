"""Base and student in one module whose forward returns the loss, one class per healing stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn
from transformers import PreTrainedModel

from layerboost.errors import ConfigError
from layerboost.healing.losses import NO_LABEL, distillation_loss, normalized_mse
from layerboost.healing.sharding import distribute_like, to_full_tensor
from layerboost.model.linear import ONEDNN_PRODUCT
from layerboost.model.modeling import decoder_layers, final_norm
from layerboost.model.stream import (
    LayerCall,
    decoded,
    explain_not_finite,
    head_logits,
    hidden_in,
    input_of,
    recorded,
    recorded_calls,
    text_positions,
)
from layerboost.model.surgery import attention_of, output_projection
from layerboost.schemas.plan import LayerPlan
from layerboost.traffic import Given

Checkpointing = Literal["none", "selective", "full"]
Place = tuple[int, ...]
SAVED_WIDTH = 129  # smallest inner and outer size of a matrix product to save; LoRA ranks are below it


def positions_of(ids: torch.Tensor, end: int | None) -> torch.Tensor:
    """Return each token's position in its document, `[B, T]`: after the end-of-text token `end` they restart at 0.

    Transformers detects packed documents by such positions and masks attention between them.
    """
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if end is None:
        return index
    starts = torch.zeros_like(ids)
    starts[:, 1:] = torch.where(ids[:, :-1] == end, index[:, 1:], 0)
    return index - starts.cummax(-1).values


def next_tokens(ids: torch.Tensor, end: int | None) -> torch.Tensor:
    """Return each token's label, `[B, T]`: the next token of its document, NO_LABEL at the end."""
    labels = torch.full_like(ids, NO_LABEL)
    labels[:, :-1] = ids[:, 1:]
    return labels if end is None else labels.masked_fill(ids == end, NO_LABEL)


class Distiller(nn.Module):
    """A student that learns from a frozen base, the teacher; `end`: the token that ends a document."""

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, layers: list[LayerPlan], end: int | None = None
    ) -> None:
        super().__init__()
        self.student = student
        # In a tuple the teacher is not a submodule: not trained, not saved, not wrapped by DDP.
        self._teacher = (teacher.eval(),)
        self.changed = [plan for plan in layers if plan.changed]
        self.end = end

    @property
    def teacher(self) -> PreTrainedModel:
        return self._teacher[0]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name; this process's shards if they are sharded."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Return a copy of the trainable parameters by name, in full on the CPU; every process must take part."""
        full = {name: to_full_tensor(parameter.detach()) for name, parameter in self.trained.items()}
        return {name: value.to("cpu", copy=True) for name, value in full.items()}

    @torch.no_grad()
    def load_trained(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load what `trained_state` returned; raise ConfigError if it has other parameters."""
        trained = self.trained
        if other := trained.keys() ^ state.keys():
            raise ConfigError(
                "a checkpoint of healing is of other parameters, as another release of layerboost or peft trains",
                found=", ".join(sorted(other)[:3]),
                do="delete heal/ in the run folder and heal again",
            )
        for name, parameter in trained.items():
            parameter.copy_(distribute_like(state[name], parameter))

    def token_weights(self, ids: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """Return `weights` `[B, T]`, or if None those of a mean over all tokens."""
        return torch.full(ids.shape, 1 / ids.numel(), device=ids.device) if weights is None else weights

    def run_teacher(self, ids: torch.Tensor, given: Given | None = None) -> torch.Tensor:
        """Return the teacher's normed output `[B, T, D]` on ids `[B, T]`: of packed documents, with attention masked
        between them; or of requests, with what is `given` of their images, empty if they have none."""
        if given is not None:  # one document, though a chat template may end each turn with the token `end`
            return decoded(self.teacher, ids, given, use_cache=False)
        positions = text_positions(self.teacher, positions_of(ids, self.end))
        return decoded(self.teacher, ids, position_ids=positions, use_cache=False)

    def explain_not_finite(self, rows: Sequence[tuple[torch.Tensor, Given | None]]) -> tuple[str, tuple[str, str]]:
        """Return where the student is not finite on rows of ids, each with what is given of its images; where the
        teacher is not, and what to do about it. Empty if all is finite."""
        student, teacher = (
            next((found for row in rows if any(found := explain_not_finite(model, *row))), ("", ""))
            for model in (self.student, self.teacher)
        )
        return student[0], teacher


@dataclass(frozen=True)
class ModuleCall:
    """The arguments of one of the teacher's modules, and its output `[B, T, D]`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: torch.Tensor


class AttentionDistiller(Distiller):
    """Stage 1: each changed layer learns from the teacher's own activations; no gradient crosses a layer.

    A sliding layer's attention gets the input of the teacher's attention and learns its output; a linear layer's
    learns what the output projection gets (LoLCATs), unless its feature map has nothing to learn. A layer without
    attention, or with another MLP, gets the input of the teacher's layer and learns what the layer adds to the stream.
    One forward pass of the teacher serves all layers; while a stretch of text is repeated, its activations are cached.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        layers: list[LayerPlan],
        end: int | None = None,
    ) -> None:
        super().__init__(student, teacher, layers, end)
        self.changed = [plan for plan in self.changed if plan.learns_alone]
        self.cache: dict[Place, dict[int, ModuleCall]] = {}

    def forward(
        self,
        input_ids: torch.Tensor,
        weights: torch.Tensor | None = None,
        place: Place | None = None,
        given: Given | None = None,
    ) -> torch.Tensor:
        """Return the sum of `layer_losses`."""
        return torch.stack(list(self.layer_losses(input_ids, weights, place, given).values())).sum()

    def layer_losses(
        self,
        input_ids: torch.Tensor,
        weights: torch.Tensor | None = None,
        place: Place | None = None,
        given: Given | None = None,
    ) -> dict[int, torch.Tensor]:
        """Return each changed layer's normalised MSE for ids and token weights `[B, T]`.

        `place`: the key under which the teacher's activations are cached; those of another stretch, its first number,
        are dropped. `given`: as of `run_teacher`.
        """
        weights = self.token_weights(input_ids, weights)
        calls = self._cached_calls(input_ids, place, given)
        losses = {}
        for plan in self.changed:
            call = calls.pop(plan.layer)  # freed after its loss
            added = call.output if plan.attention_alone else call.output - input_of(call.args, call.kwargs)
            losses[plan.layer] = normalized_mse(self.student_output(plan, call), call.output, weights, size=added)
        return losses

    def _cached_calls(self, ids: torch.Tensor, place: Place | None, given: Given | None) -> dict[int, ModuleCall]:
        if place is None:
            return self.teacher_calls(ids, self.changed, given)
        if place not in self.cache:
            if any(cached[0] != place[0] for cached in self.cache):
                self.cache.clear()
            self.cache[place] = self.teacher_calls(ids, self.changed, given)
        return dict(self.cache[place])

    def teacher_calls(
        self, ids: torch.Tensor, layers: Sequence[LayerPlan], given: Given | None = None
    ) -> dict[int, ModuleCall]:
        """Return the calls of the teacher's modules on ids `[B, T]`, by layer, in one forward pass without gradient.

        The output of a linear layer's is what its output projection gets.
        """
        modules = {plan.layer: self._module(self.teacher, plan) for plan in layers}
        projections = {plan.layer: output_projection(self.teacher, plan.layer) for plan in layers if plan.feature_map}
        with torch.no_grad(), recorded(modules, ModuleCall) as calls, recorded(projections, input_of) as inputs:
            self.run_teacher(ids, given)
        return calls | {layer: replace(calls[layer], output=value) for layer, value in inputs.items()}

    def student_output(self, plan: LayerPlan, call: ModuleCall) -> torch.Tensor:
        """Return the output `[B, T, D]` of the student's module, as `teacher_calls` does, on the teacher's input."""
        projections = {0: output_projection(self.student, plan.layer)} if plan.feature_map else {}
        with recorded(projections, input_of) as inputs:
            output = hidden_in(self._module(self.student, plan)(*call.args, **call.kwargs))
        return inputs.get(0, output)

    @staticmethod
    def _module(model: PreTrainedModel, plan: LayerPlan) -> nn.Module:
        return attention_of(model, plan.layer) if plan.attention_alone else decoder_layers(model)[plan.layer]


@dataclass(frozen=True)
class Targets:
    """The teacher's activations on a batch: the stream at the first changed layer and the normed output, `[B, T, D]`,
    and the call of each layer from there up.
    """

    start: torch.Tensor
    calls: dict[int, LayerCall]
    output: torch.Tensor


class LogitDistiller(Distiller):
    """Stage 2: the student learns the teacher's distribution over the next token.

    Below the first changed layer the two are equal: those layers run once, in the teacher, without gradient. The
    student's layers use the masks and rotary embeddings of the teacher's.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        layers: list[LayerPlan],
        end: int | None = None,
        *,
        temperature: float = 1.0,
        ce_weight: float = 0.0,
        checkpointing: Checkpointing = "none",
    ) -> None:
        super().__init__(student, teacher, layers, end)
        self.first = self.changed[0].layer if self.changed else 0
        self.temperature, self.ce_weight, self.checkpointing = temperature, ce_weight, checkpointing

    def forward(
        self, input_ids: torch.Tensor, weights: torch.Tensor | None = None, given: Given | None = None
    ) -> torch.Tensor:
        """Return KL and cross entropy, summed with token weights, for ids and weights `[B, T]`; `given`: as of
        `run_teacher`."""
        targets = self.compute_targets(input_ids, given)
        return distillation_loss(
            self.student_output(targets),
            targets.output,
            lambda rows: head_logits(self.student, rows),
            lambda rows: head_logits(self.teacher, rows),
            self.token_weights(input_ids, weights),
            temperature=self.temperature,
            labels=next_tokens(input_ids, self.end if given is None else None),
            ce_weight=self.ce_weight,
        )

    @torch.no_grad()
    def compute_targets(self, ids: torch.Tensor, given: Given | None = None) -> Targets:
        """Return the teacher's activations on ids `[B, T]`; `given`: as of `run_teacher`."""
        layers = {i: layer for i, layer in enumerate(decoder_layers(self.teacher)) if i >= self.first}
        with recorded_calls(layers, images=bool(given)) as (start, calls):
            output = self.run_teacher(ids, given)
        return Targets(start[0], calls, output)

    def student_output(self, targets: Targets) -> torch.Tensor:
        """Return the student's normed output `[B, T, D]`; run its layers from the first changed one up."""
        hidden = targets.start
        for index, (arguments, added) in targets.calls.items():
            hidden = hidden if added is None else hidden + added
            layer = decoder_layers(self.student)[index]
            if self.checkpointing != "none" and torch.is_grad_enabled():
                context = matrix_products if self.checkpointing == "selective" else noop_context_fn
                hidden = hidden_in(checkpoint(layer, hidden, use_reentrant=False, context_fn=context, **arguments))
            else:
                hidden = hidden_in(layer(hidden, **arguments))
        return final_norm(self.student)(hidden)


def _policy(_: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    """Save attention of full layers and large products, not LoRA's thin ones. Most of the memory (norms, activations,
    windows) is cheap to recompute."""
    name = operator.name()
    widths: tuple[int, ...] = ()
    if name in ("aten::mm", "aten::addmm"):
        widths = args[-2].shape[-1], args[-1].shape[-1]
    elif name == ONEDNN_PRODUCT:
        widths = tuple(args[1].shape)
    save = min(widths, default=0) >= SAVED_WIDTH or "scaled_dot_product" in name
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


# The contexts of selective checkpointing.
matrix_products = partial(create_selective_checkpoint_contexts, _policy)
