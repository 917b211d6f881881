"""The strategies as data: what can replace a layer's attention, and what each strategy costs.

Their tensor code is in model/attention.py and model/modeling.py, which are copied into every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

StrategyName = Literal["full", "sliding", "linear", "none"]
Replacement = Literal["sliding", "linear", "none"]
FULL: StrategyName = "full"
SLIDING: StrategyName = "sliding"
LINEAR: StrategyName = "linear"
# Settings of a strategy, each a field of a layer's entry in plan.yaml.
WINDOW, SINK, FULL_KV_HEADS, FEATURE_MAP = "window", "sink", "full_kv_heads", "feature_map"
FeatureMapName = Literal["lolcats", "liger"]


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
}


@dataclass(frozen=True)
class Strategy:
    """One way to run the attention of a layer."""

    name: StrategyName
    title: str
    # What a model card says of it.
    meaning: str
    # (context, window) -> tokens whose keys and values one KV head holds; a query attends to as many.
    kv_tokens: Callable[[int, int | None], int]
    # Its colours in the report, each on a light and on a dark page: of its cells and, in turn, of its windows.
    shades: tuple[tuple[str, str], ...]
    text: tuple[str, str] | None = None  # on those cells; without one, a cell has a dashed border alone
    settings: tuple[str, ...] = ()
    keeps_weights: bool = True
    # Whether vLLM and exports have it.
    served: bool = True

    def variants(self, windows: Sequence[int]) -> list[dict[str, Any]]:
        """Return every combination of window, sink and feature map to measure whole layers with, each as fields of a
        LayerPlan."""
        combinations: list[dict[str, Any]] = [{}]
        for setting, values in ((WINDOW, windows), (SINK, (False, True)), (FEATURE_MAP, tuple(FEATURE_MAPS))):
            if setting in self.settings:
                combinations = [fields | {setting: value} for fields in combinations for value in values]
        return combinations


# In the order in which counts and legends name them.
STRATEGIES: dict[StrategyName, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy(
            "full",
            "full attention",
            "softmax attention",
            lambda context, _: context,
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
    )
}

# What `measure` replaces a layer's attention by, unless it is told otherwise.
MEASURED: tuple[Replacement, ...] = ("sliding", "none")


class Chosen(Protocol):
    """A strategy with its settings: a LayerPlan or a Variant."""

    @property
    def attention(self) -> StrategyName: ...
    @property
    def window(self) -> int | None: ...
    @property
    def sink(self) -> bool: ...
    @property
    def full_kv_heads(self) -> tuple[int, ...]: ...
    @property
    def feature_map(self) -> FeatureMapName | None: ...


def label(chosen: Chosen) -> str:
    """Return the name of a strategy with its settings: full, sliding 64 + sink, sliding 64 + full KV heads 0 2, linear
    64 liger."""
    window = f" {chosen.window}" if chosen.window else ""
    heads = f" + full KV heads {' '.join(map(str, chosen.full_kv_heads))}" if chosen.full_kv_heads else ""
    feature_map = f" {chosen.feature_map}" if chosen.feature_map else ""
    return chosen.attention + window + feature_map + (" + sink" if chosen.sink else "") + heads
