"""Runs a command that must not outlive its owner: `python guard.py COMMAND...`, in a session of its own.

The owner holds the other end of standard input. When that end closes, because the owner closes it or because the owner
died, however it died, the command gets SIGTERM, a grace period, and then SIGKILL with every process of its group.
Imports nothing of layerboost: it starts at once and is run by path.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time

GRACE_S = 15.0
POLL_S = 0.2


def main(command: list[str]) -> None:
    """Run `command` until it ends or standard input closes; ends by killing its own process group."""
    for caught in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Not SIG_IGN, which the command would inherit.
        signal.signal(caught, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    while child.poll() is None:
        if select.select([sys.stdin], [], [], POLL_S)[0]:
            child.terminate()
            deadline = time.monotonic() + GRACE_S
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(POLL_S)
            break
    # Whatever the command started and left behind, an engine or a worker above all, and this process with it.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
