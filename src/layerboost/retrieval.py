"""Prompts that a model completes only if it attends far back: a fact in any text, or a passage to copy.

They show what a window loses; ordinary text barely does. Plans are chosen on KINDS alone: the other forms show whether
a model can look back or has learnt a form.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from layerboost.errors import ConfigError
from layerboost.recipe import RetrievalForm
from layerboost.text import opening_ids


@dataclass(frozen=True)
class Form:
    """How a prompt states its `facts` facts and asks for one."""

    fact: str = ""
    question: str = ""
    facts: int = 0


FORMS: dict[RetrievalForm, Form] = {
    "passkey": Form(
        "\n\nThe pass key is {value}. Remember it. The pass key is {value}.\n\n",
        "\n\nThe pass key is",
        facts=1,
    ),
    "key_value": Form(
        "\n\nThe code for the {key} is {value}. Remember that the code for the {key} is {value}.\n\n",
        "\n\nThe code for the {key} is",
        facts=4,
    ),
    "prose": Form(
        " By then the {key} had been given the figure {value}, and kept it. ",
        " As we have read, the {key} had been given the figure",
        facts=4,
    ),
    "json": Form('\n{{"place": "{key}", "visitors": {value}}}\n', '\n{{"place": "{key}", "visitors":', facts=4),
    "code": Form("\n{key}_limit = {value}\n", "\nprint({key}_limit)  # prints", facts=4),
    "copy": Form(),
}
# The kinds that layers and heads are chosen on.
KINDS: tuple[RetrievalForm, ...] = ("passkey", "key_value")
KEYS = ("harbor", "garden", "castle", "bridge", "market", "forest", "museum", "station")
DIGITS = 5
# Copying: tokens of the passage that the prompt repeats, and that the answer goes on with.
REPEATED, COPIED = 24, 12


@dataclass(frozen=True)
class Prompts:
    """Prompts of one form and length: `ids` `[N, T]`, of which the last `answers[n]` ids of row n are the answer.

    `depths`: the position of the requested fact, as a fraction of the prompt.
    """

    kind: RetrievalForm
    ids: torch.Tensor
    answers: tuple[int, ...]
    depths: tuple[float, ...]

    def batches(self, sequences: int) -> list[Prompts]:
        """Return parts of at most `sequences` rows."""
        starts = range(0, len(self.ids), sequences)
        cut = [slice(start, start + sequences) for start in starts]
        return [Prompts(self.kind, self.ids[rows], self.answers[rows], self.depths[rows]) for rows in cut]


def retrieval_prompts(
    tokenizer: Any, filler: torch.Tensor, kind: RetrievalForm, length_tokens: int, count: int, seed: int
) -> Prompts:
    """Return `count` prompts of exactly `length_tokens` tokens, each in its own part of the token ids `filler`.

    Depths are spread evenly, the values drawn from `seed`. Raise ConfigError if the length is too short.
    """
    draw = random.Random(f"{kind} {length_tokens} {seed}")
    depths = [(index + 0.5) / count for index in range(count)]
    draw.shuffle(depths)
    rows, answers = [], []
    for index, depth in enumerate(depths):
        text = filler[index * length_tokens : (index + 1) * length_tokens].tolist()
        row, answer = _prompt(tokenizer, text, kind, depth, draw)
        rows.append(row)
        answers.append(answer)
    return Prompts(kind, torch.tensor(rows), tuple(answers), tuple(depths))


def _prompt(
    tokenizer: Any, text: list[int], kind: RetrievalForm, depth: float, draw: random.Random
) -> tuple[list[int], int]:
    """Return one prompt as long as `text`, which is truncated, and the number of tokens of its answer."""
    form = FORMS[kind]

    def encode(words: str) -> list[int]:
        return list(tokenizer(words, add_special_tokens=False)["input_ids"])

    opening = opening_ids(tokenizer)
    if text[: len(opening)] != opening:
        text = (opening + text)[: len(text)]
    if not form.facts:
        return _copy(text, encode("\n\n"), depth, len(opening)), COPIED
    keys = draw.sample(KEYS, form.facts)
    values = [str(value) for value in draw.sample(range(10 ** (DIGITS - 1), 10**DIGITS), len(keys))]
    facts = [encode(form.fact.format(key=key, value=value)) for key, value in zip(keys, values, strict=True)]
    asked = form.question.format(key=keys[0])
    prompt = encode(asked)
    answer = encode(f"{asked} {values[0]}")[len(prompt) :]
    room = len(text) - sum(map(len, facts)) - len(prompt) - len(answer)
    _check_room(len(text), len(text) - room + len(facts))
    # The requested fact at its depth, the others anywhere.
    places = sorted(
        [(int(depth * room), 0), *((draw.randrange(room), other) for other in range(1, len(facts)))], reverse=True
    )
    body = text[:room]
    for place, which in places:
        after = max(place, len(opening))
        body[after:after] = facts[which]
    return body + prompt + answer, len(answer)


def _copy(text: list[int], gap: list[int], depth: float, opening: int) -> list[int]:
    """Return `text`, truncated, that ends by repeating a passage of its own."""
    passage = REPEATED + COPIED
    body = text[: len(text) - len(gap) - passage]
    _check_room(len(text), 2 * passage + len(gap) + opening)
    start = opening + int(depth * (len(body) - opening - passage))
    return body + gap + body[start : start + passage]


def _check_room(tokens: int, needed: int) -> None:
    """Raise ConfigError for a prompt too short for its facts."""
    if tokens < needed:
        raise ConfigError(
            "retrieval prompts are too short to hold their facts",
            found=f"{tokens} tokens",
            do=f"ask for {needed} tokens or more",
        )
