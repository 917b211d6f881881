"""Whose processor time it was: ours with what we start, or that of others."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from layerboost.benching.processors import Processors, _has_quota

BUSY = "import time; end = time.monotonic() + {}\nwhile time.monotonic() < end: pass"


@pytest.mark.skipif(_has_quota(), reason="the cores here are shared with other containers")
def test_time_of_processes_that_we_started_is_our_own_and_that_of_others_is_not() -> None:
    # In a session of its own and no child of ours: a shell starts it and is gone.
    other = f"{sys.executable} -c '{BUSY.format(2.5)}' &"
    subprocess.run(["/bin/sh", "-c", other], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    counted = Processors()
    time.sleep(0.5)
    idle = counted.used()
    counted, started = Processors(), time.monotonic()
    # One that ends within the time counts too. Half a second of a processor, however long that takes.
    subprocess.run([sys.executable, "-c", BUSY.format(0.5).replace("monotonic", "process_time")], check=True)
    busy, wall_s = counted.used(), time.monotonic() - started
    assert busy["own_cores"] * wall_s > 0.45
    assert idle["other_cores"] > 0.2
    assert idle["own_cores"] < 0.2
