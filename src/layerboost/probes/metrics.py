"""Quality loss per sequence or prompt from hidden states, chunked over tokens: no `[B, T, V]` tensor ever exists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from layerboost.errors import LayerboostError
from layerboost.model.linear import linear
from layerboost.model.stream import explain_not_finite, head_logits, head_matrix
from layerboost.retrieval import Prompts
from layerboost.schemas.sensitivity import Score

# What a changed model loses on text, per token, in the order in which `BaseText` computes it.
TEXT_METRICS = ("kl", "nll", "top1")
CHUNK_TOKENS = 256
# Tokens and vocabulary of the logits that exist at once for a changed model: 4 MiB, which fit in a CPU cache.
ROWS, VOCABULARY = 1024, 1024


class SequenceLosses(NamedTuple):
    """Means over the predicted or scored tokens of each sequence, `[B]`, in nats: of a changed model, and the base's
    NLL."""

    kl: torch.Tensor
    nll: torch.Tensor
    base_nll: torch.Tensor


def token_losses(
    base_model: PreTrainedModel,
    base_hidden: torch.Tensor,
    ids: torch.Tensor,
    changed: torch.Tensor,
    changed_model: PreTrainedModel | None = None,
    scored: torch.Tensor | None = None,
) -> SequenceLosses:
    """Return KL(base ‖ changed) and both NLLs over `ids` `[B, T]`.

    `base_hidden`, `changed`: normed final hidden states `[B, T, D]`. The head is the base's unless `changed_model` has
    its own. `scored` `[B, T]`: the tokens whose prediction counts, None for all.
    """
    found: list[tuple[torch.Tensor, ...]] = []
    counts = torch.ones_like(ids[:, 1:], dtype=torch.bool) if scored is None else scored[:, 1:]
    rows = (each[:, :-1][counts].split(CHUNK_TOKENS) for each in (base_hidden, changed))
    for base_rows, changed_rows, target in zip(*rows, ids[:, 1:][counts].split(CHUNK_TOKENS), strict=True):
        base = head_logits(base_model, base_rows).float().log_softmax(-1)
        other = head_logits(changed_model or base_model, changed_rows).float().log_softmax(-1)
        nll, base_nll = (-each.gather(-1, target[:, None])[:, 0] for each in (other, base))
        found.append((torch.linalg.vecdot(base.exp(), base - other), nll, base_nll))
    values = [torch.cat(parts) for parts in zip(*found, strict=True)]
    if scored is None:
        return SequenceLosses(*(each.view(len(ids), -1).mean(-1) for each in values))
    lengths = counts.sum(1).tolist()
    return SequenceLosses(*(torch.stack([part.mean() for part in each.split(lengths)]) for each in values))


class BaseText:
    """The base's predictions for one batch of text, in compact form, and the losses of changed models against them.

    KL(p ‖ q) = Σ p log p − (Σ p W)·h + lse(W h), where W is the head and h the changed model's hidden state: with the
    base's expected row Σ p W `[N, D]` at hand, a changed model costs one product with W and one pass over its logits.
    Heads with a bias, a scale or a soft-cap, and half precision, go through `token_losses`.
    """

    def __init__(
        self, model: PreTrainedModel, ids: torch.Tensor, hidden: torch.Tensor, scored: torch.Tensor | None = None
    ) -> None:
        """`ids` `[B, T]`, `hidden`: the base's normed final state `[B, T, D]`; `scored` `[B, T]`: the tokens whose
        prediction counts, None for all."""
        self.model = model
        self.scored = torch.ones_like(ids[:, 1:], dtype=torch.bool) if scored is None else scored[:, 1:]
        self.lengths = self.scored.sum(1).tolist()
        self.labels = ids[:, 1:][self.scored]
        weight = head_matrix(model)
        self.weight = weight if weight is not None and weight.dtype == torch.float32 else None
        rows = self.rows(hidden)
        nll, top, expected, negentropy = [], [], [], []
        for chunk, target in zip(rows.split(CHUNK_TOKENS), self.labels.split(CHUNK_TOKENS), strict=True):
            logits = head_logits(model, chunk).float()
            if self.weight is None:
                logits = logits.log_softmax(-1)
            else:
                # Not log_softmax: on CPUs its sums are off by 1e-5, and a row Σ p W that much too long is 2e-4 of KL.
                logits -= head_statistics(chunk, self.weight)[0][:, None]
                probabilities = logits.exp()
                negentropy.append(torch.linalg.vecdot(probabilities, logits))
                expected.append(linear(probabilities, self.weight.T))
            nll.append(-logits.gather(-1, target[:, None])[:, 0])
            top.append(logits.argmax(-1))
        self.nll, self.top = torch.cat(nll), torch.cat(top)
        if self.weight is None:
            self.base_rows = rows
        else:
            self.expected, self.negentropy = torch.cat(expected), torch.cat(negentropy)

    def rows(self, states: torch.Tensor) -> torch.Tensor:
        """Return the states that predict scored tokens `[N, D]`, of states `[B, T, D]` at all or the last positions."""
        return states[:, :-1][self.scored[:, 1 - states.shape[1] :]]

    def by_sequence(self, values: torch.Tensor) -> torch.Tensor:
        """Return the means `[B]` of the scored tokens' values `[N]`."""
        return torch.stack([part.mean() for part in values.split(self.lengths)])

    def losses(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return TEXT_METRICS of a changed model's normed final state `[B, T, D]`: sequence means `[B]`.

        Positions before the last T are equal to the base's, and lose nothing.
        """
        changed = torch.zeros_like(self.scored)
        changed[:, 1 - hidden.shape[1] :] = True
        here = changed[self.scored]
        by_token = (self._general if self.weight is None else self._fast)(self.rows(hidden), here)
        losses = {}
        for metric, values in zip(TEXT_METRICS, by_token, strict=True):
            every = values.new_zeros(len(self.labels))
            every[here] = values
            losses[metric] = self.by_sequence(every)
        return losses

    def _fast(self, rows: torch.Tensor, here: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return KL, the increase of NLL, and whether the best token changes, of the scored tokens `here`."""
        assert self.weight is not None
        tokens = self.labels[here], self.top[here]
        parts = zip(*(each.split(ROWS) for each in (rows, *tokens)), strict=True)
        found = [head_statistics(some, self.weight, (labels, top)) for some, labels, top in parts]
        lse, most, right, top = (torch.cat(each) for each in zip(*found, strict=True))
        kl = self.negentropy[here] - torch.linalg.vecdot(self.expected[here], rows) + lse
        return kl, lse - right - self.nll[here], (top < most).float()

    def _general(self, rows: torch.Tensor, here: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the same as `_fast`, for any head."""
        kl, nll, moved = [], [], []
        of_base = (each[here] for each in (self.base_rows, self.labels, self.top, self.nll))
        parts = zip(*(each.split(CHUNK_TOKENS) for each in (rows, *of_base)), strict=True)
        for some, base_some, labels, top, base_nll in parts:
            base = head_logits(self.model, base_some).float().log_softmax(-1)
            other = head_logits(self.model, some).float().log_softmax(-1)
            kl.append(torch.linalg.vecdot(base.exp(), base - other))
            nll.append(-other.gather(-1, labels[:, None])[:, 0] - base_nll)
            moved.append((other.argmax(-1) != top).float())
        return torch.cat(kl), torch.cat(nll), torch.cat(moved)


class BasePrompts:
    """The base's answers to one batch of retrieval prompts, and the losses of changed models against them."""

    def __init__(self, model: PreTrainedModel, prompts: Prompts, hidden: torch.Tensor) -> None:
        """`hidden`: the base's normed final state `[B, T, D]`."""
        self.model, self.prompts = model, prompts
        self.base, self.exact = answer_scores(model, prompts, hidden)

    def losses(self, hidden: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `retrieval`: the log-probability lost per answer, `[B]`."""
        return {"retrieval": self.base - answer_scores(self.model, self.prompts, hidden)[0]}


def head_statistics(
    rows: torch.Tensor, weight: torch.Tensor, tokens: Sequence[torch.Tensor] = ()
) -> tuple[torch.Tensor, ...]:
    """Return log-sum-exp, maximum and those of `tokens`, `[N]` each, of the logits `rows` `[N, D]` × `weight` `[V, D]`.

    Logits exist for one block of the vocabulary at a time, `[N, VOCABULARY]`.
    """
    sums, highest = [], []
    picked = [rows.new_empty(len(rows)) for _ in tokens]
    for block, first in zip(weight.split(VOCABULARY), range(0, len(weight), VOCABULARY), strict=True):
        logits = linear(rows, block)
        for values, token in zip(picked, tokens, strict=True):
            place = token - first
            found = logits.gather(-1, place.clamp(0, len(block) - 1)[:, None])[:, 0]
            torch.where((place >= 0) & (place < len(block)), found, values, out=values)
        most = logits.amax(-1)
        highest.append(most)
        sums.append(most + logits.sub_(most[:, None]).exp_().sum(-1).log())
    return torch.stack(sums).logsumexp(0), torch.stack(highest).amax(0), *picked


def answer_scores(model: PreTrainedModel, prompts: Prompts, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probability of each answer in nats, and whether greedy decoding gives it exactly: `[B]` each.

    `hidden`: normed final states `[B, T, D]` over the prompts, answers included, or over their last T tokens.
    """
    rows = torch.cat([hidden[row, -n - 1 : -1] for row, n in enumerate(prompts.answers)])
    targets = torch.cat([prompts.ids[row, -n:] for row, n in enumerate(prompts.answers)]).to(rows.device)
    log_probabilities = head_logits(model, rows).float().log_softmax(-1)
    right = log_probabilities.gather(-1, targets[:, None])[:, 0].split(prompts.answers)
    hit = (log_probabilities.argmax(-1) == targets).split(prompts.answers)
    return torch.stack([part.sum() for part in right]), torch.stack([part.all() for part in hit])


def check_values(
    what: str,
    values: torch.Tensor,
    model: PreTrainedModel,
    ids: torch.Tensor,
    given: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Raise LayerboostError, naming layer and token, for a value `[N]` of sequences `[N, T]` that is not finite;
    `given`: what goes with the ids."""
    for row in (~values.isfinite()).nonzero().flatten().tolist():
        where, do = explain_not_finite(model, ids[row], given)
        raise LayerboostError(f"{what} is {float(values[row])}", found=where or f"in sequence {row + 1}", do=do)


def check_finite(what: str, values: Mapping[str, float], dtype: torch.dtype) -> None:
    """Raise LayerboostError if a metric of a changed model is not finite: no plan can use it."""
    for metric, value in values.items():
        if not math.isfinite(value):
            do = "leave this text out" if dtype == torch.float32 else "measure with --set dtype=float32"
            name = str(dtype).removeprefix("torch.")
            raise LayerboostError(
                f"{metric} of {what} is {value}", found=f"the base is finite on this text, in {name}", do=do
            )


def score(values: torch.Tensor, count: int) -> Score:
    """Return the mean of `[N]` sequences or items and its standard error; `count`: of tokens, answers or items."""
    return Score.of(values.double().tolist(), count)
