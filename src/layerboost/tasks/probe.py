"""Accuracy lost on lm-eval's tasks (LayerBoost, Eq. 3), computed from shared hidden states as all losses are.

lm-eval builds and tokenizes the prompts and scores the answers; only the log-likelihoods are computed here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerboost.errors import ConfigError
from layerboost.model.stream import LayerStream, head_logits
from layerboost.probes.metrics import check_values, score
from layerboost.probes.probe import Losses, Streams
from layerboost.schemas.plan import LayerPlan
from layerboost.schemas.sensitivity import Score
from layerboost.tasks.lm_eval import BenchTask, load_task
from layerboost.tasks.quiet import quiet

Likelihood = tuple[float, bool]
# The model's input, and the tokens to predict at its end, shifted by one.
Request = tuple[tuple[int, ...], list[int]]


@dataclass(frozen=True)
class Item:
    """One item of one task: lm-eval's document, and the numbers of the requests for its choices."""

    task: BenchTask
    leaf: Any
    doc: Any
    requests: list[int]


@dataclass(frozen=True)
class Batch:
    """Inputs `[B, T]`, padded on the right, and the P places at which requested tokens are predicted.

    `rows`, `columns` `[P]`: these places. Per request: `numbers`, its own; `targets`, its tokens; `places`, theirs.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor
    numbers: list[int]
    places: list[torch.Tensor]
    targets: list[torch.Tensor]

    def likelihoods(self, model: Any, hidden: torch.Tensor) -> dict[int, Likelihood]:
        """Return the log-likelihood of each request's tokens and whether they are the greedy ones, from `[B, T, D]`."""
        logits = head_logits(model, hidden[self.rows, self.columns]).float().log_softmax(-1)
        best = logits.argmax(-1)
        return {
            number: (float(logits[places, targets].sum()), bool((best[places] == targets).all()))
            for number, places, targets in zip(self.numbers, self.places, self.targets, strict=True)
        }


class TaskProbe:
    """The metric `benchmark`: accuracy lost per item, weighted so that the mean over items is the mean over tasks."""

    @torch.no_grad()
    def __init__(self, stream: LayerStream, tokenizer: Any, tasks: Sequence[BenchTask], batch_tokens: int) -> None:
        """`tasks`: from `load_choices`; `batch_tokens`: most tokens per forward pass, padding included."""
        self.tasks = tasks
        with quiet():
            self.items, instances = _items(tasks)
            requests = _tokenized(instances, stream.model, tokenizer)
        self.batches = _batches(requests, batch_tokens, stream.model.device)
        found = [stream.forward(batch.ids) for batch in self.batches]
        self.streams = Streams(stream, [first for first, _ in found])
        likelihoods: dict[int, Likelihood] = {}
        for batch, (_, final) in zip(self.batches, found, strict=True):
            likelihoods |= batch.likelihoods(stream.model, final)
        self.base = self._scores(likelihoods)
        for item in (~self.base.isfinite()).nonzero().flatten().tolist():
            asked = torch.tensor([requests[self.items[item].requests[0]][0]])
            check_values(f"{self.items[item].task.name} of the base", self.base[item : item + 1], stream.model, asked)

    @torch.no_grad()
    def losses(self, plans: Sequence[Sequence[LayerPlan]]) -> list[Losses]:
        """Return the quality loss of each plan against the base, by item."""
        found: list[dict[int, Likelihood]] = [{} for _ in plans]
        for batch, number, _, final in self.streams.runs(plans):
            found[number] |= self.batches[batch].likelihoods(self.streams.stream.model, final)
        every = sum(task.items for task in self.tasks)
        weights = torch.tensor(
            [every / (len(self.tasks) * item.task.items) for item in self.items], dtype=torch.float64
        )
        return [{"benchmark": weights * (self.base - self._scores(likelihoods))} for likelihoods in found]

    def counts(self) -> dict[str, int]:
        """Return the number of items."""
        return {"benchmark": len(self.items)}

    def base_tasks(self) -> dict[str, Score]:
        """Return the base's own score on each task."""
        parts = {task.name: [item.task is task for item in self.items] for task in self.tasks}
        return {name: score(self.base[torch.tensor(own)], sum(own)) for name, own in parts.items()}

    def _scores(self, likelihoods: dict[int, Likelihood]) -> torch.Tensor:
        """Return the task's metric per item, `[N]`; NaN if a likelihood is not finite: lm-eval would score it."""
        results = [
            item.leaf.process_results(item.doc, [likelihoods[number] for number in item.requests])
            for item in self.items
        ]
        values = [
            float(found[item.task.metric]) if all(math.isfinite(likelihoods[n][0]) for n in item.requests) else math.nan
            for item, found in zip(self.items, results, strict=True)
        ]
        return torch.tensor(values, dtype=torch.float64)


def load_choices(names: Sequence[str], bench_data: str | None, limit: int | None) -> list[BenchTask]:
    """Return multiple-choice tasks on their validation items, with lm-eval's prompts and metrics, to choose layers on.

    Raise ConfigError as `load_task` does, and for a task that needs anything but log-likelihoods.
    """
    if not names:
        return []
    with quiet():
        tasks = [load_task(name, bench_data, limit, validation=True) for name in names]
    for task in tasks:
        kinds = {leaf.OUTPUT_TYPE for leaf in task.leaves.values()}
        if kinds != {"multiple_choice"}:
            raise ConfigError(
                f"task {task.name} is not multiple choice",
                found=", ".join(sorted(kinds)),
                do="measure on tasks such as arc_easy, arc_challenge, mmlu, openbookqa",
            )
    return tasks


def _items(tasks: Sequence[BenchTask]) -> tuple[list[Item], list[Any]]:
    """Return every item, and all of lm-eval's requests."""
    items: list[Item] = []
    instances: list[Any] = []
    for task in tasks:
        for name, leaf in task.leaves.items():
            samples = task.samples[name] if task.samples else None
            leaf.build_all_requests(samples=samples)
            of_doc: dict[int, list[tuple[int, int]]] = {}
            for number, instance in enumerate(leaf.instances, len(instances)):
                of_doc.setdefault(instance.doc_id, []).append((instance.idx, number))
            instances += leaf.instances
            for doc_id, doc in leaf.doc_iterator(samples=samples):
                items.append(Item(task, leaf, doc, [number for _, number in sorted(of_doc[doc_id])]))
    return items, instances


def _tokenized(instances: list[Any], model: Any, tokenizer: Any) -> list[Request]:
    """Return lm-eval's own tokens of its requests, as it would pass them to the model."""
    from lm_eval.models.huggingface import HFLM

    class Tokenizing(HFLM):
        """Records the requests that lm-eval would compute."""

        def _loglikelihood_tokens(self, requests: Any, *_: Any, **__: Any) -> list[Likelihood]:
            self.requests = [(context, answer) for _, context, answer in requests]
            return [(0.0, False)] * len(requests)

    lm = Tokenizing(pretrained=model, tokenizer=tokenizer)
    lm.loglikelihood(instances)
    most = lm.max_length + 1
    return [(tuple((context + answer)[-most:][:-1]), answer) for context, answer in lm.requests]


def _batches(requests: Sequence[Request], batch_tokens: int, device: torch.device) -> list[Batch]:
    """Return the inputs in batches, each once, the longest first."""
    asked: dict[tuple[int, ...], list[int]] = {}
    for number, (tokens, _) in enumerate(requests):
        asked.setdefault(tokens, []).append(number)
    inputs = sorted(asked, key=lambda tokens: (-len(tokens), tokens))
    batches = []
    while inputs:
        size = max(1, batch_tokens // len(inputs[0]))
        part, inputs = inputs[:size], inputs[size:]
        ids = torch.tensor([[*tokens, *[0] * (len(part[0]) - len(tokens))] for tokens in part], device=device)
        where: list[tuple[int, int]] = []
        numbers, places, targets = [], [], []
        for row, tokens in enumerate(part):
            most = max(len(requests[number][1]) for number in asked[tokens])
            where += [(row, column) for column in range(len(tokens) - most, len(tokens))]
            for number in asked[tokens]:
                answer = requests[number][1]
                numbers.append(number)
                places.append(torch.arange(len(where) - len(answer), len(where), device=device))
                targets.append(torch.tensor(answer, device=device))
        rows, columns = torch.tensor(where, device=device).T
        batches.append(Batch(ids, rows, columns, numbers, places, targets))
    return batches
