"""The strategies as data: what can replace a layer's attention or its MLP, and what each strategy costs.

Their tensor code is in model/attention.py and model/modeling.py, which are copied into every checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

StrategyName = Literal["full", "sliding", "none"]
FULL: Literal["full"] = "full"
Component = Literal["attention", "mlp"]
MLPName = Literal["full", "thin", "none"]
# Settings of a strategy, each a field of a layer's entry in plan.yaml.
WINDOW, SINK, FULL_KV_HEADS, MLP_WIDTH = "window", "sink", "full_kv_heads", "mlp_width"


@dataclass(frozen=True)
class Strategy:
    """One way to run a component of a layer."""

    name: StrategyName | MLPName
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

    def variants(self, windows: Sequence[int], mlp_widths: Sequence[int] = ()) -> list[dict[str, Any]]:
        """Return every combination of settings to measure whole layers with, each as fields of a LayerPlan."""
        combinations: list[dict[str, Any]] = [{}]
        for setting, values in ((WINDOW, windows), (SINK, (False, True)), (MLP_WIDTH, mlp_widths)):
            if setting in self.settings:
                combinations = [fields | {setting: value} for fields in combinations for value in values]
        return combinations


# Of attention, in the order in which counts and legends name them.
STRATEGIES: dict[str, Strategy] = {
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
# Of MLPs. Their tensor code is in model/mlp.py.
MLP_STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Strategy("full", "full MLP", "all neurons"),
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


class Chosen(Protocol):
    """The strategies of a layer with their settings: a LayerPlan or a Variant."""

    @property
    def attention(self) -> StrategyName: ...
    @property
    def window(self) -> int | None: ...
    @property
    def sink(self) -> bool: ...
    @property
    def full_kv_heads(self) -> tuple[int, ...]: ...
    @property
    def mlp(self) -> MLPName: ...
    @property
    def mlp_width(self) -> int | None: ...


def label(chosen: Chosen) -> str:
    """Return the names of a layer's strategies with their settings: full, sliding 64 + sink, sliding 64 + full KV heads
    0 2, MLP thin 768, none + MLP none."""
    window = f" {chosen.window}" if chosen.window else ""
    heads = f" + full KV heads {' '.join(map(str, chosen.full_kv_heads))}" if chosen.full_kv_heads else ""
    attention = chosen.attention + window + (" + sink" if chosen.sink else "") + heads
    if chosen.mlp == FULL:
        return attention
    return (f"{attention} + " if chosen.attention != FULL else "") + f"MLP {mlp_label(chosen)}"


def mlp_label(chosen: Chosen) -> str:
    """Return the name of an MLP's strategy with its width: full, thin 768."""
    return chosen.mlp + (f" {chosen.mlp_width}" if chosen.mlp_width else "")
