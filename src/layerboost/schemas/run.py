"""The names of the files in a run folder, and `run.json`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from layerboost.schemas.artifact import Artifact

# Files and directories of a run folder, in the order in which they are made.
BASE, SENSITIVITY, PLAN, CONVERTED = "base", "sensitivity.json", "plan.yaml", "converted"


HEAL, HEALED = "heal", "healed"


class StageRecord(BaseModel):
    """One line of `run.json`."""

    model_config = ConfigDict(extra="forbid")
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
