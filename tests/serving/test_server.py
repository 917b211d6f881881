from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import save_tiny

from layerboost.errors import ConfigError
from layerboost.recipe import Bench
from layerboost.serving import guard
from layerboost.serving.command import check_port
from layerboost.serving.server import _gpu_bytes, last_words, running_server

# A command that starts a child which does not listen to SIGTERM, as a hanging worker would.
COMMAND = """
import subprocess, sys, time
deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", deaf])
time.sleep(600)
"""
OWNER = """
import subprocess, sys, time
guarded = [sys.executable, sys.argv[1], sys.executable, "-c", sys.argv[2]]
subprocess.Popen(guarded, stdin=subprocess.PIPE, start_new_session=True)
time.sleep(600)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_guarded_command_dies_with_its_owner(how: signal.Signals, survivors: Callable[[float], list[str]]) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, guard.__file__, COMMAND], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert owner.stdout
    assert owner.stdout.readline() == b"up\n"
    assert len(survivors(0)) == 4
    owner.send_signal(how)
    owner.wait()
    assert survivors(10) == []


def test_the_guard_ends_with_its_command(survivors: Callable[[float], list[str]]) -> None:
    leaver = COMMAND.replace("time.sleep(600)\n", "time.sleep(0.5)\n")
    with subprocess.Popen(
        [sys.executable, guard.__file__, sys.executable, "-c", leaver],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as guarded:
        assert guarded.wait(20) == -signal.SIGKILL
    assert survivors(2) == []


def test_a_taken_port_is_found_before_anything_starts(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", "")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} cannot be used") as raised:
            check_port(port)
        assert raised.value.exit_code == 2
        log_file = tmp_path / "server.log"
        with pytest.raises(ConfigError), running_server("model", folder, Bench(port=port), log_file):
            raise AssertionError("it started")
        assert not log_file.exists()
    check_port(port)


@pytest.mark.gpu
def test_gpu_memory_in_use() -> None:
    before = _gpu_bytes()
    held = torch.zeros(1 << 28, device="cuda")
    assert _gpu_bytes() - before >= held.numel()


def test_last_words_are_the_root_cause_first(tmp_path: Path) -> None:
    log_file = tmp_path / "server.log"
    log_file.write_text(
        "(EngineCore pid=7) ERROR 11-22 00:05:14 [core.py:1] ValueError: no room for the cache\n"
        "(EngineCore pid=7) ValueError: no room for the cache\n"
        "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above.\n"
    )
    assert last_words(log_file) == "ValueError: no room for the cache"
    log_file.write_text("usage: vllm serve\nvllm serve: error: unrecognized arguments: --wrong\n")
    assert last_words(log_file) == "serve: error: unrecognized arguments: --wrong"
    log_file.write_text("one\n\ntwo\nthree\nfour\n")
    assert last_words(log_file) == "two | three | four"
    log_file.write_text("")
    assert last_words(log_file) == "an empty log"


def test_stopping_is_quick(survivors: Callable[[float], list[str]]) -> None:
    started = time.monotonic()
    guarded = subprocess.Popen(
        [sys.executable, guard.__file__, "sleep", "600"], stdin=subprocess.PIPE, start_new_session=True
    )
    assert guarded.stdin
    guarded.stdin.close()
    guarded.wait(10)
    assert time.monotonic() - started < 10
    assert survivors(2) == []
