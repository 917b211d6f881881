"""Processor time on the cores that a benchmark may use: its own, and that of other processes."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

import psutil

from layerboost.runtime import cores


class Processors:
    """A count that starts when it is made."""

    def __init__(self) -> None:
        self._start = self._now()

    def used(self) -> dict[str, float]:
        """Return the cores in use on average: by this process with all that it started, and by others."""
        wall, busy, own = (now - start for now, start in zip(self._now(), self._start, strict=True))
        usage = {"own_cores": round(own / wall, 3)}
        if _has_quota():  # then others on these cores do not take time from us
            return usage
        return usage | {"other_cores": round(max(busy - own, 0.0) / wall, 3)}

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Return seconds: of the clock, of all processors together, and of our processes."""
        return time.monotonic(), _busy_s(), _own_s()


def _busy_s() -> float:
    """Return the seconds that the cores were busy, also for other machines of a hypervisor (steal)."""
    every, mine = psutil.cpu_times(percpu=True), set(cores())
    busy = 0.0
    for core, times in enumerate(every):
        if core in mine:
            # `user` includes guests already.
            without = ("idle", "iowait", "guest", "guest_nice")
            busy += sum(times) - sum(getattr(times, name, 0.0) for name in without)
    return busy


def _has_quota() -> bool:
    """Return whether a container limits processor time to less than its cores give."""
    file = Path("/sys/fs/cgroup/cpu.max")
    quota = file.read_text(encoding="utf-8").split()[0] if file.is_file() else "max"
    return quota != "max"


def _own_s() -> float:
    """Return the seconds of this process and its descendants, also of those that have ended."""
    total, this = 0.0, psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.Error):  # it has just ended, and counts with its parent
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
