"""Prompts that a model completes only if it attends far back: a passkey or a key-value pair in any text.

They show what a window loses; ordinary text barely does.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

import torch

from layerboost.errors import ConfigError
from layerboost.text import opening_ids

Kind = Literal["passkey", "key_value"]
KINDS: tuple[Kind, ...] = ("passkey", "key_value")
PASSKEY = (
    "\n\nThe pass key is {value}. Remember it. The pass key is {value}.\n\n",
    "\n\nThe pass key is",
)
KEY_VALUE = (
    "\n\nThe code for the {key} is {value}. Remember that the code for the {key} is {value}.\n\n",
    "\n\nThe code for the {key} is",
)
KEYS = ("harbor", "garden", "castle", "bridge", "market", "forest", "museum", "station")
PAIRS, DIGITS = 4, 5


@dataclass(frozen=True)
class Prompts:
    """Prompts of one kind and length: `ids` `[N, T]`, of which the last `answers[n]` ids of row n are the answer.

    `depths`: the position of the requested fact, as a fraction of the prompt.
    """

    kind: Kind
    ids: torch.Tensor
    answers: tuple[int, ...]
    depths: tuple[float, ...]

    def batches(self, sequences: int) -> list[Prompts]:
        """Return parts of at most `sequences` rows."""
        starts = range(0, len(self.ids), sequences)
        cut = [slice(start, start + sequences) for start in starts]
        return [Prompts(self.kind, self.ids[rows], self.answers[rows], self.depths[rows]) for rows in cut]


def retrieval_prompts(
    tokenizer: Any, filler: torch.Tensor, kind: Kind, length_tokens: int, count: int, seed: int
) -> Prompts:
    """Return `count` prompts of exactly `length_tokens` tokens, each in its own part of the token ids `filler`.

    Depths are spread evenly, the values drawn from `seed`. Raise ConfigError if filler or length is too short.
    """
    if len(filler) < count * length_tokens:
        raise ConfigError(
            f"the text is too short for {count} retrieval prompts of {length_tokens:,} tokens",
            found=f"{len(filler):,} tokens",
            do="give more text, or ask for fewer or shorter prompts",
        )
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


def _prompt(tokenizer: Any, text: list[int], kind: Kind, depth: float, draw: random.Random) -> tuple[list[int], int]:
    """Return one prompt as long as `text`, which is truncated, and the number of tokens of its answer."""

    def encode(words: str) -> list[int]:
        ids: list[int] = tokenizer(words, add_special_tokens=False)["input_ids"]
        return ids

    opening = opening_ids(tokenizer)
    if text[: len(opening)] != opening:
        text = (opening + text)[: len(text)]
    keys = draw.sample(KEYS, PAIRS if kind == "key_value" else 1)
    values = [str(value) for value in draw.sample(range(10 ** (DIGITS - 1), 10**DIGITS), len(keys))]
    fact, question = KEY_VALUE if kind == "key_value" else PASSKEY
    facts = [encode(fact.format(key=key, value=value)) for key, value in zip(keys, values, strict=True)]
    asked = question.format(key=keys[0])
    prompt = encode(asked)
    answer = encode(f"{asked} {values[0]}")[len(prompt) :]
    room = len(text) - sum(map(len, facts)) - len(prompt) - len(answer)
    if room < len(facts):
        raise ConfigError(
            "retrieval prompts are too short to hold their facts",
            found=f"{len(text)} tokens",
            do=f"ask for {len(text) - room + len(facts)} tokens or more",
        )
    # The requested fact at its depth, the others anywhere.
    places = sorted(
        [(int(depth * room), 0), *((draw.randrange(room), other) for other in range(1, len(facts)))], reverse=True
    )
    body = text[:room]
    for place, which in places:
        after = max(place, len(opening))
        body[after:after] = facts[which]
    return body + prompt + answer, len(answer)
