"""The base's predictions for a text, and the quality loss of plans, which run only from their first change up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch

from layerboost.model.stream import LayerStream, PrefixCache
from layerboost.probes.metrics import TEXT_METRICS, BasePrompts, BaseText, check_values, score
from layerboost.retrieval import Prompts
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.sensitivity import Score
from layerboost.traffic import Traffic

# Quality loss by metric, one value per sequence, prompt or item: `[N]`.
Losses = dict[str, torch.Tensor]
# Most bytes of all prefix caches, as a fraction of the weights'.
CACHE_FRACTION = 0.5
# In longer texts the CPU kernel's causal path over all positions is faster than its masked one over the later ones.
CACHE_TOKENS = 1024


class Probe(Protocol):
    """Measures the quality loss of plans; `streams`: the hidden states from which it starts."""

    streams: Streams

    def losses(self, plans: Sequence[Sequence[LayerPlan]]) -> list[Losses]:
        """Return the quality loss of each plan against the base."""

    def counts(self) -> dict[str, int]:
        """Return the number of tokens, answers or items by metric."""


class Streams:
    """Hidden states of batches before some layers of one plan, `plan`: the base's at first.

    A plan that equals `plan` up to a layer can start there. `inputs[layer][batch]`: `[B, T, D]`. A window drops nothing
    at the positions before it, so if a batch has a prefix cache, layers above a window skip those positions.
    """

    def __init__(
        self,
        stream: LayerStream,
        first: list[torch.Tensor],
        caches: Sequence[PrefixCache | None] | None = None,
        of_batch: Sequence[LayerStream] | None = None,
    ) -> None:
        self.stream, self.of_batch = stream, of_batch or [stream] * len(first)
        self.caches = caches or [None] * len(first)
        self.plan = stream.unchanged
        self.inputs = {0: first}

    @torch.no_grad()
    def advance(self, layer: int) -> None:
        """Compute the states before `layer + 1` from those before `layer`."""
        pairs = zip(self.of_batch, self.inputs[layer], strict=True)
        self.inputs[layer + 1] = [stream.layer(layer, hidden, self.plan[layer]) for stream, hidden in pairs]

    def follow(self, plan: Sequence[LayerPlan]) -> None:
        """Switch to another plan; keep the states up to the first layer that differs."""
        changed = first_difference(self.plan, plan)
        self.plan = list(plan)
        self.inputs = {layer: hidden for layer, hidden in self.inputs.items() if layer <= changed}

    def start(self, plans: Sequence[Sequence[LayerPlan]]) -> int:
        """Return the highest layer with states up to which all these plans equal `plan`."""
        common = min(first_difference(self.plan, plan) for plan in plans)
        return max(layer for layer in self.inputs if layer <= common)

    def runs(self, plans: Sequence[Sequence[LayerPlan]]) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """Yield for each batch and plan: their numbers, the output of layer `start(plans)` `[B, T, D]`, and the normed
        final state of all positions, or of those after the prefix that equals the base's.

        That layer's norm and projections are computed once for all plans.
        """
        start = self.start(plans)
        for batch, (stream, hidden) in enumerate(zip(self.of_batch, self.inputs[start], strict=True)):
            with stream.shared(start, hidden):
                states = [stream.layer(start, hidden, plan[start]) for plan in plans]
            for number, plan in enumerate(plans):
                state, before = states.pop(0), self._unchanged(batch, start, plan)
                if before is None:
                    yield batch, number, state, stream.finish(start + 1, state, plan)
                else:
                    later = state[:, before.positions :]
                    yield batch, number, state, stream.finish_after(before, start + 1, later)

    def _unchanged(self, batch: int, start: int, plan: Sequence[LayerPlan]) -> PrefixCache | None:
        """Return the cache of the positions that a plan does not change, if its layers above `start` are full."""
        cache, changed = self.caches[batch], [entry for entry in plan if entry.changed]
        windows = [entry.exact_positions for entry in changed if entry.exact_positions and not entry.mlp_changed]
        if cache is None or not windows or len(windows) < len(changed) or changed[-1].layer > start:
            return None
        return cache.first(min(cache.positions, *windows))


class TextProbe:
    """Quality loss on text and retrieval prompts: TEXT_METRICS, `retrieval`; `mse` if the base's states after the first
    changed layer are available."""

    @torch.no_grad()
    def __init__(
        self,
        stream: LayerStream,
        text: Sequence[torch.Tensor | Traffic],
        prompts: Sequence[Prompts] = (),
        windows: Sequence[int] = (),
    ) -> None:
        """`text`: batches of ids `[B, T]` or of the user's prompts; `prompts`: batches of retrieval prompts; `windows`:
        those of the plans, if many plans will change one layer of the base."""
        model, first, of_batch = stream.model, [], []
        caches: list[PrefixCache | None] = []
        room = CACHE_FRACTION * sum(weights.nbytes for weights in model.parameters()) if stream.can_continue else 0.0
        self.samples: list[BaseText | BasePrompts] = []
        sources: list[torch.Tensor | Traffic | Prompts] = [*text, *prompts]
        for source in sources:
            ids = source if isinstance(source, torch.Tensor) else source.ids.to(model.device)
            cache, given = None, source.given if isinstance(source, Traffic) else {}
            of_batch.append(each := stream.own() if given else stream)
            # At least two tokens follow a prefix: the first predicts the second.
            if windows and room > 0 and 3 <= ids.shape[1] <= CACHE_TOKENS and not given:
                start, output, cache = each.forward_with_cache(ids, min(max(windows), ids.shape[1] // 2))
                cache = cache if cache.bytes <= room else None
                room -= cache.bytes if cache else 0
            else:
                start, output = each.forward(ids, given=given)
            caches.append(cache)
            first.append(start)
            if isinstance(source, Prompts):
                self.samples.append(prompts_sample := BasePrompts(model, source, output))
                check_values("retrieval of the base", prompts_sample.base, model, ids)
            else:
                scored = source.scored if isinstance(source, Traffic) else None
                self.samples.append(text_sample := BaseText(model, ids, output, scored))
                check_values("nll of the base", text_sample.by_sequence(text_sample.nll), model, ids, given)
        self.streams = Streams(stream, first, caches, of_batch)

    @torch.no_grad()
    def losses(self, plans: Sequence[Sequence[LayerPlan]]) -> list[Losses]:
        """Return the quality loss of each plan against the base, by sequence and prompt."""
        after = self.streams.inputs.get(self.streams.start(plans) + 1)
        found: list[list[Losses]] = [[] for _ in plans]
        for batch, number, state, final in self.streams.runs(plans):
            sample = self.samples[batch]
            found[number].append(sample.losses(final))
            if after is not None and isinstance(sample, BaseText):
                found[number][-1]["mse"] = relative_error(sample, state, after[batch])
        return [joined(parts) for parts in found]

    def counts(self) -> dict[str, int]:
        """Return the number of tokens or answers by metric."""
        texts = sum(len(sample.labels) for sample in self.samples if isinstance(sample, BaseText))
        answers = sum(len(sample.prompts.answers) for sample in self.samples if isinstance(sample, BasePrompts))
        return dict.fromkeys((*TEXT_METRICS, "mse", "cosine"), texts) | {"retrieval": answers}

    def base_nll(self) -> Score:
        """Return the base's own NLL, in nats per token."""
        found = [s.by_sequence(s.nll) for s in self.samples if isinstance(s, BaseText)]
        return score(torch.cat(found), self.counts()["nll"])

    def base_retrieval(self) -> dict[str, Score] | None:
        """Return the base's log-probability of an answer, in nats, and fraction of exact answers, if any."""
        found = [sample for sample in self.samples if isinstance(sample, BasePrompts)]
        if not found:
            return None
        values = {"log_probability": [s.base for s in found], "exact": [s.exact.float() for s in found]}
        return {name: score(torch.cat(parts), self.counts()["retrieval"]) for name, parts in values.items()}


def first_difference(one: Sequence[LayerPlan], other: Sequence[LayerPlan]) -> int:
    """Return the lowest layer in which two plans differ; the last layer if they are equal."""
    pairs = enumerate(zip(one, other, strict=True))
    return next((layer for layer, (a, b) in pairs if a != b), len(one) - 1)


def relative_error(text: BaseText, changed: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Return the squared error of a layer's output `[B, T, D]`, relative to the base's square, by sequence `[B]`."""
    rows = text.rows(base).float()
    error = (text.rows(changed).float() - rows).square().sum(-1)
    return text.by_sequence(error) / text.by_sequence(rows.square().sum(-1))


def joined(parts: Sequence[Losses]) -> Losses:
    """Return the losses of several batches as one."""
    metrics = dict.fromkeys(metric for part in parts for metric in part)
    return {metric: torch.cat([part[metric] for part in parts if metric in part]) for metric in metrics}
