"""Standard streams whose reader has gone, or that were never open, and terminals without a width."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_pipeline import layerboost

from layerboost.terminal import Steady

SCRIPT = """
import contextlib, logging, os, sys
from layerboost.terminal import prepare_terminal
prepare_terminal()
from rich.console import Console
with open(sys.argv[1], "w") as file:
    file.write("kept")
    for stream in (1, 2):
        with contextlib.suppress(BrokenPipeError):
            os.write(stream, b"as a library prints")
    print("x" * 100_000, flush=True)
    print("é\\udce9", file=sys.stderr)
    logging.getLogger().warning("a warning")
    Console().print("a table")
    Console(stderr=True).print("progress")
with open(sys.argv[1] + ".done", "w"):
    pass
"""


def test_a_stream_goes_on_when_its_reader_has_gone() -> None:
    reader, writer = os.pipe()
    stream = Steady(os.fdopen(writer, "w"))
    stream.write("read")
    stream.flush()
    os.close(reader)
    for _ in range(2):
        assert stream.write("not read") == 8
        stream.flush()
    stream.close()


@pytest.mark.parametrize("closing", ["2>&1 | true", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_ends_well_and_its_files_hold_nothing_else(closing: str, tmp_path: Path) -> None:
    file = tmp_path / "result"
    command = f"set -o pipefail; {sys.executable} -c '{SCRIPT}' {file} {closing}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert file.read_text() == "kept"
    assert (tmp_path / "result.done").exists()
    assert "Traceback" not in ended.stderr + ended.stdout


@pytest.mark.parametrize("columns", ["0", "", "²", "-5", "many"])
def test_a_width_that_is_none_loses_no_table(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("LINES", columns)
    assert "smollm2-135m.yaml" in layerboost("ls", "recipes").stdout
