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
WINDOW, SINK = "window", "sink"


@dataclass(frozen=True)
class Strategy:
    """One way to run the attention of a layer."""

    name: StrategyName
    title: str
    # (context, window) -> tokens whose keys and values one layer holds; a query attends to as many.
    kv_tokens: Callable[[int, int | None], int]
    settings: tuple[str, ...] = ()
    keeps_weights: bool = True

    def variants(self, windows: Sequence[int], sinks: Sequence[bool]) -> list[dict[str, Any]]:
        """Return every measurable combination of the settings, each as fields of a LayerPlan."""
        combinations: list[dict[str, Any]] = [{}]
        for setting, values in ((WINDOW, windows), (SINK, sinks)):
            if setting in self.settings:
                combinations = [fields | {setting: value} for fields in combinations for value in values]
        return combinations


# In the order in which counts and legends name them.
STRATEGIES: dict[StrategyName, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("full", "full attention", lambda context, _: context),
        Strategy("sliding", "sliding window", lambda context, window: min(window or 0, context), (WINDOW, SINK)),
        Strategy("none", "no attention", lambda context, _: 0, keeps_weights=False),
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


def label(chosen: Chosen) -> str:
    """Return the name of a strategy with its settings: full, sliding 64, sliding 64 + sink, none."""
    return chosen.attention + (f" {chosen.window}" if chosen.window else "") + (" + sink" if chosen.sink else "")
