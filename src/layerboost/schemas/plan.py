"""`plan.yaml`: a strategy for each layer; and `frontier.json`: the plans of every budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from layerboost.files import write_text
from layerboost.schemas.artifact import Artifact, _parse, fingerprint
from layerboost.schemas.model import ModelInfo
from layerboost.strategies import FULL, SINK, STRATEGIES, WINDOW, Strategy, StrategyName


class LayerPlan(BaseModel):
    """The strategy of one layer. `sink`: a learned logit per head in the softmax's denominator."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    layer: int = Field(ge=0)
    attention: StrategyName
    window: int | None = Field(default=None, ge=1)
    sink: bool = False

    @model_validator(mode="after")
    def _only_its_own_settings(self) -> LayerPlan:
        takes = self.strategy.settings
        if WINDOW in takes and self.window is None:
            raise ValueError(f"a {self.attention} layer needs a window")
        for setting, given in ((WINDOW, self.window is not None), (SINK, self.sink)):
            if given and setting not in takes:
                raise ValueError(f"a {self.attention} layer takes no {setting}")
        return self

    @property
    def strategy(self) -> Strategy:
        return STRATEGIES[self.attention]

    @property
    def changed(self) -> bool:
        """Whether the layer is another than in the base."""
        return self.attention != FULL

    def kv_tokens(self, context_tokens: int) -> int:
        """Tokens whose keys and values the layer holds for one request of a context."""
        return self.strategy.kv_tokens(context_tokens, self.window)


def all_full(model: ModelInfo) -> list[LayerPlan]:
    """The base as a plan."""
    return [LayerPlan(layer=layer, attention=FULL) for layer in range(model.layers)]


def window_of(layers: Iterable[LayerPlan]) -> int | None:
    """The one window of a plan's layers; None where none has one."""
    return next((entry.window for entry in layers if entry.window), None)


def counts(layers: Sequence[LayerPlan]) -> dict[str, int]:
    """How many layers have each strategy, in the table's order."""
    return {name: sum(entry.attention == name for entry in layers) for name in STRATEGIES}


def counted(layers: Sequence[LayerPlan]) -> str:
    """The counts as words: 8 full, 22 sliding, 0 none."""
    return ", ".join(f"{count} {name}" for name, count in counts(layers).items())


class Predicted(BaseModel):
    """What the files foretell of a plan: the sums of single-layer scores, and its costs."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    damage: dict[str, float] = Field(description="sum over layers of each metric that all of its choices have")
    kv_fraction: float
    kv_bytes_per_request: int
    parameter_fraction: float
    context_tokens: int
    concurrency: int | None = Field(None, description="requests decoding at once in decode_ms")
    decode_ms: float | None = Field(None, description="of one step; known with plan.costs")
    decode_fraction: float | None = None
    plan: str = Field(default="", description="hash of the plan it foretells")


class PlanFile(Artifact):
    """`plan.yaml`: one line a layer; a person may edit it."""

    schema_version: int = 2
    model: ModelInfo
    method: str
    settings: dict[str, Any] = Field({})
    sensitivity: str | None = Field(default=None, description="hash of the sensitivity.json it was made from")
    predicted: Predicted | None = None
    layers: list[LayerPlan]

    @model_validator(mode="before")
    @classmethod
    def _without_flags(cls, values: Any) -> Any:
        """Older files hold serving flags, those of the machine that planned: they are left out."""
        return {key: value for key, value in values.items() if key != "serving"} if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _layers_in_order(self) -> PlanFile:
        found = [entry.layer for entry in self.layers]
        if found != list(range(self.model.layers)):
            raise ValueError(f"the plan must name layers 0 to {self.model.layers - 1} once each, in order; got {found}")
        if len({entry.window for entry in self.layers if entry.window}) > 1:
            raise ValueError("a plan uses one window: vLLM and Transformers keep a single sliding_window")
        return self

    @property
    def window(self) -> int | None:
        return window_of(self.layers)

    @property
    def foretold(self) -> Predicted | None:
        """What was predicted of these layers; None once they have been edited."""
        return self.predicted if self.predicted and self.predicted.plan in ("", self.hash()) else None

    @property
    def sliding_as_base(self) -> list[int]:
        """The layers left full that slide in the base already."""
        return [e.layer for e in self.layers if not e.changed and e.layer in self.model.sliding_layers]

    def count(self, attention: StrategyName) -> int:
        return counts(self.layers)[attention]

    def hash(self) -> str:
        """Identity of what the plan does: the model and the layers, not how they were chosen."""
        return fingerprint(self.model.fingerprint, [entry.model_dump() for entry in self.layers])


def write_plan(path: Path, plan: PlanFile) -> None:
    """Write `plan.yaml` with one line a layer."""
    head = plan.model_dump(mode="json", exclude={"layers"})
    lines = [yaml.safe_dump(head, sort_keys=False, allow_unicode=True), "layers:\n"]
    for entry in plan.layers:
        values = entry.model_dump(mode="json", exclude_defaults=True)
        inner = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=200).strip()
        lines.append(f"  - {inner}\n")
    write_text(path, "".join(lines))


def read_plan(path: Path) -> PlanFile:
    """Read and validate `plan.yaml`; raises ConfigError."""
    return _parse(path, PlanFile, "layerboost plan", yaml.safe_load)


FRONTIER = "frontier.json"


class FrontierPoint(BaseModel):
    """The plan at one budget, with what is foretold of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    predicted: Predicted
    layers: list[LayerPlan]

    def count(self, attention: StrategyName) -> int:
        return counts(self.layers)[attention]

    @property
    def window(self) -> int | None:
        return window_of(self.layers)


class Frontier(Artifact):
    """`frontier.json`: plans from the cheapest to the base."""

    model: ModelInfo
    sensitivity: str = Field(description="hash of the sensitivity.json it was made from")
    settings: dict[str, Any]
    points: list[FrontierPoint]
