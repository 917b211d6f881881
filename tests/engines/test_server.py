from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from layerboost.engines import guard
from layerboost.engines.protocol import Command
from layerboost.engines.server import Server, check_port, gpu_bytes, guarded, last_words, running_server
from layerboost.errors import ConfigError
from layerboost.recipe import Bench

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
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} cannot be used") as raised:
            check_port(port)
        assert raised.value.exit_code == 2
        log_file = tmp_path / "server.log"
        command: Command = (["sleep", "600"], {})
        with pytest.raises(ConfigError), running_server("it", "model", tmp_path, command, Bench(port=port), log_file):
            raise AssertionError("it started")
        assert not log_file.exists()
    check_port(port)


@pytest.mark.gpu
def test_gpu_memory_in_use() -> None:
    before = gpu_bytes()
    held = torch.zeros(1 << 28, device="cuda")
    assert gpu_bytes() - before >= held.numel()


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
    guarded = subprocess.Popen(
        [sys.executable, guard.__file__, "sleep", "600"], stdin=subprocess.PIPE, start_new_session=True
    )
    assert guarded.stdin
    guarded.stdin.close()
    guarded.wait(guard.GRACE_S)  # without the grace period, that is
    assert survivors(2) == []


class Metrics(BaseHTTPRequestHandler):
    """Answers as vLLM does, of a model in a folder with an odd name."""

    def do_GET(self) -> None:
        labels = ('engine="0",model_name="/a} {b [c]"', 'engine="1",model_name="/a} {b [c]"')
        text = "".join(f"vllm:num_requests_running{{{each}}} 2.0\n" for each in labels)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_is_asked_without_a_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), Metrics) as answering:
        threading.Thread(target=answering.serve_forever, daemon=True).start()
        with subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE) as process:
            url = f"http://127.0.0.1:{answering.server_port}"
            server = Server("vLLM", "m", tmp_path, url, tmp_path / "log", process)
            try:
                assert server.metrics() == {"vllm:num_requests_running": [2.0, 2.0]}
                server.wait_until_ready(5)
            finally:
                process.kill()
        answering.shutdown()


def test_a_process_that_we_start_gets_an_environment_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "RANK": "1", "WORLD_SIZE": "2", "VLLM_API_KEY": "secret"})
    script = "import json, os; print(json.dumps(dict(os.environ)))"
    command = [sys.executable, "-c", script]
    with (tmp_path / "out").open("wb") as output, guarded(command, {"ADDED": "1"}, output) as process:
        process.wait(20)
    found = json.loads((tmp_path / "out").read_text())
    assert "127.0.0.1" in found["no_proxy"].split(",")
    assert found["NO_PROXY"] == found["no_proxy"]
    assert found["ADDED"] == "1"
    assert not found.keys() & {"RANK", "WORLD_SIZE", "VLLM_API_KEY"}
