"""layerboost: give each layer of a pretrained transformer the cheapest attention it can live with.

Importing the package imports neither torch nor Transformers, because the command line and every vLLM process on the
machine import it. The names in `__all__` are imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import AutoModelForCausalLM

__all__ = ["AutoModelForCausalLM"]
__version__ = "0.1.0"

# Name -> the module that has it.
_OFFERED = {
    # Transformers' own class, which from then on loads boosted checkpoints too.
    "AutoModelForCausalLM": "layerboost.model.modeling",
}


def __getattr__(name: str) -> Any:
    if name not in _OFFERED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_OFFERED[name]), name)
