"""Training sequences that state facts and ask for them later: ordinary text rarely trains what a window forgets.

The wording and the facts differ from those of the retrieval tests in `layerboost.retrieval`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from layerboost.text import opening_ids

# The statement of a fact, and the question with its answer.
TEMPLATES = (
    ("\n{name}'s locker opens with {value}.\n", "\nTo open {name}'s locker one enters {value}.\n"),
    ("\nPlease note: the phone extension of {name} is {value}.\n", "\n{name} can be reached at extension {value}.\n"),
    ("\nOrder {value} was placed by {name}.\n", "\nThe order that {name} placed has the number {value}.\n"),
    ("\n{name} lives in room {value}.\n", "\nIf you look for {name}, go to room {value}.\n"),
)
NAMES = ("Anna", "Boris", "Clara", "David", "Elena", "Frank", "Grace", "Henry", "Irene", "Jonas", "Karen", "Lewis")
TOKENS_PER_FACT, MOST_FACTS = 128, len(NAMES)


def with_recall(sequences: Sequence[torch.Tensor], tokenizer: Any, fraction: float, seed: int) -> list[torch.Tensor]:
    """Return the sequences `[L]`, a `fraction` of each length, spread evenly, with facts; text is truncated.

    One fact per 128 tokens, at any place of the first half, asked for at any place after it. Documents of such a
    sequence become one. Sequences too short for a fact stay as they are.
    """
    result = list(sequences)
    seen: Counter[int] = Counter()
    for row, ids in enumerate(sequences):
        seen[len(ids)] += 1
        if int(seen[len(ids)] * fraction) > int((seen[len(ids)] - 1) * fraction):
            result[row] = torch.tensor(_recall(ids.tolist(), tokenizer, random.Random(f"{seed} {row}")))
    return result


def _recall(text: list[int], tokenizer: Any, draw: random.Random) -> list[int]:
    opening = opening_ids(tokenizer)
    body = [token for token in text if token not in (tokenizer.eos_token_id, *opening)]
    facts = []
    for name in draw.sample(NAMES, min(MOST_FACTS, max(1, len(text) // TOKENS_PER_FACT))):
        statement, question = draw.choice(TEMPLATES)
        value = draw.randrange(10 ** (digits := draw.randint(3, 6)), 10 ** (digits + 1))
        parts = (part.format(name=name, value=value) for part in (statement, question))
        facts.append([tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts])
    room = len(text) - len(opening) - sum(len(part) for fact in facts for part in fact)
    if room < len(text) // 2 or room > len(body):
        return text
    places = []
    for statement, question in facts:
        stated = draw.randrange(room // 2)
        places += [(stated, statement), (draw.randint(stated + 1, room), question)]
    body = body[:room]
    for place, part in sorted(places, key=lambda entry: entry[0], reverse=True):
        body[place:place] = part
    return opening + body
