"""The names of the files in a run folder, and `run.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from layerboost.schemas.artifact import Artifact, Part

# Files and directories of a run folder, in the order in which they are made.
BASE, SENSITIVITY, PLAN, CONVERTED = "base", "sensitivity.json", "plan.yaml", "converted"


HEAL, HEALED = "heal", "healed"


def last_made(models: Sequence[str]) -> str:
    """Return the model that a result is about: the healed one, or else the converted one, or else the last."""
    return next((name for name in (HEALED, CONVERTED) if name in models), models[-1])


class StageRecord(Part):
    """One line of `run.json`."""

    stage: str
    argv: list[str]
    started: str
    seconds: float
    status: Literal["done", "failed", "interrupted"]
    error: str | None = None
    seed: int
    device: str
    versions: dict[str, str]
    git_revision: str | None = None
    model: str | None = None


class RunFile(Artifact):
    """`run.json`: the stages that were run in this folder, in order."""

    stages: list[StageRecord] = Field([])
