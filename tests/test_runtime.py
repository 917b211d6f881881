from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from layerboost import runtime
from layerboost.runtime import Progress, release_memory


def test_time_left_is_told_once_something_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 40))
    monkeypatch.setattr(runtime, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    with Progress("reading", 100, "tokens") as progress:
        progress.skip(10)
        progress.advance(0)
        progress.advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "reading: 10/100 tokens, 0.0 tokens/s, nothing done yet",
        "reading: 20/100 tokens, 0.1 tokens/s, 640 s left",
    ]


@pytest.mark.parametrize(("processes", "cleaned_up"), [("1", "left"), ("2", "")])
def test_a_failed_process_does_not_wait_for_its_peers(processes: str, cleaned_up: str) -> None:
    """What waits for other processes is registered with atexit: under torchrun a failure must not come to it."""
    code = "import atexit; from layerboost.runtime import leave; atexit.register(print, 'left', end=''); leave(3)"
    ended = subprocess.run(
        [sys.executable, "-c", code], env={"WORLD_SIZE": processes}, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stdout) == (3, cleaned_up)


def test_a_stage_gives_back_what_it_held_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    release_memory()
    assert emptied == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    release_memory()
    assert emptied == [True]
