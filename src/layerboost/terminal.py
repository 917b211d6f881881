"""Standard streams as a terminal, a pipe or a job leaves them: closed at the start or later, of no width."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Any


class Steady:
    """A standard stream that goes on in silence once its reader has gone, as after `| head`."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._steadily(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._steadily(self._stream.flush)

    def _steadily(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except BrokenPipeError:
            with open(os.devnull, "w") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), self._stream.fileno())


def prepare_terminal() -> None:
    """Make standard output and standard error such that writing to them ends no command."""
    # The number of a closed stream would go to the next file that is opened, and what libraries print into that file.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: PTH123, SIM115
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that has no sign for it, a name that is not UTF-8
        setattr(sys, name, Steady(stream))
    for name in ("COLUMNS", "LINES"):  # rich believes any number, even 0
        if os.environ.get(name, "").strip("0") == "" or not os.environ[name].isdecimal():
            os.environ.pop(name, None)
