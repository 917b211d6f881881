"""The strategies as data: what can replace a layer's attention or its MLP, and what each strategy costs.

Their tensor code is in model/attention.py and model/modeling.py, which are copied into every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

StrategyName = Literal["full", "sliding", "linear", "none", "other"]
Replacement = Literal["sliding", "linear", "none"]
FULL: Literal["full"] = "full"
SLIDING: StrategyName = "sliding"
LINEAR: StrategyName = "linear"
OTHER: StrategyName = "other"
MLPName = Literal["full", "thin", "none"]
ComponentName = Literal["attention", "mlp"]
# Settings of a strategy, each a field of a layer's entry in plan.yaml.
WINDOW, SINK, FULL_KV_HEADS, FEATURE_MAP = "window", "sink", "full_kv_heads", "feature_map"
MLP_WIDTH = "mlp_width"
FeatureMapName = Literal["lolcats", "liger", "delta"]


@dataclass(frozen=True)
class FeatureMap:
    """A kind of linear attention: what one layer holds of the tokens beyond its window, and how it is trained."""

    # (query heads, KV heads, head size) -> numbers in the state of one layer.
    state: Callable[[int, int, int], int]
    # Whether stage 1 of healing has parameters of its own to train.
    learned: bool
    # Whether the first `window` positions are computed as in full attention.
    exact_within_window: bool


LOLCATS_FEATURES = 128  # of [softmax(xW), softmax(−xW)], 64 each
FEATURE_MAPS: dict[FeatureMapName, FeatureMap] = {
    # Feature maps are per query head, and the state has one more column: the normaliser.
    "lolcats": FeatureMap(lambda heads, _, size: heads * LOLCATS_FEATURES * (size + 1), True, True),
    "liger": FeatureMap(lambda _, kv_heads, size: kv_heads * size * size, False, False),
    "delta": FeatureMap(lambda _, kv_heads, size: kv_heads * size * size, True, False),
}


@dataclass(frozen=True)
class Strategy:
    """One way to run a component of a layer."""

    name: Any  # a StrategyName, or of MLPs an MLPName
    title: str
    # What a model card says of it.
    meaning: str
    # (context, window) -> tokens whose keys and values one KV head holds; a query attends to as many. Of attention.
    kv_tokens: Callable[[int, int | None], int] = lambda context, window: 0
    # Its colours in the report, each on a light and on a dark page: of its cells and, in turn, of its windows.
    shades: tuple[tuple[str, str], ...] = ()
    text: tuple[str, str] | None = None  # on those cells; without one, a cell has a dashed border alone
    settings: tuple[str, ...] = ()
    keeps_weights: bool = True
    # Whether it leaves a layer as it is in the base.
    unchanged: bool = False
    # Whether vLLM and exports have it.
    served: bool = True

    def variants(self, windows: Sequence[int], mlp_widths: Sequence[int] = ()) -> list[dict[str, Any]]:
        """Return every combination of settings to measure whole layers with, each as fields of a LayerPlan."""
        combinations: list[dict[str, Any]] = [{}]
        values_of = {
            WINDOW: windows,
            SINK: (False, True),
            FEATURE_MAP: tuple(FEATURE_MAPS),
            MLP_WIDTH: mlp_widths,
        }
        for setting, values in values_of.items():
            if setting in self.settings:
                combinations = [fields | {setting: value} for fields in combinations for value in values]
        return combinations


# Of attention, in the order in which counts and legends name them.
STRATEGIES: dict[StrategyName, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(
            "full",
            "full attention",
            "softmax attention",
            lambda context, _: context,
            unchanged=True,
            shades=(("#2b5c94", "#5d93d1"),),
            text=("#ffffff", "#08131f"),
        ),
        Strategy(
            "sliding",
            "sliding window",
            "softmax over the last `window` tokens",
            lambda context, window: min(window or 0, context),
            settings=(WINDOW, SINK, FULL_KV_HEADS),
            shades=(("#dd9a2e", "#dfa446"), ("#b4711a", "#c58433"), ("#8a5212", "#a96f35")),
            text=("#241800", "#1f1500"),
        ),
        Strategy(
            "linear",
            "linear attention",
            "softmax over the last `window` tokens, and linear attention's state of all tokens",
            lambda context, window: min(window or 0, context),
            settings=(WINDOW, FEATURE_MAP),
            served=False,
            shades=(("#2c7a66", "#58b59b"), ("#1f5b4c", "#3f8f79"), ("#123f34", "#2f6e5d")),
            text=("#ffffff", "#04150f"),
        ),
        Strategy(
            "none",
            "no attention",
            "no attention, no KV cache",
            lambda context, _: 0,
            keeps_weights=False,
            shades=(("#7d3f5d", "#c983a6"),),
        ),
        # Not a choice: the layers of a hybrid that have no attention.
        Strategy(
            "other",
            "layer of another kind",
            "the base's own linear attention, state space or convolution, no KV cache",
            unchanged=True,
            shades=(("#6b7280", "#9ca3af"),),
        ),
    )
}
# Of MLPs. Their tensor code is in model/mlp.py.
MLP_STRATEGIES: dict[MLPName, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("full", "full MLP", "all neurons", unchanged=True),
        Strategy(
            "thin",
            "thinned MLP",
            "the `mlp_width` neurons that add most, their output projection fitted to the whole MLP's output",
            shades=(("#3f7d4e", "#83c993"),),
            settings=(MLP_WIDTH,),
        ),
        Strategy("none", "no MLP", "no MLP", keeps_weights=False),
    )
}

# What `measure` replaces a layer's attention by, unless it is told otherwise.
MEASURED: tuple[Replacement, ...] = ("sliding", "none")
