from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny

from layerboost.errors import ConfigError
from layerboost.recipe import Bench
from layerboost.serving import guard
from layerboost.serving.server import (
    _gpu_bytes,
    check_port,
    check_vllm,
    cores,
    last_words,
    running_server,
    serve_argv,
    serve_command,
    vllm_environment,
    with_flags,
)

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


def test_missing_vllm_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)  # what Python itself writes down for a module that is not there
    with pytest.raises(ConfigError, match=r"\.\[serve-cpu\]"):
        check_vllm()


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_serve_argv(tmp_path: Path, free_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    folder = save_tiny(tmp_path / "model", "llama", "nf")
    argv, environment = serve_argv(folder, free_port, ("--dtype", "bfloat16"))
    assert Path(argv[0]).parent == Path(sys.executable).parent
    assert argv[1:5] == ["serve", str(folder), "--port", str(free_port)]
    assert argv.count("--dtype") == 1
    assert environment["HF_HUB_OFFLINE"] == "1"
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        # The port that vLLM will take is looked at, and no other.
        with pytest.raises(ConfigError, match=f"port {port} cannot be used"):
            serve_argv(folder, free_port, ("--port", str(port)))
        argv, _ = serve_argv(folder, port, (f"--port={free_port}",))
        assert argv[3:] != ["--port", str(port)]
        assert str(port) not in argv
    if hasattr(os, "sched_getaffinity") and "VLLM_CPU_OMP_THREADS_BIND" in environment:
        assert environment["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, sorted(os.sched_getaffinity(0))))


def test_vllm_environment_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layerboost.serving.server.runs_on_cpu", lambda: True)
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024")
    added = vllm_environment()
    assert added["VLLM_CPU_OMP_THREADS_BIND"] == ",".join(map(str, cores()))
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in added, "what the user sets stays"
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    assert int(vllm_environment()["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]) < 1024


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_as_many_requests_decode_as_are_in_flight(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def flags(**changes: Any) -> dict[str, str]:
        argv = serve_command(tmp_path, Bench(**{"kv_cache_gib": 0.5, **changes}))[0]
        return dict(pairwise(argv))

    assert flags()["--max-num-seqs"] == "200"
    assert "--max-num-seqs" not in flags(concurrency=[64])
    assert "--no-enable-prefix-caching" in flags()
    assert "--no-enable-prefix-caching" not in flags(shared_prefix_tokens=64)
    few = flags(server_args=["--max-num-batched-tokens", "160"])
    assert few["--max-num-seqs"] == "160"
    assert "at most 160 of 200 requests decode at once" in caplog.text
    assert flags(server_args=["--max_num_batched_tokens=160"])["--max-num-seqs"] == "160"
    assert flags(concurrency=[4096])["--max-num-seqs"] == "2048"


@pytest.mark.gpu
def test_gpu_memory_in_use() -> None:
    before = _gpu_bytes()
    held = torch.zeros(1 << 28, device="cuda")
    assert _gpu_bytes() - before >= held.numel()


def test_given_flags_win_over_advised_ones() -> None:
    advised = ("--max-num-batched-tokens", "256", "--block-size", "32")
    assert with_flags((), advised) == advised
    assert with_flags(("--block_size=16", "-O0"), advised) == (*advised[:2], "--block_size=16", "-O0")
    edited = ("--enforce-eager", *advised, "--no-enable-prefix-caching")
    assert with_flags((), edited) == edited
    assert with_flags(("--enforce-eager", "--block-size", "16"), edited) == (
        *("--max-num-batched-tokens", "256", "--no-enable-prefix-caching", "--enforce-eager", "--block-size", "16"),
    )


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
