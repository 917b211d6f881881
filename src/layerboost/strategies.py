"""The strategies as data: what can stand in place of a layer's attention, and what each of them costs.

The tensor code of each is in model/attention.py and model/modeling.py, which travel in a checkpoint.
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
    # Tokens whose keys and values one layer holds, of a context and with a window; a query attends to as many.
    kv_tokens: Callable[[int, int | None], int]
    settings: tuple[str, ...] = ()
    keeps_weights: bool = True

    def variants(self, windows: Sequence[int]) -> list[dict[str, Any]]:
        """Return every combination of its settings that can be measured, each as fields of a layer's entry."""
        found: list[dict[str, Any]] = [{}]
        for setting, values in ((WINDOW, windows), (SINK, (False, True))):
            if setting in self.settings:
                found = [fields | {setting: value} for fields in found for value in values]
        return found


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
    """A strategy with its settings, as plans and sensitivities have it."""

    @property
    def attention(self) -> StrategyName: ...
    @property
    def window(self) -> int | None: ...
    @property
    def sink(self) -> bool: ...


def label(of: Chosen) -> str:
    """Return the name of a strategy with its settings: full, sliding 64, sliding 64 + sink, none."""
    return of.attention + (f" {of.window}" if of.window else "") + (" + sink" if of.sink else "")
