"""Fixtures of the tests with servers: a port, processes that outlive a test, the session's process of vLLM."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from multiprocessing.forkserver import ensure_running
from typing import TYPE_CHECKING

import processes
import psutil
import pytest

if TYPE_CHECKING:
    from offline import Vllm

MARK = "LAYERBOOST_TEST_MARK"


@pytest.fixture
def free_port() -> int:
    return processes.free_port()


@pytest.fixture
def survivors(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[str]]:
    """Command lines of the living processes that the test started, whoever their parent is by now."""
    mark = uuid.uuid4().hex
    ensure_running()  # of the test session, not of the test
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


@pytest.fixture(scope="session")
def vllm_with(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Vllm]]:
    """The session's process of vLLM in a given environment, started when it is first asked for."""
    from offline import Vllm

    folder = tmp_path_factory.mktemp("vllm")
    started: dict[str, Vllm] = {}

    def process(**environment: str) -> Vllm:
        key = str(environment)
        if key not in started:
            started[key] = Vllm(folder / f"{len(started)}.log", environment)
        return started[key]

    yield process
    for each in started.values():
        each.close()


@pytest.fixture(scope="session")
def stock_vllm(vllm_with: Callable[..., Vllm], tmp_path_factory: pytest.TempPathFactory) -> Vllm:
    """The session's process of vLLM without plugins, in which layerboost cannot be imported."""
    hidden = processes.without_layerboost(tmp_path_factory.mktemp("hidden"))
    return vllm_with(VLLM_PLUGINS="", **hidden)


@pytest.fixture(scope="session")
def vllm(vllm_with: Callable[..., Vllm]) -> Vllm:
    """The session's process of vLLM."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    return vllm_with()
