"""`eval/comparison.json`: every model of one evaluation, and its paired differences from the base."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field

from layerboost.schemas.artifact import Artifact, Part
from layerboost.schemas.sensitivity import Score

# The margin of "no worse than": a difference of two fractions.
ONE_POINT = 0.01


class Change(Part):
    """A paired difference from the base with its 95 % interval.

    `lower_95`: the one-sided lower 95 % bound; `minimum_detectable`: the smallest difference that such a sample shows
    four times in five.
    """

    mean: float
    standard_error: float
    low: float
    high: float
    lower_95: float
    minimum_detectable: float

    @property
    def no_worse(self) -> str:
        """Return whether a loss of more than one point is ruled out: yes, no (it is shown), or not shown."""
        if self.lower_95 > -ONE_POINT:
            return "yes"
        return "no" if self.high < -ONE_POINT else "not shown"


class TextInfo(Part):
    """The held-out text of the perplexity."""

    source: str
    tokens: int
    sequence_tokens: int | None = None
    fingerprint: str


class Perplexity(Part):
    """One model on the held-out text, nats per token. `nll_difference`: from the base, paired by sequence."""

    perplexity: float
    nll: Score
    kl: Change
    nll_difference: Change | None = None


def perplexity(nll: float) -> float:
    """Return the perplexity of a mean NLL in nats per token, at most e^700, beyond which a float overflows."""
    return math.exp(min(nll, 700.0))


class TaskValue(Part):
    """One model on one task, in the task's own metric."""

    value: float
    standard_error: float


class Margin(Part):
    """The log-probability of the right answer minus that of the best wrong one."""

    unit: str
    models: dict[str, Score]
    difference: dict[str, Change]


class Task(Part):
    """One task: each model's value, and its paired difference from the base. `selection`: layers were chosen on it."""

    metric: str
    items: int
    selection: bool = False
    models: dict[str, TaskValue]
    difference: dict[str, Change]
    margin: Margin | None = None
    tasks: list[str] = Field(default=[], description="of an average: the tasks it is over")


class Positions(Part):
    """NLL by position in long texts, nats per token: one entry per bucket between two `edges`, by model."""

    edges: list[int]
    sequences: int
    models: dict[str, list[Score]]
    difference: dict[str, list[Change]]


class Depth(Part):
    """The prompts at part of the depths: means by model."""

    low: float = Field(alias="from")
    high: float = Field(alias="to")
    prompts: int
    exact: dict[str, float]
    log_probability: dict[str, float]


class RetrievalScores(Part):
    """Retrieval prompts: exact match and log-probability by model. `able`: the base answers at least half of them."""

    prompts: int
    able: bool
    models: dict[str, TaskValue]
    difference: dict[str, Change]
    log_probability: dict[str, Score]
    log_probability_difference: dict[str, Change]


class RetrievalGroup(RetrievalScores):
    """The retrieval prompts of one kind and length."""

    kind: str
    length_tokens: int
    depths: list[Depth]


class Retrieval(Part):
    """All retrieval prompts and models; `able`: all prompts of the groups that the base can answer."""

    groups: list[RetrievalGroup]
    able: RetrievalScores | None = None


class Check(Part):
    """One threshold of the quality gate; `passed` is None if it could not be judged."""

    what: str
    found: float | None
    low: float | None
    high: float | None
    at_most: float
    passed: bool | None


class Gate(Part):
    """The quality gate of one model."""

    model: str
    checks: list[Check]

    @property
    def missed(self) -> list[Check]:
        return [check for check in self.checks if check.passed is False]


class EvalComparison(Artifact):
    """`eval/comparison.json`."""

    schema_version: int = 2
    settings: dict[str, Any] = Field(default={}, description="what was evaluated: tasks and their items, dtype")
    models: dict[str, str] = Field(description="fingerprint of each model")
    selection: list[str] = Field(default=[], description="tasks on which layers were chosen")
    text: TextInfo | None = None
    perplexity: dict[str, Perplexity]
    tasks: dict[str, Task]
    average: Task | None = None
    positions: Positions | None = None
    retrieval: Retrieval | None = None
    gate: Gate | None = None

    @property
    def scores(self) -> dict[str, Task]:
        """Return every task, and the average over those that chose no layers, `average`."""
        return self.tasks | ({"average": self.average} if self.average else {})
