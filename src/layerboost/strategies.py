"""The strategies as data: what can replace a layer's attention, and what each strategy costs.

Their tensor code is in model/attention.py and model/modeling.py, which are copied into every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

StrategyName = Literal["full", "sliding", "none"]
FULL: StrategyName = "full"
# Settings of a strategy, each a field of a layer's entry in plan.yaml.
WINDOW, SINK, FULL_KV_HEADS = "window", "sink", "full_kv_heads"


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

    def variants(self, windows: Sequence[int]) -> list[dict[str, Any]]:
        """Return every combination of window and sink to measure whole layers with, each as fields of a LayerPlan."""
        combinations: list[dict[str, Any]] = [{}]
        for setting, values in ((WINDOW, windows), (SINK, (False, True))):
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
            "none",
            "no attention",
            "no attention, no KV cache",
            lambda context, _: 0,
            keeps_weights=False,
            shades=(("#7d3f5d", "#c983a6"),),
        ),
    )
}


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


def label(chosen: Chosen) -> str:
    """Return the name of a strategy with its settings: full, sliding 64 + sink, sliding 64 + full KV heads 0 2."""
    window = f" {chosen.window}" if chosen.window else ""
    heads = f" + full KV heads {' '.join(map(str, chosen.full_kv_heads))}" if chosen.full_kv_heads else ""
    return chosen.attention + window + (" + sink" if chosen.sink else "") + heads
