"""What layers of each kind keep for generation, as layers of Transformers' dynamic cache.

Travels inside every boosted checkpoint, so it imports nothing of layerboost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class AttentionFreeCacheLayer(DynamicLayer):
    """The cache of a layer without attention: counts tokens, because Transformers asks layer 0 for the length."""

    # Neither True nor False: the masks of full and of sliding layers take their sizes from the first layer of their
    # kind, which this is not.
    is_sliding = None

    def __init__(self, cumulative_length: int = 0) -> None:
        super().__init__()
        self.cumulative_length = cumulative_length

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def reset(self) -> None:
        self.cumulative_length = 0

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            self.cumulative_length = min(self.cumulative_length, tokens_to_remove)
        else:
            self.cumulative_length += tokens_to_remove

    def reorder_cache(self, beam_idx: torch.Tensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: torch.Tensor) -> None: ...


class SlidingCacheLayer(DynamicSlidingWindowLayer):
    """The cache of a sliding layer. Transformers' keeps a view, and with it a whole prompt, until the next token."""

    keys: torch.Tensor
    values: torch.Tensor

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values to the cache; return those that the new queries may see."""
        seen = super().update(key_states, value_states, *args, **kwargs)
        if key_states.shape[-2] > 1:
            self.keys, self.values = self.keys.clone(), self.values.clone()
        found: tuple[torch.Tensor, torch.Tensor] = seen
        return found


class MixedCacheLayer(DynamicLayer):
    """The cache of a layer with two kinds of KV heads: it holds the full ones whole, and the others for a window.

    `update` returns keys and values as pairs, of the full heads `[B, Hf, T, D]` and of the windowed ones.
    """

    def __init__(self, window: int, heads: tuple[list[int], list[int]]) -> None:
        super().__init__()
        self.heads = heads
        self.windowed = SlidingCacheLayer(window)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        full, windowed = self.heads
        keys, values = super().update(take_heads(key_states, full), take_heads(value_states, full))
        near = self.windowed.update(take_heads(key_states, windowed), take_heads(value_states, windowed))
        return (keys, near[0]), (values, near[1])

    def activate_past_recording(self) -> None:
        self.windowed.activate_past_recording()

    def reset(self) -> None:
        super().reset()
        self.windowed.reset()

    def crop(self, tokens_to_remove: int) -> None:
        # The window first: it raises where it no longer has what would be left.
        self.windowed.crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.windowed.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.windowed.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.windowed.batch_select_indices(indices)


def take_heads(states: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """Return some heads of states `[B, H, T, D]`, as a view if they are consecutive."""
    first, end = heads[0], heads[-1] + 1
    return states[:, first:end] if len(heads) == end - first else states[:, list(heads)]
