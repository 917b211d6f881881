"""`plan.yaml`: strategies of each layer's attention, or KV heads, and MLP; `frontier.json`: plans of every budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from layerboost.errors import ConfigError
from layerboost.files import parse_yaml, write_text
from layerboost.schemas.artifact import Artifact, Part, fingerprint, read_json
from layerboost.schemas.model import ModelInfo
from layerboost.strategies import (
    FEATURE_MAP,
    FEATURE_MAPS,
    FULL,
    FULL_KV_HEADS,
    MEASURED,
    MLP_STRATEGIES,
    MLP_WIDTH,
    OTHER,
    SINK,
    STRATEGIES,
    WINDOW,
    FeatureMapName,
    MLPName,
    Strategy,
    StrategyName,
)


class OfLayer(Part):
    """A part of a file that is about one layer."""

    layer: int = Field(ge=0)


class Strategies(Part):
    """The strategies of a layer's attention, or of its KV heads, and of its MLP, with their settings.

    KV heads in `full_kv_heads` keep full attention, the others have a window. `sink`: a learned logit in the softmax's
    denominator, per query head with a window. `feature_map`: the kind of linear attention. `mlp_width`: the neurons of
    a thinned MLP.
    """

    attention: StrategyName
    window: int | None = Field(default=None, ge=1)
    sink: bool = False
    full_kv_heads: tuple[int, ...] = ()
    feature_map: FeatureMapName | None = None
    mlp: MLPName = FULL
    mlp_width: int | None = Field(default=None, ge=1)

    @field_validator("full_kv_heads")
    @classmethod
    def _in_order(cls, heads: tuple[int, ...]) -> tuple[int, ...]:
        if any(head < 0 for head in heads):
            raise ValueError("KV heads are counted from 0")
        return tuple(sorted(set(heads)))

    @model_validator(mode="after")
    def _only_its_own_settings(self) -> Self:
        takes = STRATEGIES[self.attention].settings
        if WINDOW in takes and self.window is None:
            raise ValueError(f"a {self.attention} layer needs a window")
        if FEATURE_MAP in takes and self.feature_map is None:
            raise ValueError(f"a {self.attention} layer needs a feature_map: {', '.join(FEATURE_MAPS)}")
        for setting in (WINDOW, SINK, FULL_KV_HEADS, FEATURE_MAP):
            if getattr(self, setting) and setting not in takes:
                raise ValueError(f"a {self.attention} layer takes no {setting}")
        if (self.mlp_width is not None) != (MLP_WIDTH in MLP_STRATEGIES[self.mlp].settings):
            raise ValueError(
                f"an MLP that is {self.mlp} " + ("takes no" if self.mlp_width else "needs an") + " mlp_width"
            )
        return self

    @property
    def label(self) -> str:
        """Return the names of the strategies with their settings: full, sliding 64 + sink, sliding 64 + full KV heads
        0 2, linear 64 liger, MLP thin 768, none + MLP none."""
        window = f" {self.window}" if self.window else ""
        heads = f" + full KV heads {' '.join(map(str, self.full_kv_heads))}" if self.full_kv_heads else ""
        feature_map = f" {self.feature_map}" if self.feature_map else ""
        attention = self.attention + window + feature_map + (" + sink" if self.sink else "") + heads
        if self.mlp == FULL:
            return attention
        return (f"{attention} + " if self.attention != FULL else "") + f"MLP {self.mlp_label}"

    @property
    def mlp_label(self) -> str:
        """Return the name of the MLP's strategy with its width: full, thin 768."""
        return self.mlp + (f" {self.mlp_width}" if self.mlp_width else "")


class LayerPlan(Strategies, OfLayer):
    """The strategies of one layer."""

    @property
    def strategy(self) -> Strategy:
        """Return the strategy of the attention."""
        return STRATEGIES[self.attention]

    @property
    def attention_changed(self) -> bool:
        """Return whether the layer's attention differs from the base's."""
        return not self.strategy.unchanged

    @property
    def has_attention(self) -> bool:
        """Return whether the layer has attention of any kind."""
        return self.strategy.keeps_weights and self.attention != OTHER

    @property
    def mlp_changed(self) -> bool:
        """Return whether the layer's MLP differs from the base's."""
        return self.mlp != FULL

    @property
    def changed(self) -> bool:
        """Return whether the layer differs from the base's."""
        return self.attention_changed or self.mlp_changed

    @property
    def attention_alone(self) -> bool:
        """Return whether stage 1 of healing looks at the layer's attention and not at the whole layer."""
        changed = self.attention_changed and self.strategy.keeps_weights
        return changed and (not self.mlp_changed or self.feature_map is not None)

    def sites(self) -> list[LayerPlan]:
        """Return the changes of the layer's attention and of its MLP, as far as there are any, each alone."""
        attention = self.model_copy(update={"mlp": FULL, MLP_WIDTH: None})
        mlp = LayerPlan(layer=self.layer, attention=FULL, mlp=self.mlp, mlp_width=self.mlp_width)
        return [site for site in (attention, mlp) if site.changed]

    def with_site(self, site: LayerPlan) -> LayerPlan:
        """Return the layer with the MLP of `site` if that is changed, else with its attention."""
        attention, mlp = (self, site) if site.mlp_changed else (site, self)
        return attention.model_copy(update={"mlp": mlp.mlp, MLP_WIDTH: mlp.mlp_width})

    @property
    def learns_alone(self) -> bool:
        """Return whether stage 1 of healing trains the layer; of a changed layer."""
        if self.feature_map:
            return FEATURE_MAPS[self.feature_map].learned
        return self.strategy.keeps_weights or MLP_STRATEGIES[self.mlp].keeps_weights

    @property
    def exact_positions(self) -> int:
        """Return how many first positions the layer computes as a full layer does; of a changed layer."""
        exact = not self.sink and (not self.feature_map or FEATURE_MAPS[self.feature_map].exact_within_window)
        return self.window or 0 if exact else 0

    def full_heads(self, kv_heads: int) -> int:
        """Return how many of the layer's `kv_heads` have full attention."""
        return kv_heads if self.attention == FULL else len(self.full_kv_heads)

    def windowed(self, kv_heads: int) -> list[int]:
        """Return the layer's KV heads that have a window."""
        return [head for head in range(kv_heads) if head not in self.full_kv_heads] if self.window else []

    def kv_tokens(self, context_tokens: int, kv_heads: int) -> int:
        """Return the tokens whose keys and values the layer holds for one request, summed over its `kv_heads`."""
        held = self.strategy.kv_tokens(context_tokens, self.window)
        return len(self.full_kv_heads) * context_tokens + (kv_heads - len(self.full_kv_heads)) * held

    def normalized(self, kv_heads: int) -> LayerPlan:
        """Return full attention for a layer all of whose KV heads are full, else itself; raise ValueError if it names a
        KV head that a model with `kv_heads` per layer lacks."""
        if self.full_kv_heads and self.full_kv_heads[-1] >= kv_heads:
            named = ", ".join(map(str, self.full_kv_heads))
            raise ValueError(f"layer {self.layer} has KV heads 0 to {kv_heads - 1}; got full_kv_heads {named}")
        if len(self.full_kv_heads) < kv_heads:
            return self
        return LayerPlan(layer=self.layer, attention=FULL, mlp=self.mlp, mlp_width=self.mlp_width)

    def key(self) -> dict[str, Any]:
        """Return what identifies the layer's strategies in hashes, without settings that older releases lacked."""
        later = {
            FULL_KV_HEADS: self.full_kv_heads,
            FEATURE_MAP: self.feature_map,
            "mlp": self.mlp_changed,
            MLP_WIDTH: self.mlp_changed,
        }
        return self.model_dump(exclude={name for name, value in later.items() if not value})


def all_full(model: ModelInfo) -> list[LayerPlan]:
    """Return the plan that changes nothing."""
    return [unchanged_layer(model, layer) for layer in range(model.layers)]


def unchanged_layer(model: ModelInfo, layer: int) -> LayerPlan:
    """Return a layer as it is in the base."""
    return LayerPlan(layer=layer, attention=OTHER if layer in model.other_layers else FULL)


def window_of(layers: Iterable[LayerPlan]) -> int | None:
    """Return the one window of a plan's layers, None if no layer slides."""
    return next((entry.window for entry in layers if entry.window), None)


def counts(layers: Sequence[LayerPlan]) -> dict[str, int]:
    """Return the number of layers per strategy of attention, in the order of STRATEGIES; those that `measure` does not
    try by default only where a layer has them."""
    found = {name: sum(entry.attention == name for entry in layers) for name in STRATEGIES}
    return {name: count for name, count in found.items() if count or name in (FULL, *MEASURED)}


def check_served(layers: Iterable[LayerPlan], where: str) -> None:
    """Raise ConfigError for a plan with a strategy that neither vLLM nor an export has; `where`: who was asked."""
    if unserved := [entry for entry in layers if not entry.strategy.served]:
        raise ConfigError(
            f"{where} has no {unserved[0].strategy.title}",
            found=f"layers {', '.join(str(entry.layer) for entry in unserved)} of the plan",
            do="evaluate the model with Transformers; to serve one, plan these layers full, sliding or none",
        )


def counted(layers: Sequence[LayerPlan]) -> str:
    """Return the counts as text: 8 full, 22 sliding (of which 4 layers keep 5 KV heads full), 0 none; MLPs: 3 thin.

    Of MLPs only where one is changed.
    """
    found, mixed = counts(layers), [len(entry.full_kv_heads) for entry in layers if entry.full_kv_heads]
    heads = f" (of which {len(mixed)} layers keep {sum(mixed)} KV heads full)" if mixed else ""
    attention = ", ".join(
        f"{found[name]} {name}{heads if FULL_KV_HEADS in strategy.settings else ''}"
        for name, strategy in STRATEGIES.items()
        if name in found
    )
    mlps = {name: sum(entry.mlp == name for entry in layers) for name in MLP_STRATEGIES if name != FULL}
    changed = ", ".join(f"{count} {name}" for name, count in mlps.items() if count)
    return f"{attention}; MLPs: {changed}" if changed else attention


def layer_rows(layers: Sequence[LayerPlan]) -> list[list[str]]:
    """Return the layers as a table of text, header first; a column of full KV heads, feature maps or MLPs if any layer
    has them."""
    rows = [["layer", "attention", "window", "sink", "full KV heads", "feature map", "MLP"]]
    mlps = any(entry.mlp_changed for entry in layers)
    rows += [
        [
            *(str(entry.layer), entry.attention, str(entry.window or ""), "yes" if entry.sink else ""),
            *(" ".join(map(str, entry.full_kv_heads)), entry.feature_map or "", entry.mlp_label if mlps else ""),
        ]
        for entry in layers
    ]
    return [
        [cell for index, cell in enumerate(row) if index < 4 or any(each[index] for each in rows[1:])] for row in rows
    ]


class Predicted(Part):
    """The predicted quality loss of a plan (sums of single-layer scores) and its costs."""

    quality_loss: dict[str, float] = Field(description="per metric, the sum over layers of its scores")
    kv_fraction: float
    kv_bytes_per_request: int
    parameter_fraction: float
    context_tokens: int
    concurrency: int | None = Field(None, description="requests decoding at once in decode_ms")
    decode_ms: float | None = Field(None, description="time of one step; needs plan.costs")
    decode_fraction: float | None = None
    plan: str = Field(default="", description="hash of the plan that it predicts")


class PlanFile(Artifact):
    """`plan.yaml`: one line per layer; you may edit it."""

    schema_version: int = 2
    model: ModelInfo
    method: str
    settings: dict[str, Any] = Field({})
    sensitivity: str | None = Field(default=None, description="hash of the sensitivity.json it was made from")
    predicted: Predicted | None = None
    layers: list[LayerPlan]

    @model_validator(mode="after")
    def _layers_in_order(self) -> PlanFile:
        order = [entry.layer for entry in self.layers]
        if order != list(range(self.model.layers)):
            raise ValueError(f"the plan must name layers 0 to {self.model.layers - 1} once each, in order; got {order}")
        if len({entry.window for entry in self.layers if entry.window}) > 1:
            raise ValueError("a plan uses one window: vLLM and Transformers keep a single sliding_window")
        self.layers = [entry.normalized(self.model.kv_heads) for entry in self.layers]
        return self

    @property
    def window(self) -> int | None:
        return window_of(self.layers)

    @property
    def valid_prediction(self) -> Predicted | None:
        """Return the prediction for these layers; None after they were edited."""
        return self.predicted if self.predicted and self.predicted.plan in ("", self.hash()) else None

    @property
    def sliding_as_base(self) -> list[int]:
        """Return the layers of unchanged attention, which the plan calls full, that slide in the base."""
        return [e.layer for e in self.layers if not e.attention_changed and e.layer in self.model.sliding_layers]

    def count(self, attention: StrategyName) -> int:
        return counts(self.layers).get(attention, 0)

    def hash(self) -> str:
        """Return a hash of the model and the layers, whichever way they were chosen."""
        return fingerprint(self.model.fingerprint, [entry.key() for entry in self.layers])


def write_plan(path: Path, plan: PlanFile) -> None:
    """Write `plan.yaml` with one line per layer."""
    head = plan.model_dump(mode="json", exclude={"layers"})
    lines = [yaml.safe_dump(head, sort_keys=False, allow_unicode=True), "layers:\n"]
    for entry in plan.layers:
        values = entry.model_dump(mode="json", exclude_defaults=True)
        inner = yaml.safe_dump(values, default_flow_style=True, sort_keys=False, width=200).strip()
        lines.append(f"  - {inner}\n")
    write_text(path, "".join(lines))


def read_plan(path: Path) -> PlanFile:
    """Return `plan.yaml`, read and validated; raise ConfigError if it is not valid."""
    return read_json(path, PlanFile, "layerboost plan", parse_yaml)


FRONTIER = "frontier.json"
# What the plans of a frontier differ in, each a field of Predicted.
Axis = Literal["kv_fraction", "parameter_fraction"]
AXES: dict[Axis, str] = {"kv_fraction": "KV cache", "parameter_fraction": "parameters"}


class FrontierPoint(Part):
    """The plan at one budget, with its prediction."""

    predicted: Predicted
    layers: list[LayerPlan]

    @property
    def window(self) -> int | None:
        return window_of(self.layers)


class Frontier(Artifact):
    """`frontier.json`: plans from the cheapest to the base."""

    model: ModelInfo
    sensitivity: str = Field(description="hash of the sensitivity.json it was made from")
    settings: dict[str, Any]
    axis: Axis = Field("kv_fraction", description="the budget that differs from plan to plan")
    points: list[FrontierPoint]
