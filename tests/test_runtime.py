from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from layerboost import runtime
from layerboost.errors import ConfigError
from layerboost.recipe import Recipe
from layerboost.run_folder import locked
from layerboost.runtime import (
    Progress,
    clean_environment,
    is_main_process,
    rank,
    release_memory,
    start_runtime,
    world_size,
)


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


@pytest.mark.parametrize(
    ("variables", "processes", "number"),
    [
        ({}, 1, 0),
        ({"RANK": "3"}, 1, 0),
        ({"RANK": "3", "WORLD_SIZE": "1"}, 1, 0),
        ({"RANK": "3", "WORLD_SIZE": ""}, 1, 0),
        ({"RANK": "", "WORLD_SIZE": "two"}, 1, 0),
        ({"RANK": "3", "WORLD_SIZE": "4"}, 4, 3),
    ],
)
def test_ranks_count_among_several_processes_only(
    variables: dict[str, str], processes: int, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert (world_size(), rank()) == (processes, number)
    assert is_main_process() == (number == 0)


LEFTOVERS = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "elsewhere",
    "MASTER_PORT": "29500",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "OMPI_COMM_WORLD_SIZE": "4",
    "PMI_RANK": "2",
    "SLURM_NTASKS": "4",
    "RANKING": "mine",
}


def test_what_launchers_leave_behind_reaches_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(LEFTOVERS))
    clean_environment()
    assert os.environ.keys() - {"no_proxy", "NO_PROXY"} == {"SLURM_NTASKS", "RANKING"}
    several = LEFTOVERS | {"WORLD_SIZE": "2"}
    monkeypatch.setattr(os, "environ", dict(several))
    clean_environment()
    kept = os.environ.keys() - {"no_proxy", "NO_PROXY"}
    assert kept == {name for name in several if not name.startswith(("ACCELERATE_", "FSDP_", "OMPI_", "PMI_"))}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "localhost,127.0.0.1"),
        ({"NO_PROXY": "corp"}, "corp,localhost,127.0.0.1"),
        ({"no_proxy": "127.0.0.1,.corp"}, "127.0.0.1,.corp,localhost"),
        ({"no_proxy": "*"}, None),
    ],
)
def test_loopback_is_never_asked_through_a_proxy(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    clean_environment()
    clean_environment()
    assert dict(os.environ) == (dict.fromkeys(("no_proxy", "NO_PROXY"), expected) if expected else given)


@pytest.mark.parametrize("missing", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", None])
def test_a_world_size_without_its_launcher_is_refused(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else this process would wait a day for peers that nobody starts."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("WORLD_SIZE", "4")
    if missing:
        monkeypatch.delenv(missing)
    with pytest.raises(ConfigError, match="WORLD_SIZE is 4") as raised:
        start_runtime(Recipe())
    assert (missing or "RANK 7") in raised.value.found


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "run"):
        assert (tmp_path / "run").is_dir()
    assert "cannot be locked" in caplog.text


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link", "long name"])
def test_what_can_be_no_run_folder_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere" / "at all")
    name = {"file": "file", "below a file": "file/run", "dangling link": "link", "long name": "x" * 300}[kind]
    with pytest.raises(ConfigError, match="cannot be a run folder"), locked(tmp_path / name):
        raise AssertionError("it was used")
    assert {file.name for file in tmp_path.iterdir()} == {"file", "link"}
