from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Callable

import psutil
import pytest

MARK = "LAYERBOOST_TEST_MARK"


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def survivors(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[str]]:
    """Command lines of the living processes that the test started, whoever their parent is by now."""
    mark = uuid.uuid4().hex
    monkeypatch.setenv(MARK, mark)

    def living() -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found

    def after(patience_s: float) -> list[str]:
        deadline = time.monotonic() + patience_s
        while (found := living()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    return after
