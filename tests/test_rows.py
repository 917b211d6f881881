from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from layerboost.errors import ConfigError
from layerboost.rows import read_lines, read_rows

GOOD = b'{"text": "w3"}\n{"text": "w4"}\n'
SAME_ROWS = {
    "as it is": GOOD,
    "a byte order mark": b"\xef\xbb\xbf" + GOOD,
    "two files with byte order marks, joined": b"\xef\xbb\xbf" + GOOD[:15] + b"\xef\xbb\xbf" + GOOD[15:],
    "blank lines": b"\n" + GOOD[:15] + b"  \n\r\n" + GOOD[15:] + b"\n\n",
    "CRLF": GOOD.replace(b"\n", b"\r\n"),
    "CR": GOOD.replace(b"\n", b"\r"),
    "no line end at the end": GOOD.strip(),
}


@pytest.mark.parametrize("name", SAME_ROWS)
def test_rows_are_the_same_however_the_file_was_saved(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(SAME_ROWS[name])
    with gzip.open(tmp_path / "a.jsonl.gz", "wb") as file:
        file.write(SAME_ROWS[name])
    for file_name in ("a.jsonl", "a.jsonl.gz"):
        assert [row for _, row in read_rows(tmp_path / file_name)] == [{"text": "w3"}, {"text": "w4"}]


def test_a_row_says_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(SAME_ROWS["blank lines"])
    assert [where.split()[1] for where, _ in read_rows(tmp_path / "a.jsonl")] == ["2", "5"]
    pyarrow.parquet.write_table(pyarrow.table({"a": [1, 2], "b": ["x", "y"]}), tmp_path / "a.parquet")
    rows = list(read_rows(tmp_path / "a.parquet", "b"))
    assert rows[1] == (f"row 2 of {tmp_path / 'a.parquet'}", {"b": "y"})
    assert next(read_rows(tmp_path / "a.parquet", "c"))[1] == {"a": 1, "b": "x"}


BROKEN = {
    "a cut line": (GOOD + b'{"text": "w', "line 3 of .* is not JSON"),
    "an array over lines": (b"[\n" + GOOD + b"]", "line 1 of .* is not JSON"),
    "two rows in a line": (GOOD + b"{} {}\n", r"line 3 of .* is not JSON(.|\n)*Extra data, character 4"),
    "nested without end": (GOOD + b"[" * 100_000, "line 3 of .* is not JSON"),
    "Latin-1": (GOOD + b'{"text": "caf\xe9"}\n', r"line 3 of .* is not UTF-8(.|\n)*iconv"),
    "UTF-16, as PowerShell writes it": (GOOD.decode().encode("utf-16"), "line 1 of .* is not UTF-8"),
    "UTF-16 without a byte order mark": (GOOD.decode().encode("utf-16-le"), "line 1 of .* holds NUL characters"),
    "a block of zeros": (GOOD + bytes(512), r"line 3 of .* holds NUL characters(.|\n)*UTF-16"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_read_is_named_with_its_line(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        list(read_rows(tmp_path / "a.jsonl"))


def test_files_that_are_not_what_their_names_say(tmp_path: Path) -> None:
    whole = gzip.compress(GOOD * 1000)
    for name, content in (
        ("cut.jsonl.gz", whole[: len(whole) // 2]),
        ("plain.jsonl.gz", GOOD),
        ("damaged.jsonl.gz", whole[:20] + b"\xff" * 20 + whole[40:]),
        ("empty.parquet", b""),
        ("text.parquet", GOOD),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=f"cannot read .*{name}"):
            list(read_rows(tmp_path / name))
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere"):
        list(read_rows(tmp_path / "nowhere.jsonl"))
    (tmp_path / "empty.jsonl").touch()
    assert list(read_rows(tmp_path / "empty.jsonl")) == []


def test_halves_of_surrogate_pairs_become_replacement_characters(tmp_path: Path) -> None:
    rows = [{"text": "cut \ud83d", "parts": ["\ude00 x", None, float("inf")]}, {"text": "whole \U0001f600"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = (row for _, row in read_rows(tmp_path / "a.jsonl"))
    assert first == {"text": "cut \ufffd", "parts": ["\ufffd x", None, float("inf")]}
    assert second == rows[1]


def test_lines_of_text_end_where_files_end_them(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\u2028two\r\nthree".encode())
    assert [line for _, line in read_lines(tmp_path / "a.txt")] == ["one\u2028two\n", "three"]


def test_binary_data_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.raw").write_bytes(b"one\n" + bytes(range(128)))
    with pytest.raises(ConfigError, match=r"line 2 of .*a.raw holds NUL characters"):
        list(read_lines(tmp_path / "a.raw"))
