from __future__ import annotations

from types import SimpleNamespace

import pytest

from layerboost import runtime
from layerboost.runtime import Progress


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
