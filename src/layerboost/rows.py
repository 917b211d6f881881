"""Rows of JSONL and Parquet files, lines of text, files of packages; errors name the file and the line."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerboost.errors import ConfigError, first_line

# A JSON string that may hold half of a surrogate pair.
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
LFS_POINTER = "version https://git-lfs"
# Texts that mean a missing value in a column converted to text.
NO_VALUE = {"nan", "NaN", "NaT", "None", "<NA>", "N/A", "n/a", "#N/A", "null", "NULL"}


def is_missing(value: Any) -> bool:
    """Return whether a field of a row is empty: null, NaN, blank, or a text that means one of these."""
    if isinstance(value, str):
        return not (word := value.strip()) or word in NO_VALUE
    return value is None or (isinstance(value, float) and math.isnan(value))


def read_rows(file: Path, column: str | None = None) -> Iterator[tuple[str, Any]]:
    """Yield each row with its place, as text, of a Parquet file, or else of a JSONL file, which may be gzipped.

    If a Parquet file has `column`, rows hold that column alone. Blank lines and byte order marks are skipped;
    halves of surrogate pairs become U+FFFD. Raise ConfigError for a file that cannot be read.
    """
    if file.name.lower().endswith(".parquet"):
        yield from _parquet_rows(file, column)
        return
    for where, line in read_lines(file):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            found = f"{error.msg}, character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else str(error)
            do = "correct or remove the line; a JSONL file holds one JSON object per line"
            raise ConfigError(f"{where} is not JSON", found=found, do=do) from None
        yield where, _well_formed(row) if SURROGATE.search(line) else row


def read_lines(file: Path) -> Iterator[tuple[str, str]]:
    """Yield each line with its place, as text, of a text file, perhaps gzipped; raise ConfigError if unreadable."""
    where = str(file)
    try:
        # Bytes that are not UTF-8 become surrogates, so that the error can name their line.
        opener: Any = gzip.open if file.name.lower().endswith(".gz") else open
        with opener(file, "rt", encoding="utf-8", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                where = f"line {number} of {file}"
                if number == 1 and line.startswith(LFS_POINTER):
                    raise ConfigError(f"{file} is a Git LFS pointer, not the data", do="fetch it with `git lfs pull`")
                line.encode()
                if "\0" in line:
                    raise ConfigError(
                        f"{where} holds NUL characters",
                        found="UTF-16 without a byte order mark, or data that is not text",
                        do=f"convert text: iconv -f UTF-16LE -t UTF-8 {file}",
                    )
                yield where, line.removeprefix("\ufeff")
    except UnicodeEncodeError:
        raise ConfigError(f"{where} is not UTF-8", do=f"convert it: iconv -f ENCODING -t UTF-8 {file}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"cannot read {file}", found=first_line(error)) from None


def package_files(package: str) -> list[Path]:
    """Return the files of a PyPI package; raise ConfigError if it is not installed."""
    try:
        files = importlib.metadata.files(package) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise ConfigError(f"package {package} is not installed", do=f"pip install --no-deps {package}") from None
    return [Path(str(file.locate())) for file in files]


def _parquet_rows(file: Path, column: str | None) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            columns = [column] if column in opened.schema_arrow.names else None
            number = 0
            for batch in opened.iter_batches(1024, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number} of {file}", row
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ConfigError(f"cannot read {file}", found=first_line(error)) from None


def _well_formed(row: Any) -> Any:
    """Return the row with U+FFFD for halves of surrogate pairs, which no tokenizer accepts."""
    text = json.dumps(row, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return json.loads(text)
