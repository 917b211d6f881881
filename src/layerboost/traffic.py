"""The text that layers are measured on: the calibration split, or the user's own prompts and answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerboost.artifacts import fingerprint
from layerboost.errors import ConfigError
from layerboost.recipe import Recipe
from layerboost.runtime import log
from layerboost.text import Tokens, load_tokens, opening_ids

# Token ids of a row's pieces, each with whether damage is scored on it.
Pieces = list[tuple[list[int], bool]]


@dataclass(frozen=True)
class Traffic:
    """Rows of different length: `ids` `[N, T]`, padded on the right, which a causal model does not see.

    `scored` `[N, T]`: the tokens whose prediction counts. A row ends with its last one.
    """

    ids: torch.Tensor
    scored: torch.Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        position = torch.arange(1, self.ids.shape[1] + 1, device=self.ids.device)
        found: list[int] = (self.scored * position).amax(1).tolist()
        return found

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(self.lengths)

    @property
    def fingerprint(self) -> str:
        """Of the ids and of what is scored."""
        return fingerprint(self.ids.tolist(), self.scored.tolist())

    def batches(self, sequences: int) -> list[Traffic]:
        """Batches of at most `sequences` rows, each as wide as its longest row."""
        parts = map(Traffic, self.ids.split(sequences), self.scored.split(sequences))
        widths = [(part, max(part.lengths)) for part in parts]
        return [Traffic(part.ids[:, :width], part.scored[:, :width]) for part, width in widths]

    def to(self, device: torch.device) -> Traffic:
        """The same on a device."""
        return Traffic(self.ids.to(device), self.scored.to(device))


def load_calibration(recipe: Recipe, tokenizer: Any, tokens: int, run: Path | None) -> Tokens | Traffic:
    """`tokens` tokens to measure on and fit sinks on: of the recipe's traffic where it names a file, else of the
    calibration split.

    Raises ConfigError.
    """
    settings = recipe.measure
    if settings.traffic:
        file = Path(settings.traffic).expanduser()
        return load_traffic(file, tokenizer, recipe.text.sequence_tokens, tokens, settings.skip_tokens)
    length = recipe.text.sequence_tokens
    skipped = -(-settings.skip_tokens // length)
    found = load_tokens(recipe.text, tokenizer, "calibration", skipped * length + tokens, run=run)
    return found if skipped == 0 else Tokens(found.ids[skipped:], fingerprint(found.ids[skipped:].tolist()))


def load_traffic(file: Path, tokenizer: Any, most: int, tokens: int, skip: int = 0) -> Traffic:
    """Rows of a JSONL file in its order, until they hold `tokens` tokens after the first `skip`, the longest first.

    A row is `prompt` and `answer`; or `messages`, put into the tokenizer's chat template, whose answers are the
    assistant's turns; or `text`. Answers are scored, of plain text every token. Rows are cut at `most` tokens. Raises
    ConfigError.
    """
    rows: list[tuple[list[int], list[bool]]] = []
    seen = unanswered = 0
    for where, row in _read(file):
        ids, scored = _joined(_pieces(row, tokenizer, where), most)
        if not ids:
            unanswered += 1
            continue
        if seen >= skip:
            rows.append((ids, scored))
        seen += len(ids)
        if seen >= skip + tokens:
            break
    if unanswered:
        log.warning("%d rows of %s have no answer within %d tokens and are left out", unanswered, file, most)
    if len(rows) < 2:
        raise ConfigError(
            "the traffic must hold two rows to score, or there is no standard error",
            found=f"{len(rows)} in {file}, after {skip:,} tokens skipped, with an answer within {most:,} tokens",
            do="give more rows, or raise text.sequence_tokens",
        )
    rows.sort(key=lambda row: -len(row[0]))
    width = len(rows[0][0])
    padded = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    return Traffic(padded, torch.tensor([scored + [False] * (width - len(scored)) for _, scored in rows]))


def _read(file: Path) -> Iterator[tuple[str, Any]]:
    """Each row with the words for where it stands."""
    try:
        with file.open() as opened:
            lines = list(opened)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the traffic {file}", found=str(error), do="give a JSONL file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield f"line {number} of {file}", json.loads(line)
        except ValueError as error:
            raise ConfigError(f"line {number} of {file} is not JSON", found=str(error)) from None


def _pieces(row: Any, tokenizer: Any, where: str) -> Pieces:
    """The pieces of a row; raises ConfigError for one of another form."""
    fields = row if isinstance(row, dict) else {}
    strings = {key for key, value in fields.items() if isinstance(value, str) and value}
    if {"prompt", "answer"} <= strings:
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        return [([*opening_ids(tokenizer), *prompt], False), (answer, True)]
    if "messages" in fields:
        turns = _turns(fields["messages"], tokenizer, where)
        # The template writes its special tokens itself.
        return [(tokenizer(text, add_special_tokens=False)["input_ids"], answer) for text, answer in turns]
    if "text" in strings:
        text = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        return [([*opening_ids(tokenizer), *text], True)]
    raise ConfigError(
        f"{where} is no row of traffic",
        found=f"fields {', '.join(map(str, fields)) or 'none'}",
        do="give it prompt and answer, messages, or text, none of them empty",
    )


def _turns(messages: Any, tokenizer: Any, where: str) -> list[tuple[str, bool]]:
    """A conversation in the chat template, cut where the assistant's answers begin and end."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{where} has messages", found="a tokenizer without a chat template", do="give prompt and answer"
        )
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        answers = [(at, turn["content"].strip()) for at, turn in enumerate(messages) if turn["role"] == "assistant"]
        heads = [
            tokenizer.apply_chat_template(messages[:at], tokenize=False, add_generation_prompt=True)
            for at, _ in answers
        ]
    except Exception as error:  # templates raise their own, such as for roles in an order they do not take
        raise ConfigError(
            f"the chat template cannot render {where}",
            found=f"{type(error).__name__}: {error}",
            do="give messages a role and a text as content, in an order that the model takes",
        ) from None
    cut, done = [], 0
    for head, (_, answer) in zip(heads, answers, strict=True):
        start = whole.find(answer, len(head))
        if not whole.startswith(head) or start < 0:
            raise ConfigError(
                f"the answers of {where} cannot be told apart from the rest",
                found="a chat template that renders earlier turns in another way",
                do="give each turn as a row of prompt and answer",
            )
        end = start + len(answer)
        cut += [(whole[done : len(head)], False), (whole[len(head) : end], True)]
        done = end
    return cut


def _joined(pieces: Pieces, most: int) -> tuple[list[int], list[bool]]:
    """A row's ids and which are scored, up to the last that is; nothing where none within `most` can be predicted."""
    ids = [token for piece, _ in pieces for token in piece][:most]
    scored = [answer for piece, answer in pieces for _ in piece][:most]
    last = max((at for at, answer in enumerate(scored) if answer), default=0)
    return (ids[: last + 1], scored[: last + 1]) if last else ([], [])
