from __future__ import annotations

import os

# Tiny models run faster on one thread, and the hub is out of bounds.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and tables keep to it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import signal
from collections.abc import Callable
from pathlib import Path

# A shell starts background jobs with SIGINT ignored, and processes that tests start would inherit that.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest
import torch
import torch.utils.collect_env

torch.set_num_threads(1)
# lm-eval asks pip and the system for a page about the machine each time it scores; it starts eleven processes.
torch.utils.collect_env.get_pretty_env_info = lambda: "not asked for in tests"

pytest_plugins = ["served"]

MARKED = {"server", "multiprocess", "pipeline", "real", "gpu", "exhaustive"}
UNMARKED_S = 5.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        # All of vLLM in one worker, where its process is shared; of the rest each file, whose fixtures are made once.
        item.add_marker(pytest.mark.xdist_group("vllm" if item.get_closest_marker("server") else item.path.stem))
    items.sort(key=lambda item: item.get_closest_marker("server") is None)  # the longest group first


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the unmarked tests that took long: on an idle machine they need a marker."""
    seconds: dict[str, float] = {}
    for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("", []):
        if isinstance(report, pytest.TestReport) and not MARKED & set(report.keywords):
            seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration
    for name, duration in seconds.items():
        if duration > UNMARKED_S:
            terminalreporter.write_line(f"{duration:.1f} s without a marker: {name}")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden/ anew; review the difference")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Hold a text to the file of that name in tests/golden/."""

    def hold(name: str, text: str) -> None:
        file = Path(__file__).parent / "golden" / name
        if request.config.getoption("--update-golden"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        assert text == file.read_text(), f"{name} has changed: pytest --update-golden, and read the difference"

    return hold
