"""`sensitivity.json`; and `stability.json`: its agreement with other sensitivities."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from layerboost.errors import ConfigError
from layerboost.schemas.artifact import Artifact, Part, read_json
from layerboost.schemas.model import ModelInfo
from layerboost.schemas.plan import LayerPlan, OfLayer, Strategies
from layerboost.schemas.run import SENSITIVITY


class Score(Part):
    """A mean over sequences or items with its standard error."""

    mean: float
    standard_error: float
    count: int | None = Field(None, description="number of tokens, answers or items")

    @classmethod
    def of(cls, values: Sequence[float], count: int | None = None) -> Score:
        """Return the mean of values; its error is 0 for a single value and NaN if a value is not finite.

        `count`: the number of tokens, answers or items, if not one per value.
        """
        import numpy as np

        array = np.asarray(values, dtype=np.float64)
        with np.errstate(invalid="ignore"):
            error = array.std(ddof=1) / len(array) ** 0.5 if len(array) > 1 else 0.0
        return cls(mean=float(array.mean()), standard_error=float(error), count=len(array) if count is None else count)


class Variant(Strategies):
    """One layer's attention, all of its KV heads but `full_kv_heads`, or its MLP under one replacement.

    Larger scores are worse.
    """

    scores: dict[str, Score]

    @property
    def means(self) -> dict[str, float]:
        """Return the mean of every metric."""
        return {metric: score.mean for metric, score in self.scores.items()}

    def plan(self, layer: int) -> LayerPlan:
        """Return the LayerPlan of this replacement."""
        return LayerPlan(layer=layer, **self.model_dump(exclude={"scores"}))


class LayerSensitivity(OfLayer):
    """All variants of one layer, and of its KV heads if they were measured."""

    variants: list[Variant]
    heads: list[Variant] = Field([], description="one group of KV heads under a window, the layer's others full")
    block_influence: Score | None = Field(
        None, description="1 - cosine of the residual stream before and after the whole layer (ShortGPT)"
    )


class Sensitivity(Artifact):
    """`sensitivity.json`: saved after each layer, complete with the last one."""

    schema_version: int = 2
    model: ModelInfo
    text: str = Field(description="fingerprint of the calibration tokens")
    settings: dict[str, Any]
    sequences: int
    tokens: int
    base_nll: Score
    base_retrieval: dict[str, Score] | None = Field(
        None, description="the base's log_probability of an answer, in nats, and its fraction of exact answers"
    )
    base_tasks: dict[str, Score] | None = Field(None, description="the base's score on each task of `benchmark`")
    layers: list[LayerSensitivity] = Field([])

    @property
    def complete(self) -> bool:
        return len(self.layers) == self.model.layers


STABILITY = "stability.json"


class Agreement(Strategies):
    """Rank correlation of one replacement's scores over layers or KV heads, and its 95 % bootstrap interval."""

    kv_heads: bool = Field(False, description="whether the scores are of KV heads")
    metric: str
    other_metric: str
    spearman: float
    low: float
    high: float
    layers: int = Field(description="number of layers or groups of KV heads compared")


class Comparison(Part):
    """One file compared with another, or with itself in other metrics."""

    other: str = Field(description="the other file; empty: one metric against another within this file")
    differs: list[str] = Field([], description="settings in which the two measurements differ")
    aligned_by: str
    agreements: list[Agreement]


class Stability(Artifact):
    """`stability.json`: the rank correlations of this run's sensitivities with others."""

    sensitivity: str = Field(description="hash of the sensitivity.json that was compared")
    comparisons: list[Comparison]


def read_sensitivity(path: Path) -> Sensitivity:
    """Return the sensitivities in a file or run folder; raise ConfigError if they are incomplete or not valid."""
    file = path / SENSITIVITY if path.is_dir() else path
    sensitivity = read_json(file, Sensitivity, "layerboost measure")
    if not sensitivity.complete:
        raise ConfigError(
            f"{file} is incomplete",
            found=f"{len(sensitivity.layers)} of {sensitivity.model.layers} layers",
            do="run `layerboost measure` again: it goes on where it stopped",
        )
    return sensitivity
