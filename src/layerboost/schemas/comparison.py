"""compare: the YAML file of rows that it reads, and `RUN/compare/comparison.json` that it writes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from layerboost.recipe import Section
from layerboost.schemas.artifact import Artifact
from layerboost.schemas.evaluation import Change, EvalComparison
from layerboost.strategies import FULL, FeatureMapName, MLPName, StrategyName

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]


class EveryLayer(Section):
    """The same attention and MLP in every layer. Without a window, sliding layers get the longest that the budget
    allows; without a width, thinned MLPs the widest."""

    attention: StrategyName = FULL
    window: int | None = Field(None, ge=1)
    sink: bool = False
    feature_map: FeatureMapName | None = None
    mlp: MLPName = FULL
    mlp_width: int | None = Field(None, ge=1)


class Row(Section):
    """One plan and how it is healed. `set` has dotted keys as on the command line.

    `plan`: an earlier row, whose converted model is used too, a plan file, or the same strategies in every layer;
    without it `layerboost plan` chooses. `sliding`: fields that the plan's sliding layers get. `run`: an existing run
    folder, whose models are evaluated as they are. `window_only`: an earlier row, whose last model is evaluated with
    sliding layers in place of linear ones. `one_stage`: spend all tokens of healing in stage 2.
    """

    plan: EveryLayer | str | None = None
    sliding: dict[str, Any] = Field({})
    run: str | None = None
    window_only: Name | None = None
    one_stage: bool = False
    set: dict[str, Any] = Field({})


class Evaluation(Section):
    """Settings with which the base and these rows, or all rows, are evaluated; `set` as in a row."""

    rows: tuple[Name, ...] | None = None
    set: dict[str, Any] = Field({})


class Rows(Section):
    """A file of rows. `set` applies to all of them and overrides the command line."""

    schema_version: Literal[1] = 1
    reference: Name
    set: dict[str, Any] = Field({})
    evaluations: dict[Name, Evaluation] = Field({"": Evaluation()})
    rows: dict[Name, Row]

    @model_validator(mode="after")
    def _names_are_known(self) -> Rows:
        named = {self.reference, *(row for each in self.evaluations.values() for row in each.rows or ())}
        if unknown := named - self.rows.keys():
            raise ValueError(f"not among the rows: {', '.join(sorted(unknown))}")
        earlier: set[str] = set()
        for name, row in self.rows.items():
            if row.sliding and row.plan is None:
                raise ValueError(f"rows.{name}.sliding: name the plan whose sliding layers get these fields")
            if row.window_only and row.window_only not in earlier:
                raise ValueError(f"rows.{name}.window_only: {row.window_only} is not an earlier row")
            earlier.add(name)
        return self


class Against(BaseModel):
    """A row's last model minus the reference's, paired over the same sequences, items and prompts."""

    kl: Change | None = Field(None, description="nats per token")
    average: Change | None = Field(None, description="accuracy, a fraction")
    retrieval: Change | None = Field(None, description="exact answers, a fraction")


class RowResult(BaseModel):
    """A row's plan and its cost. Its models are `ROW-converted` and `ROW-healed` in every evaluation."""

    plan: str = Field(description="hash")
    layers: dict[StrategyName, int]
    window: int | None
    sinks: int
    full_kv_heads: int = Field(0, description="full KV heads of sliding layers")
    mlps: dict[MLPName, int] = Field({}, description="changed MLPs")
    kv_fraction: float
    parameter_fraction: float
    predicted_kl: float | None
    healing_tokens: int | None = Field(description="of both stages; None of a run folder taken as it is")
    models: list[str] = Field(description="converted, healed")
    against: dict[str, Against] = Field({}, description="the reference, by evaluation")


class Compared(Artifact):
    """`RUN/compare/comparison.json`."""

    schema_version: int = 2
    reference: str
    context_tokens: int = Field(description="at which KV bytes are counted")
    left_out: dict[str, str] = Field(description="rows that have no plan, and why")
    rows: dict[str, RowResult]
    evaluations: dict[str, EvalComparison] = Field(description="eval/comparison.json of each")
