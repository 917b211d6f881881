"""Run a command that must not outlive its owner: `python guard.py COMMAND...`, in a session of its own.

The owner holds the other end of standard input; its bytes are passed to the command. When that end closes, because the
owner closes it or dies in any way, the command gets SIGTERM, a grace period, and then SIGKILL with every process of its
group. This module imports nothing of layerboost: it starts at once and is run by path.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

GRACE_S = 15.0
POLL_S = 0.2


def main(command: list[str]) -> None:
    """Run `command` until it ends or standard input closes; then kill the own process group."""
    for caught in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        # Not SIG_IGN, which the command would inherit.
        signal.signal(caught, lambda *_: None)
    child = subprocess.Popen(command, stdin=subprocess.PIPE)
    assert child.stdin
    owner = sys.stdin.fileno()
    while child.poll() is None:
        if not select.select([owner], [], [], POLL_S)[0]:
            continue
        if words := os.read(owner, 1 << 16):
            with suppress(BrokenPipeError):  # the command is ending
                os.write(child.stdin.fileno(), words)
        else:
            child.terminate()
            deadline = time.monotonic() + GRACE_S
            while child.poll() is None and time.monotonic() < deadline:
                time.sleep(POLL_S)
            break
    # This ends all remaining processes of the command, such as engines and workers, and this process.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
