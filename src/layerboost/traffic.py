"""The text that layers are measured on: the calibration split, or the user's own prompts and answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerboost.artifacts import fingerprint
from layerboost.errors import ConfigError
from layerboost.recipe import Recipe
from layerboost.rows import read_rows
from layerboost.runtime import warn_once
from layerboost.text import Tokens, load_tokens, opening_ids, token_ids

# Token ids of a row's pieces, each with whether damage is scored on it.
Pieces = list[tuple[list[int], bool]]
# Stands for an answer in a rendered template: a character that no text uses.
MARK = "\ue0f0"


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


class _Unscorable(Exception):
    """Why one row among others cannot be scored."""


def load_traffic(file: Path, tokenizer: Any, most: int, tokens: int, skip: int = 0) -> Traffic:
    """Rows of a JSONL or Parquet file in its order, until they hold `tokens` tokens after the first `skip`, the longest
    first.

    A row is `prompt` and `answer`; or `messages`, put into the tokenizer's chat template, whose answers are the
    assistant's turns; or `text`. Answers are scored, of plain text every token. Rows are cut at `most` tokens. Single
    rows that cannot be scored are left out and counted. Raises ConfigError.
    """
    rows: list[tuple[list[int], list[bool]]] = []
    left_out: list[str] = []
    seen = 0
    for where, row in read_rows(file):
        try:
            ids, scored = _joined(_pieces(row, tokenizer, most), most)
        except _Unscorable as reason:
            left_out.append(f"{where}: {reason}".splitlines()[0])
            continue
        if seen >= skip:
            rows.append((ids, scored))
        seen += len(ids)
        if seen >= skip + tokens:
            break
    if len(rows) < 2:
        found = f"{len(rows)} in {file}, after {skip:,} tokens skipped, cut at {most:,} tokens"
        raise ConfigError(
            "the traffic must hold two rows to score, or there is no standard error",
            found="; ".join([found, *left_out[:1]]),
            do="give rows of prompt and answer, messages, or text (docs/reference/measure.md); or raise "
            "text.sequence_tokens",
        )
    if left_out:
        warn_once(f"rows of {file} left out that cannot be scored: {len(left_out)}; the first is {left_out[0]}")
    rows.sort(key=lambda row: -len(row[0]))
    width = len(rows[0][0])
    padded = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in rows])
    return Traffic(padded, torch.tensor([scored + [False] * (width - len(scored)) for _, scored in rows]))


def _pieces(row: Any, tokenizer: Any, most: int) -> Pieces:
    """The pieces of a row; raises _Unscorable for one of another form, ConfigError where no row can be used."""
    fields = row if isinstance(row, dict) else {}
    strings = {key for key, value in fields.items() if isinstance(value, str) and value}
    opening = (opening_ids(tokenizer), False)

    def encode(text: str) -> list[int]:
        return token_ids(tokenizer, text, most)

    if {"prompt", "answer"} <= strings:
        return [opening, (encode(row["prompt"]), False), (encode(row["answer"]), True)]
    if "messages" in fields:
        if not tokenizer.chat_template:
            raise ConfigError(
                "the traffic has messages", found="a tokenizer without a chat template", do="give prompt and answer"
            )
        # The template writes its special tokens itself.
        return [(encode(text), answer) for text, answer in _turns(fields["messages"], tokenizer)]
    if "text" in strings:
        return [opening, (encode(row["text"]), True)]
    named = ", ".join(map(str, fields)) or type(row).__name__
    raise _Unscorable(f"no prompt and answer, no messages and no text, or an empty one, among {named}")


def _turns(messages: Any, tokenizer: Any) -> list[tuple[str, bool]]:
    """A conversation in the chat template, cut where the assistant's answers begin and end.

    It is rendered a second time with marks in place of the answers: what stands between the marks is the template's
    own. Where the template rewrites answers (it may take the thinking out of earlier turns), the last one alone is
    scored, if it follows the generation prompt as it was given.
    """
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise _Unscorable("its messages are not a list of messages")
    # As vLLM does with what is null, such as an answer beside tool calls.
    turns = [{**turn, "content": "" if turn.get("content") is None else turn["content"]} for turn in messages]
    if odd := [turn["content"] for turn in turns if not isinstance(turn["content"], str)]:
        raise _Unscorable(f"the content of a message is a {type(odd[0]).__name__}, not a text")
    answers = [at for at, turn in enumerate(turns) if turn.get("role") == "assistant" and turn["content"].strip()]
    if not answers:
        raise _Unscorable("it has no answer")
    marked = [*turns]
    for at in answers:
        marked[at] = turns[at] | {"content": MARK}
    given = [turns[at]["content"] for at in answers]
    try:
        whole, framed = (tokenizer.apply_chat_template(each, tokenize=False) for each in (turns, marked))
        frames = framed.split(MARK)
        found = _between(whole, frames, given)
        if not found:
            head = tokenizer.apply_chat_template(turns[: answers[-1]], tokenize=False, add_generation_prompt=True)
            found = _between(whole, [head, frames[-1]], given[-1:])
    except Exception as error:  # templates raise their own, such as for roles in an order they do not take
        raise _Unscorable(f"the chat template cannot render it ({type(error).__name__}: {error})") from None
    if not found:
        raise _Unscorable("the chat template writes its answers in another way than they were given")
    return found


def _between(whole: str, frames: list[str], answers: list[str]) -> list[tuple[str, bool]]:
    """`whole` as frames with the answers between them, or nothing if it is not made so.

    White space around an answer, of which a template may take some away, counts as frame.
    """
    if len(frames) != len(answers) + 1 or not whole.startswith(frames[0]):
        return []
    pieces, done, at = list[tuple[str, bool]](), 0, len(frames[0])
    for number, (answer, frame) in enumerate(zip(answers, frames[1:], strict=True), 1):
        text = answer.strip()
        before, after = answer.split(text, 1)
        start = whole.find(text, at, at + len(before) + len(text))
        end = start + len(text)
        follows = whole.find(frame, end, end + len(after) + len(frame))
        if number == len(answers):
            follows = len(whole) - len(frame) if whole.endswith(frame) else -1
        if (
            start < 0
            or follows < end
            or not (before.endswith(whole[at:start]) and after.startswith(whole[end:follows]))
        ):
            return []
        pieces += [(whole[done:start], False), (whole[start:end], True)]
        done, at = end, follows + len(frame)
    return pieces


def _joined(pieces: Pieces, most: int) -> tuple[list[int], list[bool]]:
    """A row's ids and which are scored, up to the last that is; raises _Unscorable where none can be predicted."""
    ids = [token for piece, _ in pieces for token in piece][:most]
    scored = [answer for piece, answer in pieces for _ in piece][:most]
    last = max((at for at, answer in enumerate(scored) if answer), default=0)
    if not last:
        raise _Unscorable(f"it has no answer within {most:,} tokens")
    return ids[: last + 1], scored[: last + 1]
