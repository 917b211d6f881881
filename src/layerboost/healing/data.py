"""The sequences of a healing stage: their lengths, and their order in steps and batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, groupby, islice
from pathlib import Path
from typing import Any

import torch

from layerboost.errors import ConfigError
from layerboost.recipe import Heal, Recipe
from layerboost.rows import read_rows
from layerboost.runtime import rank, world_size
from layerboost.schemas.artifact import fingerprint
from layerboost.text import shuffled
from layerboost.traffic import Request, Requests, Reread, Traffic, to_device

STRETCH_TOKENS = 2048
VALIDATION_SEQUENCES = 8
Batch = dict[str, Any]


def lengths_of(recipe: Recipe) -> tuple[int, ...]:
    """Return the lengths of healing's sequences, in tokens."""
    return recipe.heal.sequence_tokens or (recipe.text.sequence_tokens,)


def check_lengths(recipe: Recipe, context_tokens: int) -> None:
    """Raise ConfigError for sequences longer than the model's context, too little text for each length, or settings of
    text with requests."""
    lengths = lengths_of(recipe)
    of_text = ("sequence_tokens", "retrieval_share", "answer_weight")
    given = [f"heal.{key}" for key in of_text if getattr(recipe.heal, key) != Heal.model_fields[key].default]
    if recipe.heal.traffic and given:
        raise ConfigError(
            "heal.traffic replaces text, and some settings are for text alone",
            found=", ".join(given),
            do="leave them out: a request is one sequence, and its answers alone count in stage 2",
        )
    longest = max(lengths)
    if longest > context_tokens:
        raise ConfigError(
            "heal.sequence_tokens (by default text.sequence_tokens) must be within the model's context",
            found=f"{longest:,} tokens, a context of {context_tokens:,}",
        )
    for key in ("attention_tokens", "tokens") if len(lengths) > 1 else ():
        if 0 < (tokens := getattr(recipe.heal, key)) < len(lengths) * longest:
            raise ConfigError(
                f"heal.{key} must hold a sequence of the greatest length for each of heal.sequence_tokens",
                found=f"{tokens:,} tokens, {len(lengths)} x {longest:,}",
            )


def cut(ids: torch.Tensor, lengths: Sequence[int], opening: Sequence[int]) -> list[torch.Tensor]:
    """Return packed ids `[N, T]` as sequences `[L]`: the first row cut to the first length, the next to the next.

    Each length divides T, so all get the same number of tokens. A sequence that starts within a row begins with
    `opening`, in place of its first tokens.
    """
    sequences: list[torch.Tensor] = []
    for index, row in enumerate(ids):
        parts = row.clone().view(-1, lengths[index % len(lengths)])
        parts[1:, : len(opening)] = row.new_tensor(opening)
        sequences += parts
    return sequences


def load_requests(recipe: Recipe, tokenizer: Any, tokens: int) -> tuple[Traffic, list[Request], str]:
    """Return the first requests of heal.traffic, for validation; others, shuffled, that hold `tokens` tokens of text
    and images; and a hash of all.

    The pixels of the others are dropped, as they may not fit into memory, and read again for each step. Raise
    ConfigError for a file that cannot be used.
    """
    file = Path(recipe.heal.traffic or "")
    reader = Requests(file, tokenizer, recipe.text.sequence_tokens, "heal.traffic", recipe.trust_remote_code)
    rows = read_rows(file)
    first = list(islice(reader.read(rows), VALIDATION_SEQUENCES))
    requests, hashes, held = list[Request](), [request.fingerprint for request in first], 0
    held_out = set(hashes)
    for request in reader.read(shuffled(rows, recipe.seed)):
        if (found := request.fingerprint) in held_out:  # logs repeat requests
            continue
        requests.append(replace(request, given={}))
        hashes.append(found)
        held += len(request.ids)
        if held >= tokens:
            break
    reader.check(
        f"is too short: {tokens:,} tokens are needed after the first {VALIDATION_SEQUENCES} requests, which validate"
        if held < tokens or not requests
        else "",
        held=f"{held:,} tokens in {len(requests)} other requests of {file}",
        do="ask for fewer tokens (heal.tokens, heal.attention_tokens, heal.fit_tokens), or give more requests",
    )
    return Traffic.of(first), requests, fingerprint(*hashes)


class Data:
    """The sequences of a stage in the order of training, in steps of a fixed number of tokens, or of one longer one.

    A step's loss is the weighted mean over the tokens that count, however the step is cut into batches and whichever
    process has them: their weights sum to the number of batches.
    """

    def __init__(
        self,
        sequences: Sequence[torch.Tensor],
        tokens: int,
        settings: Heal,
        repeats: int = 1,
        weights: Sequence[torch.Tensor] | None = None,
        given: Sequence[Reread] = (),
    ) -> None:
        """Take the first `tokens` tokens of the sequences `[L]`, each stretch of them `repeats` times.

        `weights` `[L]`: those of the tokens, by default equal. A batch and a step hold as many tokens as `settings`
        give them of sequences as long as the first. If the sequences are requests, `given` reads what goes with the ids
        of each: a step has as many requests as it has sequences, each in a batch of its own.
        """
        length = len(sequences[0])
        self.tokens, self.repeats, self.given = tokens, repeats, given
        self.batch_tokens = batch_of_process(settings)[0] * length
        ends = accumulate(map(len, sequences))
        counts = (len(ids) + min(0, tokens - end) for ids, end in zip(sequences, ends, strict=True))
        self.counts = [count for count in counts if count > 0]
        self.sequences = sequences[: len(self.counts)]
        # Without the tokens that do not count.
        self.weights = [
            (torch.arange(len(ids)) < count) * (weights[row] if weights else 1.0)
            for row, (ids, count) in enumerate(zip(self.sequences, self.counts, strict=True))
        ]
        sizes = [len(ids) for ids in self.sequences]
        places = [length] * len(sizes) if given else sizes
        steps = grouped(places, settings.batch_sequences * settings.gradient_accumulation * length)
        stretches = grouped([sum(sizes[row] for row in step) for step in steps], STRETCH_TOKENS)
        # The rows of each step, with the number of its stretch.
        self.order = [(number, steps[index]) for number, each in enumerate(stretches) for index in each * repeats]
        self.steps = len(self.order)
        self.ends = [0, *accumulate(sum(self.counts[row] for row in step) for _, step in self.order)]

    def batches(self, step: int, device: torch.device) -> list[Batch]:
        """Return this process's batches of a step, counted from 1: ids and weights `[B, T]`, each of one length.

        If text is repeated, also the batch's `place`: its stretch, first row and number; and what is `given` of a
        request.
        """
        stretch, rows = self.order[step - 1]
        parts: list[list[int]] = []
        for length, same in groupby(rows, key=lambda row: len(self.sequences[row])):
            indices, size = list(same), 1 if self.given else max(1, self.batch_tokens // length)
            parts += [indices[start : start + size] for start in range(0, len(indices), size)]
        # Every process has as many batches as any other: those that are missing are copies without weight.
        total = len(parts) + -len(parts) % world_size()
        weight = total / sum(float(self.weights[row].sum()) for row in rows)
        batches = []
        for number in range(rank(), total, world_size()):
            part = parts[number % len(parts)]
            ids = torch.stack([self.sequences[row] for row in part])
            weights = torch.stack([self.weights[row] for row in part]) * (weight if number < len(parts) else 0.0)
            batch: Batch = {"input_ids": ids.to(device), "weights": weights.to(device)}
            batch |= {"place": (stretch, rows[0], number)} if self.repeats > 1 else {}
            batch |= {"given": to_device(self.given[part[0]](), device)} if self.given else {}
            batches.append(batch)
        return batches

    @cached_property
    def answer_fraction(self) -> float:
        """Return the fraction of a loss that tokens with a weight above 1 have."""
        weights = torch.cat(self.weights)
        return float(weights[weights > 1].sum() / weights.sum())

    def seen(self, step: int) -> int:
        """Return the tokens of text trained on after `step` steps."""
        return round(self.ends[step] / self.repeats)


def grouped(sizes: Sequence[int], most: int) -> list[list[int]]:
    """Return the indices of `sizes` in order, in groups of one or more whose sizes sum to at most `most`."""
    groups: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if not groups or size > room:
            groups.append([])
            room = most
        groups[-1].append(index)
        room -= size
    return groups


def batch_of_process(settings: Heal) -> tuple[int, int]:
    """Return the sequences per batch and batches per step of one process: a step is the same for any number of them.

    Raise ConfigError if a step cannot be divided evenly, or if a model is to be sharded over one process.
    """
    batch, accumulation, processes = settings.batch_sequences, settings.gradient_accumulation, world_size()
    if settings.shard and processes == 1:
        raise ConfigError(
            "heal.shard divides the model among the processes of torchrun",
            found="one process",
            do="start `layerboost heal` with torchrun (docs/guide/gpus.md has the commands), or --set heal.shard=false",
        )
    if accumulation % processes == 0:
        return batch, accumulation // processes
    if batch % processes == 0:
        return batch // processes, accumulation
    raise ConfigError(
        f"a step cannot be divided among {processes} processes",
        found=f"heal.batch_sequences {batch}, heal.gradient_accumulation {accumulation}",
        do=f"make one of them a multiple of {processes}",
    )
