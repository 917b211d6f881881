from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from tiny import RUNTIME

from layerboost.errors import ConfigError, first_line
from layerboost.model.base import find_model
from layerboost.model.files import check_gguf, remembered


def write_gguf(file: Path, number: float) -> Path:
    writer = GGUFWriter(file, "llama")
    embedding = np.ones((20, 32), np.float32)
    embedding[7, 3] = number
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(32, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return file


def test_a_gguf_file(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "good.gguf", 2.0)
    check_gguf(file)
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(ConfigError, match=r"good\.gguf cannot be read"):
        check_gguf(file)
    with pytest.raises(ConfigError, match=r"token_embd\.weight: 1 of 640, the first is nan at \[7, 3\], token 7"):
        check_gguf(write_gguf(tmp_path / "nan.gguf", float("nan")))
    (tmp_path / "pointer.GGUF").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ConfigError, match="Git LFS pointer"):
        find_model(str(tmp_path / "pointer.GGUF"), RUNTIME)


def test_a_directory_that_holds_an_adapter_alone(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="is an adapter, not a model"):
        find_model(str(tmp_path), RUNTIME)


def test_the_line_that_says_something() -> None:
    assert first_line(ValueError("field x is wrong:\n    too long\nmore")) == "field x is wrong: too long"
    assert first_line(ValueError("plain\nmore")) == "plain"
    assert first_line(ValueError()) == "ValueError"


def test_what_is_known_of_files_is_found_once_and_again_when_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, calls = tmp_path / "weights", []

    def find() -> str:
        calls.append(file.read_text())
        return file.read_text().upper()

    def remember(text: str | None = None) -> str:
        if text:
            file.write_text(text)
        return remembered("upper", [file], find)

    # Just written: it could change again within the clock's resolution.
    assert [remember("a"), remember(), len(calls)] == ["A", "A", 2]
    now = time.time()
    monkeypatch.setattr("layerboost.model.files.time.time", lambda: now + 3)
    assert [remember(), remember(), len(calls)] == ["A", "A", 3]
    assert [remember("b"), len(calls)] == ["B", 4]
    state = file.stat()
    file.write_text("c")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert [remember(), len(calls)] == ["C", 5]
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))  # no directory can be made there
    assert [remember(), remember(), len(calls)] == ["C", "C", 7]
