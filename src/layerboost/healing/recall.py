"""Training sequences that ask for what was read long before: ordinary text rarely trains what a window forgets.

Wordings, keys and values differ from those of the retrieval tests in `layerboost.retrieval`, which stay unseen.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from layerboost.text import opening_ids

NAMES = (
    *("Anna", "Boris", "Clara", "David", "Elena", "Frank", "Grace", "Henry", "Irene", "Jonas", "Karen", "Lewis"),
    *("Marta", "Nadia", "Oscar", "Paula", "Quentin", "Rosa", "Simon", "Tessa", "Ulrich", "Vera", "Walter", "Yusuf"),
)
TOWNS = ("Lisbon", "Oslo", "Vienna", "Dublin", "Cairo", "Boston", "Kyoto", "Lima", "Prague", "Naples", "Quebec", "Riga")
ANIMALS = ("parrot", "tortoise", "donkey", "ferret", "canary", "goat", "hamster", "lizard", "pony", "raven")


@dataclass(frozen=True)
class Topic:
    """A kind of fact on a person, in several wordings, and what asks for it; `values`: by default numbers."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]
    values: tuple[str, ...] = ()


TOPICS = (
    Topic(
        (
            "\n{name}'s locker opens with {value}.\n",
            " (On the lid of {name}'s locker somebody had scratched {value}.) ",
        ),
        ("\nTo open {name}'s locker one enters {value}.\n", " The lock of {name} had to be turned to {value}. "),
    ),
    Topic(
        ("\nPlease note: the phone extension of {name} is {value}.\n", "\n- {name}, extension {value}\n"),
        ("\n{name} can be reached at extension {value}.\n", " Whoever wants to talk to {name} dials {value}. "),
    ),
    Topic(
        ("\nOrder {value} was placed by {name}.\n", "\n| {name} | order {value} | paid |\n"),
        ("\nThe order that {name} placed has the number {value}.\n", " {name} complained about order {value}. "),
    ),
    Topic(
        ("\n{name} lives in room {value}.\n", ' "And {name}?" - "Upstairs, in room {value}." '),
        ("\nIf you look for {name}, go to room {value}.\n", " They climbed the stairs to see {name} in room {value}. "),
    ),
    Topic(
        ("\n{name} was born in {value}.\n", " {name}, who came from {value}, said nothing. "),
        ("\nBirthplaces. {name}: {value}.\n", " In letters {name} used to be called a child of {value}. "),
        TOWNS,
    ),
    Topic(
        ("\n{name} owns a {value}.\n", " At home {name} was awaited by nobody but a {value}. "),
        ("\nPets: {name} has a {value}.\n", " The neighbours complained of {name} and the {value}. "),
        ANIMALS,
    ),
)
# Tokens of text per fact or repeated passage; the fraction of repeated passages.
TOKENS_PER_PART, REPEATS = 128, 0.25
INTRODUCTIONS = ("\nTo repeat: ", "\n> ", " Once more, word for word: ")
# The least and the most tokens of a repeated passage. Its first CUE tokens say which one it is, the rest is the answer.
SHORTEST, LONGEST, CUE = 24, 48, 8


@dataclass(frozen=True)
class Part:
    """Token ids to insert at `place`, a fraction of the text; then the `copied` ids of a passage read before.

    `answer`: the range of its tokens that only the earlier text tells.
    """

    place: float
    ids: list[int]
    copied: int = 0
    answer: range = range(0)


def with_recall(
    sequences: Sequence[torch.Tensor], tokenizer: Any, fraction: float, seed: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the sequences `[L]`, a `fraction` of each length asking for what they said before, and their answers.

    Such sequences are spread evenly. They state facts and ask for them, or repeat passages, at distances up to their
    length; text is truncated, and their documents become one. Sequences too short for it stay as they are. Answers are
    bool `[L]`: the positions whose next token belongs to an answer.
    """
    changed = [(ids, torch.zeros(len(ids), dtype=torch.bool)) for ids in sequences]
    seen: Counter[int] = Counter()
    for row, ids in enumerate(sequences):
        seen[len(ids)] += 1
        if int(seen[len(ids)] * fraction) > int((seen[len(ids)] - 1) * fraction):
            changed[row] = _recall(ids, tokenizer, random.Random(f"{seed} {row}"))
    return [ids for ids, _ in changed], [answers for _, answers in changed]


def _recall(ids: torch.Tensor, tokenizer: Any, draw: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    length, opening = len(ids), opening_ids(tokenizer)
    body = [token for token in ids.tolist() if token not in (tokenizer.eos_token_id, *opening)]
    parts = sorted(_parts(length, tokenizer, draw), key=lambda part: part.place)
    room = length - len(opening) - sum(len(part.ids) + part.copied for part in parts)
    answers = torch.zeros(length, dtype=torch.bool)
    if not length // 2 <= room <= len(body):
        return ids, answers
    made, taken = list(opening), 0
    for part in parts:
        made += body[taken : int(part.place * room)]
        taken = int(part.place * room)
        start = draw.randint(len(opening), len(made) - part.copied)
        answers[[len(made) + index - 1 for index in part.answer]] = True
        made += part.ids + made[start : start + part.copied]
    return torch.tensor(made + body[taken:room]), answers


def _parts(length: int, tokenizer: Any, draw: random.Random) -> list[Part]:
    """Return what a sequence of `length` tokens gets: facts of a few topics, each on one person, and repetitions."""

    def encode(words: str) -> list[int]:
        return tokenizer(words, add_special_tokens=False)["input_ids"]

    parts = []
    topics = draw.sample(TOPICS, draw.randint(1, len(TOPICS)))
    longest = min(LONGEST, length // 8)
    for name in draw.sample(NAMES, min(len(NAMES), max(1, length // TOKENS_PER_PART))):
        distance = draw.random()
        stated = draw.uniform(0, 1 - distance)
        if longest >= SHORTEST and draw.random() < REPEATS:
            ids, copied = encode(draw.choice(INTRODUCTIONS)), draw.randint(SHORTEST, longest)
            answer = range(len(ids) + CUE, len(ids) + copied)
            # Not before there is something to repeat.
            parts.append(Part(draw.uniform(0.3, 1), ids, copied, answer))
            continue
        topic = draw.choice(topics)
        digits = draw.randint(3, 6)
        value = draw.choice(topic.values) if topic.values else str(draw.randrange(10**digits, 10 ** (digits + 1)))
        asked, end = draw.choice(topic.questions).format(name=name, value="{value}").split(" {value}")
        known, told = encode(asked), encode(f"{asked} {value}")
        parts.append(Part(stated, encode(draw.choice(topic.statements).format(name=name, value=value))))
        question = encode(f"{asked} {value}{end}")
        parts.append(Part(stated + distance, question, answer=range(len(known), len(told))))
    return parts
