"""Teacher and student in one module whose forward returns the loss, one class for each healing stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)
from transformers import PreTrainedModel

from layerboost.artifacts import LayerPlan
from layerboost.healing.losses import NO_LABEL, distillation_loss, normalized_mse
from layerboost.healing.sharding import like, whole
from layerboost.model.linear import ONEDNN_PRODUCT
from layerboost.model.modeling import decoder_layers
from layerboost.model.stream import explain_not_finite, head_logits
from layerboost.model.surgery import attention_of

Checkpointing = Literal["none", "selective", "full"]
KEPT_WIDTH = 129  # inner and outer size of a matrix product worth keeping; ranks are below it


def positions_of(ids: torch.Tensor, end: int | None) -> torch.Tensor:
    """Position of each token in its own document, `[B, T]`: after the end-of-text token `end` they begin at 0 again.

    Transformers reads packed documents off such positions and masks attention between them.
    """
    index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if end is None:
        return index
    starts = torch.zeros_like(ids)
    starts[:, 1:] = torch.where(ids[:, :-1] == end, index[:, 1:], 0)
    return index - starts.cummax(-1).values


def next_tokens(ids: torch.Tensor, end: int | None) -> torch.Tensor:
    """The label of each token, `[B, T]`: the next one of its document, NO_LABEL at the end."""
    labels = torch.full_like(ids, NO_LABEL)
    labels[:, :-1] = ids[:, 1:]
    return labels if end is None else labels.masked_fill(ids == end, NO_LABEL)


class Distiller(nn.Module):
    """A student that learns from a frozen teacher; `end` is the token that ends a document."""

    first_bad_layer: Callable[..., int | None]  # of a batch, where its loss is not finite

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel, layers: list[LayerPlan], end: int | None = None
    ) -> None:
        super().__init__()
        self.student = student
        # In a tuple the teacher is no submodule: not trained, not saved, not wrapped by DDP.
        self._teacher = (teacher.eval(),)
        self.changed = [entry for entry in layers if entry.attention != "full"]
        self.end = end

    @property
    def teacher(self) -> PreTrainedModel:
        return self._teacher[0]

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, this process's shards where they are sharded."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Return the trainable parameters by name, as whole tensors; where they are sharded, every process must ask."""
        return {name: whole(parameter.detach()) for name, parameter in self.trained.items()}

    @torch.no_grad()
    def load_trained(self, state: Mapping[str, torch.Tensor]) -> None:
        """Load what `trained_state` returned; raise KeyError when it is of another set of parameters."""
        trained = self.trained
        if other := trained.keys() ^ state.keys():
            raise KeyError(f"checkpoint of other parameters: {sorted(other)[:3]}")
        for name, parameter in trained.items():
            parameter.copy_(like(state[name], parameter))

    def weights_or_mean(self, ids: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        """`weights` `[B, T]`; where none are given, all tokens weigh the same and the loss is their mean."""
        return torch.full(ids.shape, 1 / ids.numel(), device=ids.device) if weights is None else weights

    def run_teacher(self, ids: torch.Tensor) -> torch.Tensor:
        """The teacher's normed output `[B, T, D]` on ids `[B, T]`, documents apart."""
        output: torch.Tensor = (
            self.teacher.get_decoder()(input_ids=ids, position_ids=positions_of(ids, self.end), use_cache=False)
        ).last_hidden_state
        return output

    def explain_teacher(self, ids: torch.Tensor) -> tuple[str, str]:
        """Where the teacher itself is not finite on ids `[B, T]`, and what to do; empty where it is finite."""
        return next((found for row in ids if any(found := explain_not_finite(self.teacher, row))), ("", ""))


@dataclass(frozen=True)
class AttentionLesson:
    """The arguments of one of the base's modules, and its output `[B, T, D]`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: torch.Tensor


class AttentionDistiller(Distiller):
    """Stage 1: each changed layer learns from the base's own activations; no gradient crosses a layer.

    A sliding layer's attention sees what the base's attention saw and learns its output. A layer without attention has
    only its MLP: it sees what the base's layer saw and learns what the layer added to the stream. One forward pass of
    the base serves all layers, and again when the same batch comes back soon: the lessons of `keeps` numbered batches
    are kept.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        layers: list[LayerPlan],
        end: int | None = None,
        keeps: int = 0,
    ) -> None:
        super().__init__(student, teacher, layers, end)
        self.keeps = keeps
        self.kept: dict[tuple[int, ...], list[tuple[LayerPlan, AttentionLesson]]] = {}

    def forward(
        self, input_ids: torch.Tensor, weights: torch.Tensor | None = None, number: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the sum over the changed layers of the normalised MSE, for ids and token weights `[B, T]`.

        `number` `[B]`: of the sequences, under which what the base did with them is kept.
        """
        return torch.stack(list(self.layer_losses(input_ids, weights, number).values())).sum()

    def layer_losses(
        self, input_ids: torch.Tensor, weights: torch.Tensor | None = None, number: torch.Tensor | None = None
    ) -> dict[int, torch.Tensor]:
        """The normalised MSE of each changed layer."""
        weights = self.weights_or_mean(input_ids, weights)
        losses = {}
        for entry, lesson in self._lessons_kept(input_ids, number):
            output, target = self.answer(entry, lesson), lesson.target
            added = target if entry.attention == "sliding" else target - _hidden(lesson.args, lesson.kwargs)
            losses[entry.layer] = normalized_mse(output, target, weights, size=added)
        return losses

    def _lessons_kept(
        self, ids: torch.Tensor, number: torch.Tensor | None
    ) -> Iterable[tuple[LayerPlan, AttentionLesson]]:
        if number is None or not self.keeps:
            return self.lessons(ids, self.changed)
        key = tuple(number.tolist())
        if key not in self.kept:
            while len(self.kept) >= self.keeps:
                del self.kept[next(iter(self.kept))]
            self.kept[key] = list(self.lessons(ids, self.changed))
        return self.kept[key]

    def lessons(self, ids: torch.Tensor, entries: Sequence[LayerPlan]) -> Iterator[tuple[LayerPlan, AttentionLesson]]:
        """What the base's modules do with ids `[B, T]`, all from one forward pass without a gradient."""
        seen: dict[int, AttentionLesson] = {}

        def record(layer: int) -> Any:
            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                seen[layer] = AttentionLesson(args, kwargs, _tensor(output))

            return hook

        modules = {entry.layer: self._module(self.teacher, entry) for entry in entries}
        hooks = [module.register_forward_hook(record(i), with_kwargs=True) for i, module in modules.items()]
        try:
            with torch.no_grad():
                self.run_teacher(ids)
        finally:
            for hook in hooks:
                hook.remove()
        for entry in entries:
            yield entry, seen.pop(entry.layer)

    def answer(self, entry: LayerPlan, lesson: AttentionLesson) -> torch.Tensor:
        """The output `[B, T, D]` of the student's module on what the base's saw."""
        return _tensor(self._module(self.student, entry)(*lesson.args, **lesson.kwargs))

    @torch.no_grad()
    def first_bad_layer(
        self, input_ids: torch.Tensor, weights: torch.Tensor | None = None, number: torch.Tensor | None = None
    ) -> int | None:
        """The lowest layer whose loss is not finite; None if there is none."""
        losses = self.layer_losses(input_ids, weights, number)
        return next((layer for layer, loss in losses.items() if not loss.isfinite()), None)

    @staticmethod
    def _module(model: PreTrainedModel, entry: LayerPlan) -> nn.Module:
        return attention_of(model, entry.layer) if entry.attention == "sliding" else decoder_layers(model)[entry.layer]


@dataclass(frozen=True)
class LogitLoss:
    """Settings of stage 2's terms: the KL's temperature, the weight of the cross entropy."""

    temperature: float = 1.0
    ce_weight: float = 0.0


@dataclass(frozen=True)
class Lesson:
    """What the teacher did with a batch: the stream at the first changed layer and its normed output, `[B, T, D]`, and
    the arguments of each layer from there up.
    """

    start: torch.Tensor
    arguments: dict[int, dict[str, Any]]
    output: torch.Tensor


class LogitDistiller(Distiller):
    """Stage 2: the whole student learns the teacher's distribution over the next token.

    Below the first changed layer the two are one: those layers run once, in the teacher, and get no gradient. The
    student's layers take their masks and rotary embeddings from the teacher's.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        layers: list[LayerPlan],
        end: int | None = None,
        loss: LogitLoss | None = None,
        checkpointing: Checkpointing = "none",
    ) -> None:
        super().__init__(student, teacher, layers, end)
        self.first = self.changed[0].layer if self.changed else 0
        self.loss, self.checkpointing = loss or LogitLoss(), checkpointing

    def forward(self, input_ids: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Return the sum of the terms for ids and token weights `[B, T]`."""
        lesson = self.teach(input_ids)
        *_, (_, hidden) = self.layer_outputs(lesson)
        return distillation_loss(
            self.student.get_decoder().norm(hidden),
            lesson.output,
            lambda rows: head_logits(self.student, rows),
            lambda rows: head_logits(self.teacher, rows),
            self.weights_or_mean(input_ids, weights),
            temperature=self.loss.temperature,
            labels=next_tokens(input_ids, self.end),
            ce_weight=self.loss.ce_weight,
        )

    @torch.no_grad()
    def teach(self, ids: torch.Tensor) -> Lesson:
        """Run the teacher on ids `[B, T]`."""
        layers = decoder_layers(self.teacher)
        arguments: dict[int, dict[str, Any]] = {}

        def record(index: int) -> Any:
            def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                arguments[index] = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                if index == self.first:
                    start.append(_hidden(args, kwargs))

            return hook

        start: list[torch.Tensor] = []
        indices = range(self.first, len(layers))
        hooks = [layers[index].register_forward_pre_hook(record(index), with_kwargs=True) for index in indices]
        try:
            output = self.run_teacher(ids)
        finally:
            for hook in hooks:
                hook.remove()
        return Lesson(start[0], arguments, output)

    def layer_outputs(self, lesson: Lesson) -> Iterator[tuple[int, torch.Tensor]]:
        """The outputs `[B, T, D]` of the student's layers from the first changed one up, one after the other."""
        hidden = lesson.start
        for index, arguments in lesson.arguments.items():
            layer = decoder_layers(self.student)[index]
            if self.checkpointing != "none" and torch.is_grad_enabled():
                kept = _matrix_products if self.checkpointing == "selective" else noop_context_fn
                hidden = _tensor(checkpoint(layer, hidden, use_reentrant=False, context_fn=kept, **arguments))
            else:
                hidden = _tensor(layer(hidden, **arguments))
            yield index, hidden

    @torch.no_grad()
    def first_bad_layer(self, input_ids: torch.Tensor, weights: torch.Tensor | None = None) -> int | None:
        """The lowest layer of the student whose output is not finite; None if there is none.

        Runs all layers whatever it finds: where they are sharded, processes that find different ones must not part.
        """
        outputs = self.layer_outputs(self.teach(input_ids))
        return min((layer for layer, hidden in outputs if not hidden.isfinite().all()), default=None)


def _matrix_products() -> Any:
    """What selective checkpointing keeps: attention of full layers and the products that take time, not LoRA's thin
    ones; what is cheap to compute again (norms, activations, windows) is most of the memory.
    """
    return create_selective_checkpoint_contexts(_worth_keeping)


def _worth_keeping(_: Any, operator: Any, *args: Any, **__: Any) -> CheckpointPolicy:
    name = operator.name()
    widths: tuple[int, ...] = ()
    if name in ("aten::mm", "aten::addmm"):
        widths = args[-2].shape[-1], args[-1].shape[-1]
    elif name == ONEDNN_PRODUCT:
        widths = tuple(args[1].shape)
    keep = min(widths, default=0) >= KEPT_WIDTH or "scaled_dot_product" in name
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _tensor(output: Any) -> torch.Tensor:
    found: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return found
