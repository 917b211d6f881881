"""The user's own requests, on which layers are measured and healed, and the calibration split in their place."""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from layerboost.errors import ConfigError, LayerboostError, first_line
from layerboost.recipe import Recipe
from layerboost.rows import is_missing, read_rows
from layerboost.runtime import warn_once
from layerboost.schemas.artifact import fingerprint
from layerboost.text import PIECE_CHARACTERS, Tokens, check_known, load_tokens, opening_ids, text_pieces

# Start and end of each answer in a text, in characters and in order.
Spans = list[tuple[int, int]]
# What a processor makes of the images of a row, by the names of a vision-language model's arguments.
Given = dict[str, torch.Tensor]
Reread = Callable[[], Given]
# Put around an answer in a rendered template: a character that no text uses.
MARK = "\ue0f0"
# The day in chat templates that name one, Llama 3's own default.
DAY = datetime(2024, 7, 26)
# What templates ask for today, as a macro of this day: Transformers 5.24 takes no functions. Jinja drops the newline.
_DIRECTIVES = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters]
_READ = {each: DAY.strftime(each) for each in _DIRECTIVES if DAY.strftime(each) != each}
_REPLACED = "".join(f".replace({each!r}, {read!r})" for each, read in {"%%": MARK, **_READ, MARK: "%"}.items())
TODAY = f"{{% macro strftime_now(format) %}}{{{{ format{_REPLACED} }}}}{{% endmacro %}}\n"


@dataclass(frozen=True)
class Request:
    """A row of a file, tokenized: its ids, which of them are scored, and what goes with the ids; `reread` reads that
    again from the row's images."""

    ids: list[int]
    scored: list[bool]
    given: Given
    reread: Reread

    @property
    def fingerprint(self) -> str:
        """Return a hash of the ids, of what is scored, and of images."""
        return fingerprint(self.ids, self.scored, _hashes(self.given))


@dataclass(frozen=True)
class Traffic:
    """Calibration prompts with answers, of different length: `ids` `[N, T]`, padded on the right.

    `scored` `[N, T]`: the tokens whose prediction counts; the last of them is the last token of a row. `images`: what
    goes with each row's ids, empty if no row has images.
    """

    ids: torch.Tensor
    scored: torch.Tensor
    images: tuple[Given, ...] = ()

    @staticmethod
    def of(requests: Sequence[Request]) -> Traffic:
        """Return requests in their order, padded to the longest."""
        ids = pad_sequence([torch.tensor(request.ids) for request in requests], batch_first=True)
        scored = pad_sequence([torch.tensor(request.scored) for request in requests], batch_first=True)
        images = tuple(request.given for request in requests)
        return Traffic(ids, scored, images if any(images) else ())

    @property
    def lengths(self) -> list[int]:
        """Return the number of tokens per row."""
        position = torch.arange(1, self.ids.shape[1] + 1, device=self.ids.device)
        return (self.scored * position).amax(1).tolist()

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all rows."""
        return sum(self.lengths)

    @property
    def given(self) -> Given:
        """Return what goes with the ids of a batch."""
        return self.images[0] if self.images else {}

    @property
    def fingerprint(self) -> str:
        """Return a hash of the ids, of what is scored, and of images."""
        return fingerprint(self.ids.tolist(), self.scored.tolist(), *map(_hashes, self.images))

    def batches(self, sequences: int, device: torch.device | str = "cpu") -> list[Traffic]:
        """Return batches of at most `sequences` rows, each as wide as its longest row, on a device; of one row if rows
        have images, which wrappers take in forms of their own."""
        size = 1 if self.images else sequences
        images: list[tuple[Given, ...]] = [(to_device(given, device),) for given in self.images]
        none: list[tuple[Given, ...]] = [()] * len(self.ids)
        parts = map(Traffic, self.ids.to(device).split(size), self.scored.to(device).split(size), images or none)
        widths = [(part, max(part.lengths)) for part in parts]
        return [Traffic(part.ids[:, :width], part.scored[:, :width], part.images) for part, width in widths]


def to_device(given: Given, device: torch.device | str) -> Given:
    """Return what goes with ids on a device."""
    return {name: value.to(device) for name, value in given.items()}


def unpacked(batch: torch.Tensor | Traffic) -> tuple[torch.Tensor, list[int], Given]:
    """Return the ids `[B, T]` of a batch, the tokens of each row, and what goes with the ids."""
    if isinstance(batch, Traffic):
        return batch.ids, batch.lengths, batch.given
    return batch, [batch.shape[1]] * len(batch), {}


def load_calibration(recipe: Recipe, tokenizer: Any, tokens: int, run: Path | None, after: int = 0) -> Tokens | Traffic:
    """Return `tokens` tokens to measure and to fit sinks on: of `measure.traffic`, or of the calibration split; those
    that follow `after` tokens.

    Raise ConfigError for a file or text that cannot be used.
    """
    settings = recipe.measure
    if settings.traffic:
        file, skip = Path(settings.traffic), settings.skip_tokens + after
        return load_traffic(file, tokenizer, recipe.text.sequence_tokens, tokens, skip, recipe.trust_remote_code)
    length = recipe.text.sequence_tokens
    skipped = -(-settings.skip_tokens // length) + -(-after // length)
    found = load_tokens(recipe.text, tokenizer, "calibration", skipped * length + tokens, run=run)
    return found if skipped == 0 else Tokens(found.ids[skipped:], fingerprint(found.ids[skipped:].tolist()))


def load_mlp_fit(recipe: Recipe, tokenizer: Any, run: Path | None) -> Tokens | Traffic:
    """Return the text that thinned MLPs are fitted on: as much as is measured, after it, because a fit does better on
    its own text than on other text. Raise ConfigError if there is too little."""
    tokens = recipe.measure.tokens
    return load_calibration(recipe, tokenizer, tokens, run, after=tokens)


class _Unscorable(Exception):
    """The reason why a row cannot be scored."""


@dataclass(frozen=True)
class _Row:
    """A row to tokenize: `opening` ids, then `text`, whose `answers` are scored. `given`: the part from the file;
    `images`: those in the text, in order."""

    opening: list[int]
    text: str
    answers: Spans
    given: str
    images: tuple[Any, ...] = ()


class Requests:
    """The requests in the rows of a JSONL or Parquet file.

    A row is `prompt` and `answer`; or `messages`, put into the tokenizer's chat template, whose answers are the
    assistant's turns; or `text`. Answers are scored, and every token of `text`. Rows are truncated to `most` tokens.
    A row may have `images`, which the model's processor reads. `setting` names the file in messages.
    """

    def __init__(
        self, file: Path, tokenizer: Any, most: int, setting: str = "measure.traffic", trust_remote_code: bool = False
    ) -> None:
        """Raise ConfigError for a tokenizer that cannot say where tokens are."""
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{setting} needs a fast tokenizer, which returns the places of tokens in the text",
                found=type(tokenizer).__name__,
                do="use a model with a tokenizer.json, or leave it out and use text alone",
            )
        self.file, self.tokenizer, self.most, self.setting = file, tokenizer, most, setting
        self.trust_remote_code = trust_remote_code
        self.opening = opening_ids(tokenizer)
        self.left_out: list[str] = []
        self.sample = ""

    @cached_property
    def processor(self) -> Any:
        """Return the model's processor; raise ConfigError without one."""
        return open_processor(self.tokenizer, self.setting, self.trust_remote_code)

    def read(self, rows: Iterable[tuple[str, Any]]) -> Iterator[Request]:
        """Yield the requests of rows with their places; those that cannot be scored are skipped and counted."""
        for where, row in rows:
            try:
                found = self._row(row)
                self.sample += f"{found.given}\n" if len(self.sample) < PIECE_CHARACTERS else ""
                ids, scored, given = self._encoded(found)
            except _Unscorable as reason:
                self.left_out.append(f"{where}: {reason}".splitlines()[0])
                continue
            yield Request(ids, scored, given, partial(self._reread, where, row) if found.images else dict)

    def check(self, problem: str, held: str, do: str) -> None:
        """Raise ConfigError for text that the tokenizer does not know, and for a `problem`, unless that is empty, with
        what the file `held`; warn if rows were skipped."""
        check_known(self.sample, self.tokenizer, str(self.file))
        if problem:
            found = f"{held}, truncated to {self.most:,} tokens"
            raise ConfigError(f"{self.setting} {problem}", found="; ".join([found, *self.left_out[:1]]), do=do)
        if self.left_out:
            warn_once(
                f"rows of {self.file} that cannot be scored are skipped: {len(self.left_out)}; the first is "
                f"{self.left_out[0]}"
            )

    def _row(self, row: Any) -> _Row:
        images = row.get("images") if isinstance(row, dict) else None
        if images == [] or is_missing(images):
            return _read(row, self.tokenizer, self.opening, self.setting)
        return _read_pictured(row, self.processor, self.file.parent)

    def _encoded(self, row: _Row) -> tuple[list[int], list[bool], Given]:
        return _seen(row, self.processor, self.most) if row.images else _encoded(row, self.tokenizer, self.most)

    def _reread(self, where: str, row: Any) -> Given:
        try:
            return self._encoded(self._row(row))[2]
        except _Unscorable as reason:
            raise LayerboostError(
                f"a request of {self.setting} can no longer be read",
                found=f"{where}: {reason}",
                do="restore its images and repeat the command",
            ) from None


def load_traffic(
    file: Path, tokenizer: Any, most: int, tokens: int, skip: int = 0, trust_remote_code: bool = False
) -> Traffic:
    """Return the requests of a file that hold the `tokens` tokens after the first `skip`, longest first.

    Raise ConfigError for a file without two rows to score.
    """
    reader = Requests(file, tokenizer, most, trust_remote_code=trust_remote_code)
    requests: list[Request] = []
    seen = 0
    for request in reader.read(read_rows(file)):
        if seen >= skip:
            requests.append(request)
        seen += len(request.ids)
        if seen >= skip + tokens:
            break
    reader.check(
        "must hold two rows to score: a standard error needs them" if len(requests) < 2 else "",
        held=f"{len(requests)} in {file}, after {skip:,} skipped tokens",
        do="give rows of prompt and answer, messages, or text (docs/reference/measure.md); or raise "
        "text.sequence_tokens",
    )
    return Traffic.of(sorted(requests, key=lambda request: -len(request.ids)))


def open_processor(tokenizer: Any, setting: str, trust_remote_code: bool = False) -> Any:
    """Return the processor in the directory of a model's tokenizer, which it uses; raise ConfigError without one.

    `setting` names the file with images.
    """
    from transformers import AutoProcessor, PreTrainedConfig

    try:
        reads_images = "vision_config" in PreTrainedConfig.get_config_dict(tokenizer.name_or_path)[0]
    except OSError:  # a GGUF file
        reads_images = False
    if not reads_images:
        raise ConfigError(
            f"{setting} has images, which this model cannot read",
            found="a language model without an image tower",
            do="use a vision-language model (`layerboost ls families`), or leave out images",
        )
    try:
        # Without a processor's files this is a tokenizer.
        found = AutoProcessor.from_pretrained(tokenizer.name_or_path, trust_remote_code=trust_remote_code)
        found.image_processor  # noqa: B018
    except Exception as error:  # each processor has its own
        raise ConfigError(
            f"{setting} has images, and the processor of the model cannot be loaded",
            found=first_line(error),
            do="copy its files (preprocessor_config.json, processor_config.json), install what it names, or leave out "
            "images",
        ) from None
    found.tokenizer = tokenizer
    return found


def _hashes(given: Given) -> dict[str, str]:
    return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in given.items()}


def _read(row: Any, tokenizer: Any, opening: list[int], setting: str) -> _Row:
    """Return a row of a file; raise _Unscorable for one of another form, ConfigError if no row can be used."""
    names = row if isinstance(row, dict) else {}
    fields = {key: value for key, value in names.items() if not is_missing(value)}
    strings = {key for key, value in fields.items() if isinstance(value, str)}
    if {"prompt", "answer"} <= strings:
        prompt, answer = row["prompt"], row["answer"]
        return _Row(opening, prompt + answer, [(len(prompt), len(prompt + answer))], f"{prompt}\n{answer}")
    if "messages" in fields:
        if not tokenizer.chat_template:
            raise ConfigError(
                f"{setting} has messages", found="a tokenizer without a chat template", do="give prompt and answer"
            )
        # The template writes its special tokens itself.
        turns = _turns(fields["messages"])
        return _Row([], *_rendered(turns, tokenizer), "\n".join(turn["content"] for turn in turns))
    if "text" in strings:
        text = row["text"]
        return _Row(opening, text, [(-1, len(text))], text)  # -1: a leading space may be a token without length
    named = ", ".join(map(str, names)) or type(row).__name__
    raise _Unscorable(f"no prompt and answer, no messages and no text, or an empty one, among {named}")


def _read_pictured(row: dict[str, Any], processor: Any, folder: Path) -> _Row:
    """Return a row with `images`, paths from `folder` on: a prompt that has the model's placeholders, and an answer; or
    messages, of which the last answer is scored. Raise _Unscorable for one of another form."""
    from PIL import Image

    if not isinstance(row["images"], list):
        raise _Unscorable(f"its images are not a list of files ({type(row['images']).__name__})")
    try:
        images = tuple(Image.open(folder / name).convert("RGB") for name in row["images"])
        if not is_missing(row.get("messages")):
            last = max(at for at, turn in enumerate(row["messages"]) if turn["role"] == "assistant")
            prompt = _in_template(processor, row["messages"][:last], add_generation_prompt=True)
            answer, opening = _turns([row["messages"][last]])[0]["content"], list[int]()
        else:
            prompt, answer, opening = row["prompt"], row["answer"], opening_ids(processor.tokenizer)
        return _Row(opening, prompt + answer, [(len(prompt), len(prompt + answer))], f"{answer}", images)
    except _Unscorable:
        raise
    except Exception as error:  # a row of any form, a file that is no image, a template's own
        raise _Unscorable(f"a row with images cannot be read ({type(error).__name__}: {error})") from None


def _turns(messages: Any) -> list[dict[str, Any]]:
    """Return the messages of a conversation, the content of each as one text, as vLLM passes them to a template.

    Null content is empty; parts become lines. Other fields that are null are removed: in a Parquet column they belong
    to other messages.
    """
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise _Unscorable("its messages are not a list of messages")
    turns = []
    for turn in messages:
        content, texts = turn.get("content"), []
        for part in content if isinstance(content, list) else [] if content is None else [content]:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            text = part.get("text") if kind == "text" else part
            if not isinstance(text, str):
                raise _Unscorable(f"the content of a message is or holds {kind}, not text")
            texts.append(text)
        turns.append({key: value for key, value in turn.items() if value is not None} | {"content": "\n".join(texts)})
    return turns


def _rendered(turns: list[dict[str, Any]], tokenizer: Any) -> tuple[str, Spans]:
    """Return a conversation in the chat template, and the spans of the assistant's answers in it, without white space
    around them.

    It is rendered a second time with a mark on both sides of each answer. If the template rewrites answers (it may
    remove the thinking from earlier turns), only the last one is scored, provided that it follows the generation prompt
    unchanged.
    """
    answers = [
        at for at, turn in enumerate(turns) if turn.get("role") == "assistant" and not is_missing(turn["content"])
    ]
    if not answers:
        raise _Unscorable("it has no answer")
    given, stripped, marked = [turns[at]["content"].strip() for at in answers], [*turns], [*turns]
    for at, answer in zip(answers, given, strict=True):
        stripped[at], marked[at] = turns[at] | {"content": answer}, turns[at] | {"content": f"{MARK}{answer}{MARK}"}
    try:
        text, framed = (_in_template(tokenizer, each) for each in (stripped, marked))
        pieces = framed.split(MARK)  # frame, answer, frame, answer, frame
        if "".join(pieces) == text and pieces[1::2] == given:
            ends = list(accumulate(map(len, pieces)))
            return text, [(end - len(answer), end) for answer, end in zip(given, ends[1::2], strict=True)]
        head = _in_template(tokenizer, stripped[: answers[-1]], add_generation_prompt=True)
    except Exception as error:  # templates raise errors of their own, such as for roles in the wrong order
        raise _Unscorable(f"the chat template cannot render it ({type(error).__name__}: {error})") from None
    if not text.startswith(head + given[-1]):
        raise _Unscorable("the chat template rewrites its answers")
    return text, [(len(head), len(head + given[-1]))]


def _in_template(owner: Any, turns: list[dict[str, Any]], **options: Any) -> str:
    """Return a conversation in a chat template, on DAY: with today's date (Llama 3.2) no run could go on tomorrow."""
    template = owner.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    if template and "strftime_now" in template:
        options["chat_template"] = TODAY + template
    return str(owner.apply_chat_template(turns, tokenize=False, **options))


def _seen(row: _Row, processor: Any, most: int) -> tuple[list[int], list[bool], Given]:
    """Return what `_encoded` does, of a row with images: a token is scored that the prompt alone does not have.

    Raise _Unscorable for a row of more than `most` tokens: it cannot be truncated without its images.
    """
    [(start, end)] = row.answers
    place = getattr(processor, "boi_token", None) or processor.image_token  # Gemma 3 has a token for the beginning
    if (places := row.text.count(place)) != len(row.images):
        raise _Unscorable(f"its text has {place} {places} times, and {len(row.images)} images")
    settings = {"images": list(row.images), "return_tensors": "pt", "add_special_tokens": bool(row.opening)}
    try:
        prompt, whole = (dict(processor(text=[text], **settings)) for text in (row.text[:start], row.text[:end]))
    except Exception as error:  # each processor has its own
        raise _Unscorable(f"the processor cannot read it ({type(error).__name__}: {error})") from None
    whole.pop("attention_mask", None)
    head, ids = (each.pop("input_ids")[0].tolist() for each in (prompt, whole))
    first = next((at for at, (one, other) in enumerate(zip(head, ids, strict=False)) if one != other), len(head))
    if not 0 < first < len(ids):
        raise _Unscorable("it has no answer after its prompt")
    if len(ids) > most:
        raise _Unscorable(f"it has {len(ids):,} tokens with its images, of at most {most:,}")
    return ids, [at >= first for at in range(len(ids))], whole


def _encoded(row: _Row, tokenizer: Any, most: int) -> tuple[list[int], list[bool], Given]:
    """Return a row's ids and which are scored, up to the last such one; raise _Unscorable if none can be predicted.

    The text is tokenized as a whole, as a model receives it: single parts may have other tokens. A token with any
    character of an answer is scored.
    """
    ids, scored, answers = [*row.opening], [False] * len(row.opening), row.answers
    passed = done = 0  # in answers, and in characters
    for place, piece in text_pieces(row.text):
        tokens = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        ids += tokens["input_ids"]
        for first, last in tokens["offset_mapping"]:
            # Tokens of spaces alone may have no length.
            start, end = place + first if first < last else done, place + last
            while passed < len(answers) and answers[passed][1] <= start:
                passed += 1
            scored.append(passed < len(answers) and answers[passed][0] < end)
            done = end
        if len(ids) >= most:
            break
    again = slice(len(row.opening), 2 * len(row.opening))
    if ids[again] == row.opening:  # a text that was rendered for a model has it already
        del ids[again], scored[again]
    ids, scored = ids[:most], scored[:most]
    if not (last := max((at for at, answer in enumerate(scored) if answer), default=0)):
        raise _Unscorable(f"it has no answer within {most:,} tokens")
    return ids[: last + 1], scored[: last + 1], {}
