"""Engines that serve a model, behind one protocol. An engine is a module here, with a name below and in the recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

if TYPE_CHECKING:
    from layerboost.engines.protocol import Engine
    from layerboost.recipe import EngineName


def open_engine(name: EngineName) -> Engine:
    """Return the engine of a recipe's `bench.engine`; its libraries are imported only then."""
    match name:
        case "vllm":
            from layerboost.engines import vllm

            return vllm
        case "transformers":
            from layerboost.engines import transformers

            return transformers
        case _:
            assert_never(name)
