"""The writer of `heal/metrics.jsonl`, which keeps the file consistent with the checkpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layerboost.files import write_text
from layerboost.runtime import is_main_process
from layerboost.schemas.artifact import finite, json_text
from layerboost.schemas.healing import MetricLine, read_metrics


class Metrics:
    """Appends one stage's lines, after removing what a killed run wrote after its last checkpoint."""

    def __init__(self, stage: Any, file: Path, after_step: int, trackers: Sequence[Any] = ()) -> None:
        """Keep the lines of the other stages, and of this one those up to `after_step`.

        accelerate's `trackers` get every later line too.
        """
        self.stage, self.file, self.trackers = stage, file, trackers
        lines = [line for line in read_metrics(file) if line.stage != stage or line.step <= after_step]
        self.started = time.monotonic() - max((line.seconds for line in lines if line.stage == stage), default=0.0)
        if is_main_process():
            write_text(file, "".join(self._text(line) for line in lines))

    def write(self, step: int, tokens: int, values: dict[str, float]) -> None:
        """Append one line; a value that is not finite becomes null."""
        seconds = round(time.monotonic() - self.started, 2)
        line = MetricLine(stage=self.stage, step=step, tokens=tokens, seconds=seconds, **values)
        if is_main_process():
            with self.file.open("a") as file:
                file.write(self._text(line))
        for tracker in self.trackers:
            tracker.log({f"{self.stage}/{name}": value for name, value in values.items()}, step=step)

    def _text(self, line: MetricLine) -> str:
        return json_text(finite(line.model_dump(exclude_unset=True)), str(self.file)) + "\n"
