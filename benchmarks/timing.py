"""What the benchmarks share: repeats in turn, ratios with their range, processes of their own, the results as JSON."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from layerboost.runtime import machine, versions
from layerboost.schemas.plan import LayerPlan

Found = TypeVar("Found")


def parser(text: str | None, repeats: int = 0) -> argparse.ArgumentParser:
    """The options of a script, whose docstring is `text`; with a default of `repeats`, `--repeats` is one of them."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if repeats:
        made.add_argument("--repeats", type=int, default=repeats, help="each one times every rival in turn")
    return made


def folders(models: Sequence[str]) -> dict[str, Path]:
    """The directories that `NAME=DIR` words name."""
    return {name: Path(folder) for name, folder in (model.split("=", 1) for model in models)}


def seconds(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that a call takes by a clock."""
    started = clock()
    call()
    return clock() - started


def in_turn(ways: Mapping[str, Callable[[], Found]], repeats: int, warm_up: int = 1) -> dict[str, list[Found]]:
    """What each way returns in every repeat but the first `warm_up`; the ways take turns."""
    found: dict[str, list[Found]] = {name: [] for name in ways}
    for _ in range(warm_up + repeats):
        for name, way in ways.items():
            found[name].append(way())
    return {name: values[warm_up:] for name, values in found.items()}


def ratio(reference: Sequence[float], own: Sequence[float]) -> dict[str, float]:
    """How many times as fast as the reference, from seconds of the same repeats: median, least and greatest."""
    each = [theirs / ours for theirs, ours in zip(reference, own, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def times(found: Mapping[str, float]) -> str:
    """A ratio with its range: 2.10 (1.99 to 2.21)."""
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def alone(script: str, *words: object) -> dict[str, Any]:
    """What a script prints as its last line, in a process of its own, so that its peak memory is its own."""
    argv = [sys.executable, script, *map(str, words)]
    output = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    print(*words, found, file=sys.stderr, flush=True)
    return found


def engine(folder: Path, **options: Any) -> Any:
    """A vLLM engine in this process; without asynchronous scheduling a step's time is its own."""
    from layerboost.engines.vllm import runs_on_cpu, vllm_environment

    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    os.environ |= vllm_environment()
    from vllm import LLM

    on_cpu = runs_on_cpu()
    given = {"dtype": "float32" if on_cpu else "auto", "enforce_eager": on_cpu, "async_scheduling": False}
    return LLM(str(folder), **given | {"disable_log_stats": True} | options)


def evenly(layers: int, full: int, window: int) -> list[LayerPlan]:
    """A plan with full layers evenly spaced and the others sliding, with sinks."""
    kept = {int((index + 0.5) * layers / full) for index in range(full)}
    return [
        LayerPlan(layer=layer, attention="full")
        if layer in kept
        else LayerPlan(layer=layer, attention="sliding", window=window, sink=True)
        for layer in range(layers)
    ]


def show(results: Any, asked: argparse.Namespace) -> None:
    """Print the results as one line of JSON, with the machine, versions and options."""
    about = {"machine": machine(), "versions": versions(), "options": vars(asked)}
    print(json.dumps(about | {"results": results}, default=str))
