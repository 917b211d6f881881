"""Processes for tests whose subject is a process: forked from one that has imported everything, so that they start at
once."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["layerboost.cli", "layerboost.healing.stage", "layerboost.measuring.stage"])


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def without_layerboost(folder: Path) -> dict[str, str]:
    """The environment of a process in which layerboost cannot be imported, as where it is not installed."""
    (folder / "layerboost").mkdir()
    (folder / "layerboost" / "__init__.py").write_text('raise ImportError("layerboost is hidden")\n')
    return {"PYTHONPATH": str(folder)}


class Forked:
    """A process that runs `target(*arguments)`; what it prints goes to `output` and `errors`."""

    def __init__(
        self,
        target: Callable[..., None],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        folder: Path,
        name: str = "process",
    ) -> None:
        self.output, self.errors = folder / f"{name}.stdout", folder / f"{name}.stderr"
        mine = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        self.process = FORKS.Process(target=_run, args=(target, arguments, mine, self.output, self.errors))
        self.process.start()
        self.pid = self.process.pid or 0

    @property
    def ended(self) -> bool:
        """Whether the process has ended."""
        return self.process.exitcode is not None

    def send(self, number: signal.Signals) -> None:
        """Send a signal, which the process may have preceded by its end."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self, patience_s: float = 120) -> int:
        """Return the exit code: minus the signal's number where one ended it."""
        self.process.join(patience_s)
        assert self.process.exitcode is not None, f"still running after {patience_s} s: {self.errors.read_text()}"
        return self.process.exitcode

    def kill_when(self, reached: Callable[[], bool], patience_s: float = 120) -> None:
        """Kill the process as soon as `reached` says so."""
        self.wait_until(reached, patience_s)
        self.send(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def wait_until(self, reached: Callable[[], bool], patience_s: float = 120) -> None:
        """Return when `reached` says so; fail if the process ends before."""
        deadline = time.monotonic() + patience_s
        while not reached():
            assert not self.ended, self.errors.read_text()
            assert time.monotonic() < deadline, self.errors.read_text()
            time.sleep(0.005)


def _run(
    target: Callable[..., None],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    output: Path,
    errors: Path,
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for file, number in ((output, 1), (errors, 2)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    import torch

    torch.set_num_threads(1)
    target(*arguments)


def run_module(module: str, *words: str) -> None:
    """Run `python -m MODULE WORDS...`."""
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__")


def run_script(file: Path, *words: str) -> None:
    """Run `python FILE WORDS...`."""
    sys.argv = [str(file), *words]
    runpy.run_path(str(file), run_name="__main__")


def command(*words: object, folder: Path, **options: Any) -> Forked:
    """Start `layerboost WORDS...`."""
    return Forked(run_module, "layerboost.cli", *map(str, words), folder=folder, **options)


@contextmanager
def forked(argv: list[str], _: dict[str, str], output: Any, **__: Any) -> Iterator[Forked]:
    """What `engines.server.guarded` yields for `python -m MODULE WORDS...`, without the wait for its imports."""
    log = Path(output.name)
    yield Forked(run_module, *argv[argv.index("-m") + 1 :], folder=log.parent, name=log.stem)


def ranks(target: Callable[..., None], *arguments: Any, folder: Path, processes: int = 2) -> list[Forked]:
    """Start the processes that `torchrun --nproc-per-node` would start, in one process group."""
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        Forked(
            target,
            *arguments,
            environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            folder=folder,
            name=f"rank{rank}",
        )
        for rank in range(processes)
    ]


def finish(group: list[Forked], patience_s: float = 120) -> None:
    """Wait until every process has ended well; when one has not, end the others and say what it said."""
    deadline = time.monotonic() + patience_s
    while not all(each.ended for each in group):
        failed = [each for each in group if each.process.exitcode]
        if failed or time.monotonic() > deadline:
            break
        time.sleep(0.01)
    said = "\n".join(each.errors.read_text()[-3000:] for each in group if each.process.exitcode != 0)
    for each in group:
        each.send(signal.SIGKILL)
    assert all(each.process.exitcode == 0 for each in group), said
