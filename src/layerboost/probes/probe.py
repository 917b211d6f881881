"""The base's view of a text, and what any plan loses against it at the price of the layers above its first change."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from layerboost.data.retrieval import Prompts
from layerboost.data.traffic import Traffic
from layerboost.model.stream import Beginning, LayerStream
from layerboost.probes.metrics import TEXT_METRICS, BasePrompts, BaseText, check_values, score
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.sensitivity import Score
from layerboost.strategies import FULL

# Damage by metric, one value a sequence, prompt or item: `[N]`.
Damages = dict[str, torch.Tensor]
# Bytes of all beginnings at most, as a share of the weights'.
BEGINNINGS_SHARE = 0.5
# In longer texts the CPU kernel's causal path over all positions is faster than its masked one over the later.
BEGINNINGS_TOKENS = 1024


class Probe(Protocol):
    """Whatever can tell what plans lose; `streams` is where it starts from."""

    streams: Streams

    def damages(self, plans: Sequence[Sequence[LayerPlan]]) -> list[Damages]:
        """What each plan loses against the base."""

    def counts(self) -> dict[str, int]:
        """Tokens, answers or items behind each metric."""


class Streams:
    """Hidden states of batches before some layers of one plan, `kept`: the base's at first.

    A plan that agrees with `kept` up to a layer can start there. `inputs[layer][batch]`: `[B, T, D]`. A window drops
    nothing at the positions before it, so where a batch has a beginning, layers above a window leave those out.
    """

    def __init__(
        self, stream: LayerStream, first: list[torch.Tensor], beginnings: Sequence[Beginning | None] | None = None
    ) -> None:
        self.stream = stream
        self.beginnings = beginnings or [None] * len(first)
        self.kept = [LayerPlan(layer=layer, attention=FULL) for layer in range(len(stream.layers))]
        self.inputs = {0: first}

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Keep the states before `layer + 1`, from those before `layer`."""
        plan = self.kept[layer]
        self.inputs[layer + 1] = [self.stream.layer(layer, hidden, plan) for hidden in self.inputs[layer]]

    def follow(self, plan: Sequence[LayerPlan]) -> None:
        """Keep another plan's states, those before its first change for now."""
        changed = first_difference(self.kept, plan)
        self.kept = list(plan)
        self.inputs = {layer: hidden for layer, hidden in self.inputs.items() if layer <= changed}

    def start(self, plans: Sequence[Sequence[LayerPlan]]) -> int:
        """The highest kept layer at which all these plans are still as `kept`."""
        common = min(first_difference(self.kept, plan) for plan in plans)
        return max(layer for layer in self.inputs if layer <= common)

    def runs(self, plans: Sequence[Sequence[LayerPlan]]) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """Each batch under each plan: their numbers, the output of layer `start(plans)` `[B, T, D]`, the normed final
        state of all positions or of those after the ones that are as in the base.

        That layer's norm and projections are computed once for all plans.
        """
        start = self.start(plans)
        for batch, hidden in enumerate(self.inputs[start]):
            with self.stream.shared(start, hidden):
                begun = [self.stream.layer(start, hidden, plan[start]) for plan in plans]
            for number, plan in enumerate(plans):
                state, before = begun.pop(0), self._unchanged(batch, start, plan)
                if before is None:
                    yield batch, number, state, self.stream.finish(start + 1, state, plan)
                else:
                    later = state[:, before.positions :]
                    yield batch, number, state, self.stream.finish_after(before, start + 1, later)

    def _unchanged(self, batch: int, start: int, plan: Sequence[LayerPlan]) -> Beginning | None:
        """What is kept of the positions that a plan leaves as they are, if its layers above `start` are full."""
        beginning, changed = self.beginnings[batch], [entry for entry in plan if entry.changed]
        windows = [entry.window for entry in changed if entry.window and not entry.sink]
        if beginning is None or not windows or len(windows) < len(changed) or changed[-1].layer > start:
            return None
        return beginning.first(min(beginning.positions, *windows))


class TextProbe:
    """Damage to text and to retrieval prompts: TEXT_METRICS, `retrieval`, and `mse` where the layer after the
    first change is kept."""

    @torch.no_grad()
    def __init__(
        self,
        stream: LayerStream,
        text: Sequence[torch.Tensor | Traffic],
        prompts: Sequence[Prompts] = (),
        windows: Sequence[int] = (),
    ) -> None:
        """`text`: batches of ids `[B, T]` or of traffic; `prompts`: batches of retrieval prompts; `windows`: of the
        plans to come, if many of them change one layer of the base."""
        model, first = stream.model, []
        beginnings: list[Beginning | None] = []
        room = BEGINNINGS_SHARE * sum(weights.nbytes for weights in model.parameters()) if stream.can_continue else 0.0
        self.samples: list[BaseText | BasePrompts] = []
        sources: list[torch.Tensor | Traffic | Prompts] = [*text, *prompts]
        for source in sources:
            ids = source if isinstance(source, torch.Tensor) else source.ids.to(model.device)
            beginning = None
            # Two tokens at least are left behind a beginning: the first predicts the second.
            if windows and room > 0 and 3 <= ids.shape[1] <= BEGINNINGS_TOKENS:
                start, output, beginning = stream.forward_with_beginning(ids, min(max(windows), ids.shape[1] // 2))
                beginning = beginning if beginning.bytes <= room else None
                room -= beginning.bytes if beginning else 0
            else:
                start, output = stream.forward(ids)
            beginnings.append(beginning)
            first.append(start)
            if isinstance(source, Prompts):
                self.samples.append(prompts_sample := BasePrompts(model, source, output))
                check_values("retrieval of the base", prompts_sample.base, model, ids)
            else:
                scored = source.scored if isinstance(source, Traffic) else None
                self.samples.append(text_sample := BaseText(model, ids, output, scored))
                check_values("nll of the base", text_sample.by_sequence(text_sample.nll), model, ids)
        self.streams = Streams(stream, first, beginnings)

    @torch.no_grad()
    def damages(self, plans: Sequence[Sequence[LayerPlan]]) -> list[Damages]:
        """What each plan loses against the base, by sequence and prompt."""
        after = self.streams.inputs.get(self.streams.start(plans) + 1)
        found: list[list[Damages]] = [[] for _ in plans]
        for batch, number, state, final in self.streams.runs(plans):
            sample = self.samples[batch]
            found[number].append(sample.damages(final))
            if after is not None and isinstance(sample, BaseText):
                found[number][-1]["mse"] = relative_error(sample, state, after[batch])
        return [joined(parts) for parts in found]

    def counts(self) -> dict[str, int]:
        """Tokens or answers behind each metric."""
        texts = sum(len(sample.labels) for sample in self.samples if isinstance(sample, BaseText))
        answers = sum(len(sample.prompts.answers) for sample in self.samples if isinstance(sample, BasePrompts))
        return dict.fromkeys((*TEXT_METRICS, "mse", "cosine"), texts) | {"retrieval": answers}

    def base_nll(self) -> Score:
        """The base's own NLL, nats per token."""
        found = [s.by_sequence(s.nll) for s in self.samples if isinstance(s, BaseText)]
        return score(torch.cat(found), self.counts()["nll"])

    def base_retrieval(self) -> dict[str, Score] | None:
        """The base's own log-probability of an answer, in nats, and share of exact answers; None without prompts."""
        found = [sample for sample in self.samples if isinstance(sample, BasePrompts)]
        if not found:
            return None
        values = {"log_probability": [s.base for s in found], "exact": [s.exact.float() for s in found]}
        return {name: score(torch.cat(parts), self.counts()["retrieval"]) for name, parts in values.items()}


def first_difference(one: Sequence[LayerPlan], other: Sequence[LayerPlan]) -> int:
    """The lowest layer at which two plans differ; the last layer if none does."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((layer for layer, (a, b) in pairs if a != b), len(one) - 1)


def relative_error(text: BaseText, changed: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Squared error of a layer's output `[B, T, D]`, relative to the base's square, by sequence `[B]`."""
    rows = text.rows(base).float()
    error = (text.rows(changed).float() - rows).square().sum(-1)
    return text.by_sequence(error) / text.by_sequence(rows.square().sum(-1))


def joined(parts: Sequence[Damages]) -> Damages:
    """Damages of several batches as one."""
    metrics = dict.fromkeys(metric for part in parts for metric in part)
    return {metric: torch.cat([part[metric] for part in parts if metric in part]) for metric in metrics}
