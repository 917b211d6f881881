"""`heal/metrics.jsonl`: its lines and their reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from layerboost.errors import ConfigError

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
    validation_answer_kl: float | None = None
    seconds: float


def read_metrics(file: Path) -> list[MetricLine]:
    """Return the lines of `metrics.jsonl`, empty without a file. Of two for one step and kind, the later one counts.

    A last line without its newline was truncated by a kill and is left out. Raise ConfigError if any other line
    is not valid.
    """
    lines: dict[tuple[str, int, bool], MetricLine] = {}
    texts = file.read_text(encoding="utf-8", errors="replace").split("\n") if file.is_file() else []
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
