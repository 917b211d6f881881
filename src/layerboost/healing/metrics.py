"""`heal/metrics.jsonl`: one JSON object a logged step, kept in step with the checkpoints."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from layerboost.artifacts import finite, json_text, write_text


class Metrics:
    """Appends to `metrics.jsonl`; what a killed run logged after its last checkpoint is cut off first."""

    def __init__(self, stage: str, file: Path, after_step: int, writes: bool = True) -> None:
        self.stage, self.file, self.writes = stage, file, writes
        rows = [row for row in read_metrics(file) if row["stage"] != stage or row["step"] <= after_step]
        own = [row for row in rows if row["stage"] == stage]
        self.started = time.monotonic() - (own[-1]["seconds"] if own else 0.0)
        # A run that was killed before its first checkpoint or after its last validates there again.
        self.validated = {row["step"] for row in own if "validation_kl" in row}
        if writes:
            write_text(file, "".join(json_text(finite(row), str(file)) + "\n" for row in rows))

    def write(self, step: int, tokens: int, values: dict[str, float]) -> None:
        """One line: stage, step, tokens of this stage so far, the values (null if not finite), seconds."""
        if "validation_kl" in values and step in self.validated:
            return
        seconds = round(time.monotonic() - self.started, 2)
        row = {"stage": self.stage, "step": step, "tokens": tokens, **values, "seconds": seconds}
        if self.writes:
            with self.file.open("a") as file:
                file.write(json_text(finite(row), str(self.file)) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last line that a kill cut short is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
