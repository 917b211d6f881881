"""layerboost: give each layer of a pretrained transformer the cheapest attention it can live with.

Importing the package teaches `transformers.AutoModelForCausalLM` to load boosted checkpoints. It imports neither torch
nor transformers itself: where they are not loaded yet, a finder waits for them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_AUTO = "transformers.models.auto.modeling_auto"


class _Registering(Loader):
    """Runs a module as its own loader does, then registers the boosted classes with it."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


class _Waiting(MetaPathFinder):
    """Waits for Transformers' auto classes to be imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _AUTO:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


def _register() -> None:
    # Registers at its end; a no-op when it is itself what imports Transformers.
    importlib.import_module("layerboost.model.modeling")


if _AUTO in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _Waiting())
