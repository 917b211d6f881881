"""Engines that serve a model, behind one protocol. An engine is a module here, with a name below and in the recipe."""

from __future__ import annotations

import importlib.util
import shutil
from typing import TYPE_CHECKING

from layerboost.errors import ConfigError

if TYPE_CHECKING:
    from layerboost.engines.protocol import Engine

# From the one that is preferred if all are installed.
ENGINES = ("vllm", "llama.cpp", "transformers")


def open_engine(name: str) -> Engine:
    """Return an engine by name, or the first that is installed for `auto`; raise ConfigError for an unknown name.

    Its libraries are imported only then.
    """
    match installed_engine() if name == "auto" else name:
        case "vllm":
            from layerboost.engines import vllm

            return vllm
        case "llama.cpp":
            from layerboost.engines import llama_cpp

            return llama_cpp
        case "transformers":
            from layerboost.engines import transformers

            return transformers
        case _:
            raise ConfigError(f"no engine is called {name}", do=f"choose one of auto, {', '.join(ENGINES)}")


def installed_engine() -> str:
    """Return the name of the first engine that is installed."""
    if importlib.util.find_spec("vllm"):
        return "vllm"
    if shutil.which("llama-server") or importlib.util.find_spec("xllamacpp"):
        return "llama.cpp"
    return "transformers"
