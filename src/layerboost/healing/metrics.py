"""`heal/metrics.jsonl`: its lines, the one reader of them, and the writer that keeps them in step with checkpoints."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from layerboost.artifacts import finite, json_text, write_text
from layerboost.errors import ConfigError
from layerboost.runtime import is_main_process

METRICS = "metrics.jsonl"


class MetricLine(BaseModel):
    """One logged step or validation; `tokens` and `seconds` count from the start of the stage."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    stage: Literal["fit", "attention", "lora"]
    step: int
    tokens: int
    loss: float | None = None
    lr: float | None = None
    validation_kl: float | None = None
    validation_nll: float | None = None
    seconds: float


class Metrics:
    """Appends one stage's lines; what a killed run wrote after its last checkpoint is removed first."""

    def __init__(self, stage: Any, file: Path, after_step: int, trackers: Sequence[Any] = ()) -> None:
        """Keep the lines of the other stages, and of this one those up to `after_step`.

        `trackers` of accelerate's get every later line too.
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


def read_metrics(file: Path) -> list[MetricLine]:
    """Return the lines of `metrics.jsonl`; of two for one step and kind, the later one. No file: no lines.

    A last line without its newline was cut short by a kill and is left out. Raises ConfigError for any other line that
    is not valid.
    """
    lines: dict[tuple[str, int, bool], MetricLine] = {}
    texts = file.read_text(errors="replace").split("\n") if file.is_file() else []
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = MetricLine.model_validate(json.loads(text))
        except ValueError as error:
            if number == len(texts):
                break
            raise ConfigError(
                f"{file}, line {number}, is not a metrics line",
                found=error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error),
                do="delete the line, or delete the file and run `layerboost heal` again",
            ) from None
        lines[line.stage, line.step, line.loss is None] = line
    return list(lines.values())
