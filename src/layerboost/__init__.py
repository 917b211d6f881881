"""layerboost: give each layer of a pretrained transformer the cheapest attention that keeps its quality.

Importing the package imports neither torch nor Transformers, because the command line and every vLLM process on the
machine import it. The names in `__all__` are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    from layerboost.api import Boosted, convert, evaluate, export, heal, measure, open_base, plan
    from layerboost.recipe import Evaluate, Heal, Measure, Plan, Text

__all__ = [
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "Boosted",
    "Evaluate",
    "Heal",
    "Measure",
    "Plan",
    "Text",
    "convert",
    "evaluate",
    "export",
    "heal",
    "measure",
    "open_base",
    "plan",
]
__version__ = "0.2.0.dev0"

_SETTINGS = ("Text", "Measure", "Plan", "Heal", "Evaluate")


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Transformers' own classes, which from then on load boosted checkpoints too.
    module = "model.modeling" if name.startswith("Auto") else "recipe" if name in _SETTINGS else "api"
    return getattr(importlib.import_module(f"layerboost.{module}"), name)
