"""Standard streams that may be closed, at the start or later, or have no width."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any


class Steady:
    """A standard stream that ignores writes after its reader has closed, as with `| head`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._ignore_broken_pipe(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._ignore_broken_pipe(self._stream.flush)

    def _ignore_broken_pipe(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except BrokenPipeError:
            with open(os.devnull, "w") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), self._stream.fileno())


def prepare_terminal() -> None:
    """Make writes to standard output and standard error safe: they never end a command."""
    # Else the next file opened would get the number of a closed stream, and with it what libraries print.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: PTH123, SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # characters that the terminal lacks, names that are not UTF-8
        setattr(sys, name, Steady(stream))
    for name in ("COLUMNS", "LINES"):  # rich accepts any number, even 0
        if os.environ.get(name, "").strip("0") == "" or not os.environ[name].isdecimal():
            os.environ.pop(name, None)
